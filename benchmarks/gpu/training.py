"""A step of training at the released size: what the GPU holds at most, against what `finetune --plan` says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import common
from benchmarks.gpu.setting import Row, Setting, tried
from benchmarks.training import EVERY, peak
from sfumato.measure.training import TrainingSetup, memory
from sfumato.measure.work import size


def run(setting: Setting, kind: str) -> Iterator[Row]:
    for targets in (("attention", "dense"), EVERY):
        yield tried(f"rank 16 on {', '.join(targets)} over {kind}", partial(held, setting, kind, targets))
        common.release()


def held(setting: Setting, kind: str, targets: tuple[str, ...]) -> dict[str, Any]:
    """One first step, checkpointed, 1,024 tokens and a canvas; right where it holds no more than a tenth above it."""
    setup = TrainingSetup(quantize=kind, targets=targets, tokens=64 if setting.is_dry else 1024)
    if setting.is_dry:
        setup = replace(setup, is_attention_plain=False)
    config = setting.config()
    model = common.random_packed(config, setting.device, "fused", kind)
    needs = memory(config, setup)
    planned = needs.counted - needs.optimizer  # a first step has no states yet
    most = peak(model, setup, is_first=True)
    fits = (most + memory(config, replace(setup, optimizer="adamw8bit")).optimizer) / 1e9
    says = f"holds {size(most)}, planned {size(planned)}; {fits:.1f} GB with an optimiser of 8 bits"
    return {"ok": setting.is_dry or most <= 1.1 * planned, "says": says, "bytes": most, "planned": planned}
