"""Copies of the model on a Ray cluster."""
