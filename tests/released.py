"""The config.json of the released checkpoint, in its own spelling."""

from __future__ import annotations

from sfumato.measure.released import RELEASED

__all__ = ["RELEASED"]
