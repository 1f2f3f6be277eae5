"""The routes that only a canvas can offer."""
