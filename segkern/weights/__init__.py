"""Checkpoints of other projects: one file a format, plain functions on dicts."""
