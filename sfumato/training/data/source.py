"""What the training loop asks of data: a batch for a step, the same one every time that it is asked for."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sfumato.training.loss import Examples


class Source(Protocol):
    """Examples as a function of the step's number, so that a resumed run sees the same batches."""

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """The examples of this step: the same ones for the same arguments, always."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this source is, in plain data, for the card of a run; two equal sources say the same."""
        ...
