"""What is shown without the command line: a canvas that denoises in a notebook, and the bar of a model that loads."""
