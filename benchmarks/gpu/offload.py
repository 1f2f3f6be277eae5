"""Layers streamed from the host give the tokens that resident ones give; and at what rate they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.setting import Row, Setting, tried
from sfumato.llm import LLM
from sfumato.measure.work import size
from sfumato.model import offload
from sfumato.options import Options


def run(setting: Setting, _: str) -> Iterator[Row]:
    yield tried("nano in int4", lambda: streamed(setting))


def streamed(setting: Setting) -> dict[str, Any]:
    options = Options(max_tokens=82, max_steps=2 if setting.is_dry else 4, seed=1)
    prompt = [{"role": "user", "content": "Solve this Sudoku:\n" + "530070000" * 9}]
    notices: list[str] = []

    def load(**more: Any) -> LLM:
        return LLM.load("nano", device=setting.device, quantize="int4", **more)

    expected = load().chat(prompt, options=options).tokens
    limited = load(memory_limit=1_000_000, notice=notices.append)
    is_same = offload.is_streamed(limited.model) and limited.chat(prompt, options=options).tokens == expected
    rate = offload.bandwidth(torch.device(setting.device))
    says = f"streamed {'as' if is_same else 'not as'} resident, {size(rate)}/s"
    return {"ok": is_same, "says": says, "said": notices, "bytes_per_second": rate}
