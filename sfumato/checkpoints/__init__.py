"""Checkpoints: files to a model and back, in our layout and in other programs'."""
