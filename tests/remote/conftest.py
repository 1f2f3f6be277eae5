"""The scripted host, for every test of the client."""

from __future__ import annotations

from scripted_host import naps, ours, server, theirs

__all__ = ["naps", "ours", "server", "theirs"]
