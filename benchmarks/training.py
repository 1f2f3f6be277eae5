"""What a step of training really holds, beside what `finetune --plan` says: at small sizes, on any machine.

    .venv/bin/python benchmarks/training.py           # plan and peak of each setup, and their quotient

The peak is that of live tensors (`measure.live`) on a processor and `torch.cuda.max_memory_allocated` on a GPU, of a
step behind a first one, so that the optimiser's states are there. `make gpu-more` has the true size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sfumato import ops
from sfumato.checkpoints.locate import NANO
from sfumato.measure.live import LiveBytes
from sfumato.measure.parts import random_config
from sfumato.measure.training import TrainingSetup, memory
from sfumato.measure.work import size
from sfumato.model.adapters import new_adapter
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, weights_of
from sfumato.model.trainable import trainable_
from sfumato.quant.apply import quantize_
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.loss import Corruption, Examples, losses, problem
from sfumato.training.objective import Objective

EVERY = ("attention", "dense", "experts")


def mid() -> ModelConfig:
    """Sixteen experts of which a token chooses four, and most of the weights in them."""
    base = random_config("tiny")
    kinds = [replace(base.layers[0], head_dim=64, kv_heads=2, window=window) for window in (64, 64, None)]
    return replace(
        base, vocab_size=2048, hidden_size=256, intermediate_size=384, num_heads=4, num_experts=16, top_k_experts=4,
        expert_size=128, layers=tuple(kinds), canvas_length=32, max_position=2048,
    )  # fmt: skip


SIZES: dict[str, Callable[[], ModelConfig]] = {
    "tiny": lambda: random_config("tiny"),
    "nano": lambda: ModelConfig.from_file(NANO / "config.json"),
    "mid": mid,
}
SMALL = TrainingSetup(precision="float32", is_checkpointed=False, tokens=96, is_attention_plain=False)
SETUPS = (
    ("tiny", replace(SMALL, rank=0, examples=3, is_checkpointed=True)),
    ("tiny", replace(SMALL, targets=EVERY, examples=3, repeats=2)),
    ("nano", replace(SMALL, targets=EVERY)),
    ("nano", replace(SMALL, is_accumulated=True)),
    ("mid", replace(SMALL, rank=0, is_accumulated=True)),
    ("mid", replace(SMALL, rank=0, precision="bfloat16")),
    ("mid", replace(SMALL, precision="bfloat16", targets=EVERY, quantize="int8", is_checkpointed=True)),
    ("mid", replace(SMALL, precision="bfloat16", targets=EVERY, quantize="int4")),
    ("mid", replace(SMALL, is_revised=True)),
    ("tiny", replace(SMALL, targets=EVERY, examples=3, is_revised=True, is_distilled=True)),
)


def small_model(config: ModelConfig, setup: TrainingSetup) -> Model:
    """Random weights on the processor, as the setup holds them."""
    model = Model(config, ops.load("fused")).init_(0).to(torch.float32 if setup.wide == 4 else torch.bfloat16)
    if setup.quantize is not None:
        quantize_(model, setup.quantize)
    return model


def peak(model: Model, setup: TrainingSetup, is_first: bool = False) -> int:
    """The most bytes held in a step of this model, which becomes trainable.

    `is_first`: of the very first one, before there are states of an optimiser."""
    if setup.rank:
        trainable_(model, new_adapter(model, setup.rank, 32.0, setup.targets))
    if setup.is_checkpointed:
        checkpoint_(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    call = _step(model, setup)
    if not is_first:
        call()
        optimizer.step()
        if not setup.is_accumulated:
            optimizer.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    with LiveBytes([*weights_of(model), *gradients, *states]) as held:
        call()
    return int(held.peak)


def _step(model: Model, setup: TrainingSetup) -> Callable[[], None]:
    """The passes of a step, forward and backward, on random tokens."""
    config, device, count = model.config, model.device, setup.examples
    length, eos = config.canvas_length, (config.eos_ids or (1,))[0]
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(config.vocab_size, (count, setup.tokens), generator=generator, device=device)
    whole = Examples(tokens, [setup.tokens] * count, [setup.tokens - length] * count, [False] * count)
    objective = Objective(revision_penalty=float(setup.is_revised), self_distillation=float(setup.is_distilled))
    steps = int(setup.is_distilled)
    dice = Corruption.draw(count * setup.repeats, length, config.vocab_size, generator, steps=steps)
    is_half = setup.narrow < setup.wide

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
            diffusion, encode = losses(model, problem(whole, dice, length, eos), objective)
        (diffusion + encode).backward()

    return step


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'size':6}{'peak':>10}{'plan':>10}{'quotient':>10}   setup")
    for name, setup in SETUPS:
        config = SIZES[name]()
        held, planned = peak(small_model(config, setup), setup), memory(config, setup).counted
        what = f"rank {setup.rank}" if setup.rank else "every weight"
        words = [what, setup.quantize or setup.precision, *(["checkpointed"] if setup.is_checkpointed else [])]
        words += [word for word, is_on in (("revised", setup.is_revised), ("distilled", setup.is_distilled)) if is_on]
        print(f"{name:6}{size(held):>10}{size(planned):>10}{planned / held:10.3f}   {', '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
