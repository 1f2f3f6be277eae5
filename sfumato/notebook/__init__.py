"""What a notebook shows: a canvas while it denoises, and the bar of a model that loads."""
