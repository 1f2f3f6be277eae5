"""The network: its configuration, its cache, its layers."""
