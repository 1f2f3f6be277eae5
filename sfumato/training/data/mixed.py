"""Several sources in one batch, by weights: a new task is learned while an old one is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sfumato.errors import InputError
from sfumato.training.data.source import Source
from sfumato.training.loss import Examples


class MixedSource:
    """Each source has its share of every batch, by its weight: at least one example, in a mixed order.

    InputError for weights that are not above 0, and for batches smaller than the number of sources."""

    def __init__(self, parts: Sequence[tuple[Source, float]], seed: int = 0, pad: int = 0) -> None:
        for _, weight in parts:
            if not 0 < weight < float("inf"):
                raise InputError(f"a source has the weight {weight}; give a number above 0")
        if not parts:
            raise InputError("there is no source to mix; give at least one")
        self.sources = [source for source, _ in parts]
        self.weights = np.array([weight for _, weight in parts]) / sum(weight for _, weight in parts)
        self.seed, self.pad = seed, pad

    def shares(self, size: int) -> list[int]:
        """How many examples of a batch come from each source."""
        if size < len(self.sources):
            raise InputError(f"a batch of {size} has no room for {len(self.sources)} sources; raise the batch")
        counts = np.maximum(1, np.floor(self.weights * size)).astype(int)
        while counts.sum() != size:  # the largest remainder next
            lacks = self.weights * size - counts
            if counts.sum() < size:
                counts[lacks.argmax()] += 1
            else:
                counts[np.where(counts > 1, lacks, np.inf).argmin()] -= 1
        return [int(count) for count in counts]

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """See `Source.batch`."""
        parts = [
            source.batch(step, count, device) for source, count in zip(self.sources, self.shares(size), strict=True)
        ]
        width = max(part.tokens_BT.shape[1] for part in parts)
        padded = [
            torch.nn.functional.pad(part.tokens_BT, (0, width - part.tokens_BT.shape[1]), value=self.pad)
            for part in parts
        ]
        # The first rows of a batch see a soft embedding (`Corruption.conditioned`), so no source may always be there.
        order = np.random.default_rng([self.seed, step]).permutation(size).tolist()
        counts, prompts, is_cut = (
            [value for part in parts for value in getattr(part, name)] for name in ("counts", "prompts", "is_cut")
        )
        learned = None
        if any(part.is_learned_BT is not None for part in parts):
            masks = [
                torch.ones_like(part.tokens_BT, dtype=torch.bool) if part.is_learned_BT is None else part.is_learned_BT
                for part in parts
            ]
            learned = torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in masks])[order]
        canvases = [length for part in parts for length in part.canvases or [0] * len(part.counts)]
        drafts = [draft for part in parts for draft in part.drafts or [[]] * len(part.counts)]
        return Examples(
            torch.cat(padded)[order],
            [counts[row] for row in order],
            [prompts[row] for row in order],
            [is_cut[row] for row in order],
            learned,
            [canvases[row] for row in order] if any(canvases) else None,
            [drafts[row] for row in order] if any(drafts) else None,
        )

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        parts = [
            {"weight": round(float(weight), 6), **source.describe()}
            for weight, source in zip(self.weights, self.sources, strict=True)
        ]
        return {"mix": parts, "seed": self.seed}
