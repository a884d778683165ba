"""State dicts: one file a format of another project, and whether one fits a model."""
