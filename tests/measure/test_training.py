"""measure/training.py: the plan against the peaks of real steps at three sizes, and the released model's figures."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from released_config import RELEASED as BY_HAND
from tiny import random_config

from sfumato import ops
from sfumato.checkpoints.locate import NANO
from sfumato.errors import InputError
from sfumato.measure.live import LiveBytes
from sfumato.measure.released import released
from sfumato.measure.training import GROUP, STATES, TrainingSetup, memory, trained_counts
from sfumato.model.adapters import new_adapter, trainable_
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, weights_of
from sfumato.quant.apply import quantize_
from sfumato.training import vocabulary
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.loss import Corruption, Examples, losses, problem
from sfumato.training.optimizers import OPTIMIZERS

EVERY = ("attention", "dense", "experts")
TOLERANCE = 0.1
"""Of the peak, weights included; twice as much of what comes and goes, and four times where blocks keep their input
alone, so that less than the gradients of one block comes and goes."""


def mid() -> ModelConfig:
    """Sixteen experts of which a token chooses four, and most of the weights in them."""
    base = random_config(1)
    kinds = [replace(base.layers[0], head_dim=64, kv_heads=2, window=window) for window in (64, 64, None)]
    return replace(
        base, vocab_size=2048, hidden_size=256, intermediate_size=384, num_heads=4, num_experts=16, top_k_experts=4,
        expert_size=128, layers=tuple(kinds), canvas_length=32, max_position=2048,
    )  # fmt: skip


SIZES = {"tiny": random_config(4), "nano": ModelConfig.from_file(NANO / "config.json"), "mid": mid()}
FLOAT32 = TrainingSetup(precision="float32", is_checkpointed=False, tokens=96, is_attention_plain=False)


def peak(config: ModelConfig, setup: TrainingSetup) -> int:
    """The most bytes of tensors in a step that is not the first, or in a part of a batch that is not."""
    model = Model(config, ops.load("fused")).init_(0).to(torch.float32 if setup.wide == 4 else torch.bfloat16)
    if setup.quantize is not None:
        quantize_(model, setup.quantize)
    if setup.rank:
        trainable_(model, new_adapter(model, setup.rank, 32.0, setup.targets))
    if setup.is_checkpointed:
        checkpoint_(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    count, length = setup.examples, config.canvas_length
    tokens = torch.randint(config.vocab_size, (count, setup.tokens), generator=torch.Generator().manual_seed(0))
    whole = Examples(tokens, [setup.tokens] * count, [setup.tokens - length] * count, [False] * count)
    dice = Corruption.draw(count * setup.repeats, length, config.vocab_size, torch.Generator().manual_seed(0))

    def part() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.narrow < setup.wide, cache_enabled=False):
            both = losses(model, problem(whole, dice, length, config.eos_ids[0]))
        sum(both).backward()  # type: ignore[union-attr]

    part()
    optimizer.step()
    if not setup.is_accumulated:
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    with LiveBytes([*weights_of(model), *gradients, *states]) as held:
        part()
    return held.peak  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("tiny", {"rank": 0, "examples": 3, "is_checkpointed": True}),
        ("tiny", {"targets": EVERY, "examples": 3, "repeats": 2}),
        ("nano", {"targets": EVERY}),
        ("nano", {"is_accumulated": True}),
        ("mid", {"rank": 0, "is_accumulated": True}),
        ("mid", {"precision": "bfloat16", "rank": 0}),
        ("mid", {"precision": "bfloat16", "targets": EVERY, "quantize": "int8", "is_checkpointed": True}),
        ("mid", {"precision": "bfloat16", "targets": EVERY, "quantize": "int4"}),
    ],
)
def test_the_plan_is_what_a_step_holds(size: str, changes: dict[str, object]) -> None:
    config, setup = SIZES[size], replace(FLOAT32, **changes)  # type: ignore[arg-type]
    planned, held = memory(config, setup), peak(config, setup)
    assert planned.counted == pytest.approx(held, rel=TOLERANCE)
    always = planned.weights + planned.trained + planned.optimizer
    assert planned.counted - always == pytest.approx(held - always, rel=(4 if setup.is_checkpointed else 2) * TOLERANCE)


def test_the_released_model_with_all_factors_over_int4_fits_24_gb() -> None:
    """At 1,024 tokens, rank 16 on attention, dense and experts: with an optimiser of 8 bits, and not with one of 32."""
    setup = TrainingSetup(quantize="int4", targets=EVERY, optimizer="adamw8bit")
    needs = memory(released(), setup)
    assert needs.weights == pytest.approx(15.3e9, rel=0.01)
    assert needs.trained == needs.gradients == pytest.approx(4 * 494.6e6, rel=0.01)
    assert needs.fits(24) and needs.total == pytest.approx(22.2e9, rel=0.02)
    assert not memory(released(), replace(setup, optimizer="adamw")).fits(24)
    assert not memory(released(), replace(setup, is_checkpointed=False)).fits(24)
    assert memory(released(), replace(setup, optimizer="adamw")).fits(32)
    assert not memory(released(), TrainingSetup(rank=0)).fits(80)


def test_what_training_says_of_itself_is_known() -> None:
    assert vocabulary.GROUP == GROUP
    assert set(STATES) == set(OPTIMIZERS)


def test_the_config_that_comes_along_is_the_published_one() -> None:
    assert released() == ModelConfig.from_dict(BY_HAND)


def test_processes_share_what_is_plain() -> None:
    one = memory(released(), TrainingSetup())
    eight = memory(released(), TrainingSetup(ranks=8))
    assert eight.weights == pytest.approx(one.weights / 8) and eight.optimizer == pytest.approx(one.optimizer / 8)
    assert 0 < eight.gathered < one.weights / 4 and eight.total < one.total / 3
    packed = TrainingSetup(quantize="int4")
    assert memory(released(), replace(packed, ranks=8)).weights > 0.85 * memory(released(), packed).weights


def test_counts_are_those_of_the_adapter() -> None:
    config = SIZES["nano"]
    model = Model(config, ops.load("reference")).init_(0)
    own = new_adapter(model, 4, 8.0, EVERY).factors
    assert trained_counts(config, 4, EVERY) == {n: f.a.numel() + f.b.numel() for n, f in own.items()}
    assert sum(trained_counts(config, 0).values()) == sum(p.numel() for p in model.parameters())


def test_more_of_anything_needs_more() -> None:
    less = TrainingSetup(quantize="int4")
    for more in (
        {"tokens": 2048},
        {"examples": 2},
        {"repeats": 2},
        {"is_accumulated": True},
        {"rank": 32},
        {"is_checkpointed": False},
    ):
        assert memory(released(), replace(less, **more)).total > memory(released(), less).total
    assert set(asdict(memory(released(), less))) >= {"weights", "gradients", "optimizer", "kept", "working", "slack"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"ranks": 0}, "ranks is 0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose 'adamw'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"rank": 0, "quantize": "int4"}, "weights in int4 cannot be trained"),
        ({"quantize": "int3"}, "int3"),
        ({"targets": ("nose",)}, "'nose'"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        memory(released(), TrainingSetup(**changes))  # type: ignore[arg-type]
