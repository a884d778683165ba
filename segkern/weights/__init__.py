"""State dicts: one file a format of another project, whether one fits a model; names of timm."""
