"""What the operating system gives: child processes with limits, locks, files that are there whole or not at all."""
