"""Models as files that run without segkern, or without Python: export, and what it needs."""
