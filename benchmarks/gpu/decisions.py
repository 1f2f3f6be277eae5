"""What reads cost at the released size: 1, 8 and 64 questions behind one state, each with a short canvas, in one pass.

Milliseconds with the words unembedded that are asked, with the whole vocabulary at the place that is read, and with it
at every place. Beside them how far the first differ from each question read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Row, Setting, each_within, tried
from sfumato.model.cache import KVCache
from sfumato.model.network import Model

STATE, QUESTION, LENGTH, WORDS = 512, 40, 16, 16
QUESTIONS = (1, 8, 64)
FAR = 0.05
"""Of the largest logit: what batches of other sizes may differ by in bf16."""


def run(setting: Setting, kind: str) -> Iterator[Row]:
    model = setting.model(kind)
    of = {f"{kind} questions {count}": count for count in (QUESTIONS[:2] if setting.is_dry else QUESTIONS)}

    def row(cell: str) -> Row:
        return tried(cell, lambda: timed(setting, model, of[cell]), kind=kind, questions=of[cell])

    yield from each_within(setting, list(of), row, 3.0)


@torch.inference_mode()
def timed(setting: Setting, model: Model, count: int) -> dict[str, Any]:
    """A read of so many questions, which stand behind one row of the cache."""
    device, vocab = setting.device, model.config.vocab_size
    state, width = (16, 4) if setting.is_dry else (STATE, QUESTION)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randint(vocab, shape, device=device, generator=generator)

    cache = KVCache.allocate(model.config, 1, state, device, model.dtype)
    model.encode(random(1, state), cache)
    tokens_BT, canvas_BL, words_W = random(count, width), random(count, LENGTH), random(WORDS)

    def hidden(first: int, last: int) -> Tensor:
        rows = [0] * (last - first)
        return model.read(tokens_BT[first:last], [width] * len(rows), canvas_BL[first:last], cache, rows)

    def word_logits(first: int = 0, last: int = count) -> Tensor:
        return model.logits_of(hidden(first, last)[:, 0], words_W)

    def everywhere() -> None:
        for part_BLD in hidden(0, count).split(16):
            model.logits(part_BLD)

    ways: dict[str, Callable[[], Any]] = {
        "few": lambda: word_logits().tolist(),
        "whole": lambda: model.logits(hidden(0, count)[:, 0])[:, words_W].tolist(),
        "everywhere": everywhere,
    }
    ms = {name: setting.milliseconds(call, 1.0) for name, call in ways.items()}
    together, alone = word_logits(), torch.cat([word_logits(n, n + 1) for n in range(min(count, 8))])
    gap = float((together[: len(alone)] - alone).abs().max() / alone.abs().max())
    return {
        "ok": bool(together.isfinite().all()) and gap < FAR,
        **{f"{name}_ms": value for name, value in ms.items()},
        "gap": gap,
        "ops": model.ops.name,
        "says": f"{count} questions: {ms['few']:.2f} ms, {ms['whole']:.2f} with all words, gap {gap:.1e}",
    }
