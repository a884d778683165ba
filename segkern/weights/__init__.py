"""Helpers of every checkpoint format; no model's names of weights."""
