"""Modules of transformers on our kernels, one file a family; each has its original's name and weights."""
