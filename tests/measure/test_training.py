"""measure/training.py: the plan against the peaks of real steps at three sizes, and the released model's figures."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from released_config import RELEASED as BY_HAND

from benchmarks.training import EVERY, SETUPS, SIZES, peak, small_model
from sfumato import ops
from sfumato.errors import InputError
from sfumato.measure.released import released
from sfumato.measure.training import GROUP, STATES, TrainingSetup, memory, trained_counts
from sfumato.model.adapters import new_adapter
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.training import vocabulary
from sfumato.training.optimizers import OPTIMIZERS


@pytest.mark.parametrize(("size", "setup"), SETUPS)
def test_the_plan_is_what_a_step_holds(size: str, setup: TrainingSetup) -> None:
    config = SIZES[size]()
    planned, held = memory(config, setup), peak(small_model(config, setup), setup)
    assert 0.95 * held <= planned.counted <= 1.2 * held
    always = planned.weights + planned.trained + planned.optimizer
    assert 0.85 * (held - always) <= planned.counted - always <= 1.4 * (held - always)


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
    config = SIZES["nano"]()
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
    # Checkpointed, the fullest moment of one example is in the encode pass, when those behind it are over.
    less = replace(less, is_checkpointed=False)
    assert memory(released(), replace(less, is_revised=True)).total > memory(released(), less).total
    assert set(asdict(memory(released(), less))) >= {"weights", "gradients", "optimizer", "kept", "working", "slack"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"rank": 99_999}, "the rank is 99999; give one from 1 to the model's width, 2816"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 10**9}, "max_tokens is 1000000000, and the model's context 262144; lower it"),
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
