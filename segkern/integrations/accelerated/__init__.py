"""Modules of transformers on our kernels, a file a family, each under its original's name."""
