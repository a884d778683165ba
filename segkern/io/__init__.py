"""Files: pictures, run-length codes, drawings. Knows nothing of the rest of the package."""
