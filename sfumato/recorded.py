"""A step recorded as a CUDA graph, for rows up to powers of two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.cache import KVCache
from sfumato.model import Model, Pass
from sfumato.step import Canvases, step_


class Recorded:
    """A step recorded as a CUDA graph for up to `batch` rows, with `encode` tokens a row in the same pass (0: none).

    The cache's tensors are part of the recording: it serves for as long as the cache is not replaced by a larger one.
    With `records=False` the same static buffers are used and the step runs as usual: for tests without a GPU."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        state: Canvases,
        batch: int,
        encode: int,
        bans: Tensor | None = None,
        records: bool = True,
    ) -> None:
        self.cache, self.batch, self.encode = cache, batch, encode
        self.scratch = state.canvas_XL.shape[0] - 1
        self.at_B = torch.full((batch,), self.scratch, device=model.device)
        self.rows_B, self.lengths_B, self.counts_B = (torch.zeros_like(self.at_B) for _ in range(3))
        self.tokens_BT = torch.zeros(batch, encode, dtype=torch.long, device=model.device)
        counts, places = [encode] * batch, (self.rows_B, self.lengths_B, self.counts_B)

        def run() -> Tensor | None:
            one = Pass(model, cache, [0] * batch, counts, encode, state.canvas_XL.shape[1], places)
            return step_(model, cache, state, self.at_B, one, self.tokens_BT if encode else None, bans=bans)

        self._run: Callable[[], object] = run
        self.encoded_BTD: Tensor | None = None
        if records:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles and tunes what is not yet, on the scratch row
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.encoded_BTD = run()
            self._run = graph.replay

    def __call__(
        self, rows: list[int], lengths: list[int], counts: list[int], tokens_BT: Tensor | None = None
    ) -> Tensor | None:
        """Step these rows (at most `batch`), whose cache rows have these lengths."""
        left = self.batch - len(rows)
        # A filler reads cache row 0 and writes, with a count of 0, to the slot that takes padding.
        for buffer, values in (
            (self.at_B, rows + [self.scratch] * left),
            (self.rows_B, rows + [0] * left),
            (self.lengths_B, lengths + [0] * left),
            (self.counts_B, counts + [0] * left),
        ):
            buffer.copy_(torch.tensor(values), non_blocking=True)
        if tokens_BT is not None:
            self.tokens_BT[: len(rows)] = tokens_BT
        found = self._run()
        encoded = found if isinstance(found, Tensor) else self.encoded_BTD
        return None if encoded is None else encoded[: len(rows)]
