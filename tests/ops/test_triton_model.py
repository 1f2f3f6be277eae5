"""ops/triton: a whole model on the kernels, under the interpreter: prompts of different length, two canvases a row, the
commit encoded with the next canvas's first step, static buffers. Tokens and steps are the reference's under the same
noise."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tape import Tape

from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.events import Done
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model
from sfumato.options import Options

pytest.importorskip("triton")
import triton_interpreter

from sfumato.ops import triton as kernels

CONFIG: ModelConfig = tiny.tiny_config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_experts=4,
    expert_size=16,
    eos_ids=(),
    layers=(LayerConfig(16, 2, 6, Rope(10_000.0)), LayerConfig(32, 1, None, Rope(1e6, 0.5, 1.0, True))),
)
PROMPTS = [[3, 7, 2, 9, 4, 11, 8, 6, 30], [5, 12]]


WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static buffers": {"record": True},
    "a graph's stand-in": {"record": True, "capture": Tape(), "lag": 1},
}


def answers(model: Model, **ways: Any) -> list[tuple[list[int], int, str]]:
    options = Options(max_tokens=2 * CONFIG.canvas_length, max_steps=2, seed=5, confidence=0.0)
    run = Run(model, PROMPTS, options, settings=EngineSettings(**ways))
    done = sorted((event for event in run if isinstance(event, Done)), key=lambda event: event.row)
    return [(event.tokens, event.usage.steps, event.finish_reason) for event in done]


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_the_references(way: str) -> None:
    plain = tiny.tiny_model(CONFIG, seed=3, name="reference")
    with torch.device("meta"):
        model = Model(CONFIG, kernels.record())
    model.load_state_dict(plain.state_dict(), assign=True)
    assert answers(model.requires_grad_(False).eval().pack_(), **WAYS[way]) == answers(plain)


triton_interpreter.in_a_child(globals())
