"""The process that runs the model, and the backend over it."""
