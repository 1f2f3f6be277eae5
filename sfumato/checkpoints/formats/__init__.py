"""Other programs' checkpoints, read as ours: one file a format."""
