"""Weights in fewer bits: formats (what a code stands for), recipes (which weight gets which), applying both."""
