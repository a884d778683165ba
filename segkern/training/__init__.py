"""Trains a model: settings, loop, step, optimizer, checkpoints, log."""
