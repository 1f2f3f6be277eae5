"""TypeSafe's System One API: typed questions about a text."""
