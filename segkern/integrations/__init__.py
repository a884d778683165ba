"""Others' ways of calling: transformers' models on our kernels, its processors, its pipeline."""
