"""The engine: requests become rows, rows take steps together, one caller or many."""
