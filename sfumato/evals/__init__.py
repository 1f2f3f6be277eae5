"""Measuring what a model can do: tasks that check their own answers."""
