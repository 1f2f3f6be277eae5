"""transformers around the very tensors of our bf16 model, taking turns: a forward with logits, and whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.setting import Row, Setting, tried
from sfumato.measure.plan import BenchPlan

STEPS = 5


def run(setting: Setting, _: str) -> Iterator[Row]:
    if find_spec("transformers") is None:
        yield {"name": "transformers", "skipped": "transformers is not installed"}
        return
    yield tried("transformers", lambda: beside(setting))


@torch.inference_mode()
def beside(setting: Setting) -> dict[str, Any]:
    from benchmarks import peer_models, peers

    # Its weights are ours, as they lie: of operations that lay them out anew there are none to share.
    model = common.random_packed(setting.config(), setting.device, "fused" if setting.is_dry else "triton")
    plan = BenchPlan(16 if setting.is_dry else 1024, model.config.canvas_length, STEPS + 1, 5.0)
    theirs = peer_models.twin(model)
    theirs.set_attn_implementation("sdpa")
    calls = {"transformers": peers.forward_of_theirs(theirs, model, plan), "sfumato": peers.forward_of(model, plan)}
    logits = {name: call().float() for name, call in calls.items()}
    most = float((logits["transformers"] - logits["sfumato"]).abs().max())
    same = float((logits["transformers"].argmax(-1) == logits["sfumato"].argmax(-1)).float().mean())
    del logits
    seconds = 0.2 if setting.is_dry else min(10.0, setting.left / 3)
    forward = common.alternate(calls, seconds, setting.device)
    runs: dict[str, Callable[[], list[float]]] = {
        "transformers": lambda: peers.steps_of_theirs(theirs, model, plan, STEPS),
        "sfumato": lambda: peers.steps_of(model, plan, STEPS),
    }
    for one in list[Callable[[], list[float]]](runs.values()):
        one()
    steps = peers.pooled(runs, min(seconds, setting.left - 5))
    ms = {name: 1e3 * timing.median for name, timing in steps.items()}
    return {
        "prompt": plan.prompt,
        "forward_ms": {name: 1e3 * timing.median for name, timing in forward.items()},
        "step_ms": ms,
        "largest_logit_difference": most,
        "same_argmax": same,
        "says": ", ".join(f"{name} {each:.1f} ms a step" for name, each in ms.items()),
    }
