"""model/adapters.py, trainable.py: an adapter beside weights, trained, merged and taken out: the same mathematics."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from adapter_files import are_same, random_adapter
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.model.adapters import TARGETS, Adapter, Adapters, merge_, new_adapter, targeted
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.trainable import TRAINED, trainable_, trained
from sfumato.ops.lowrank import LanePair
from sfumato.quant.apply import quantize_

PROMPT, CANVAS = torch.arange(6, 17)[None], torch.arange(20, 28)[None]


def logits(model: Model, *lanes: LanePair) -> Tensor:
    """Of encode and then denoise, [B, T + L, V], for one row a lane."""
    rows = max(1, len(lanes))
    cache = KVCache.allocate(model.config, rows, 64, dtype=model.dtype)
    cache.lanes[:] = lanes or cache.lanes
    encoded = model.encode(PROMPT.expand(rows, -1), cache)
    soft = torch.linspace(-1, 1, model.config.hidden_size).expand(rows, CANVAS.shape[1], -1)
    return model.logits(torch.cat([encoded, model.denoise(CANVAS.expand(rows, -1), cache, soft)], 1))


def test_targets_are_kinds_or_ends_of_names() -> None:
    model = tiny.tiny_model()
    counts = {target: len(targeted(model, (target,))) for target in TARGETS}
    assert counts == {"attention": 14, "dense": 12, "experts": 8, "router": 4, "self_conditioning": 3}
    assert len(targeted(model)) == sum(counts.values())
    assert len(targeted(model, ("q_proj",))) == 4 and len(targeted(model, ("mlp.down_proj",))) == 4
    assert list(targeted(model, ("layers.2.experts.down_proj",))) == ["layers.2.experts.down_proj"]
    for wrong in ("q", "embed_tokens", "layers", ""):
        with pytest.raises(InputError, match=rf"no weight {wrong!r} to adapt; targets are attention, dense"):
            targeted(model, ("attention", wrong))


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny.tiny_model()
    adapter = new_adapter(model, 4, 8.0, tuple(TARGETS))
    lanes = Adapters(model).load("new", adapter)
    assert torch.equal(logits(model, lanes), logits(tiny.tiny_model()))
    assert {own.scale for own in adapter.factors.values()} == {2.0}
    assert {own.scale for own in new_adapter(model, 4, 8.0, is_rs=True).factors.values()} == {4.0}
    assert are_same(new_adapter(model, 4, 8.0, seed=3), new_adapter(model, 4, 8.0, seed=3))
    with pytest.raises(InputError, match="rank is 0; give one from 1 to"):
        new_adapter(model, 0, 8.0)


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_rows_of_one_batch_have_the_text_of_each_alone(name: str) -> None:
    """Merged, beside the weights alone, and beside others: the same logits; one of them differs between the passes."""
    one, two, three = (random_adapter(tiny.tiny_model(), rank=rank, seed=rank) for rank in (1, 2, 3))
    model = tiny.tiny_model(name=name)
    bank = Adapters(model)
    lanes = [bank.load("one", one), bank.load("split", Adapter(two.factors, three.factors)), bank.load("two", two)]
    assert bank.names == ["one", "split", "two"] and len({*lanes[1]}) == 2
    together = logits(model, *lanes, LanePair())
    for row, adapter in ((0, one), (2, two)):
        merged = tiny.tiny_model(name=name)
        merge_(merged, adapter)
        assert torch.allclose(together[row], logits(merged)[0], atol=1e-4)
    for row, lane in enumerate(lanes):
        assert torch.allclose(together[row], logits(model, lane)[0], atol=1e-5)
    length = PROMPT.shape[1]
    assert torch.allclose(together[1, :length], together[2, :length], atol=1e-5)
    assert not torch.allclose(together[1, length:], together[2, length:], atol=1e-2)
    assert torch.allclose(together[3], logits(tiny.tiny_model(name=name))[0], atol=1e-5)
    for loaded in bank.names:
        bank.unload(loaded)
    assert all(isinstance(getattr(*place), Tensor) for place in targeted(model).values())


@pytest.mark.parametrize("name", tiny.OPS)
def test_what_is_unloaded_gives_its_memory_back(name: str) -> None:
    model = tiny.tiny_model(name=name)
    bank, small = Adapters(model), random_adapter(model, ("attention",), rank=2)
    lanes = bank.load("small", small)
    before, alone = bank.bytes, logits(model, lanes)
    bank.load("large", random_adapter(model, rank=12, seed=2))  # more weights, a larger rank, and more lanes
    for number in range(6):
        bank.load(str(number), random_adapter(model, ("attention",), rank=3, seed=number))
    in_use, whole = bank.get("large"), bank.bytes
    assert whole > 10 * before
    its_own = logits(model, in_use.lanes)
    for other in ("large", *map(str, range(6))):
        bank.unload(other)
    assert torch.equal(logits(model, in_use.lanes), its_own) and bank.bytes < whole  # lanes go, but not its own
    del in_use
    bank.settle()
    assert bank.bytes <= 2 * before and torch.allclose(logits(model, lanes), alone, atol=1e-5)
    again = bank.load("again", random_adapter(model, rank=12, seed=2))
    assert torch.allclose(logits(model, again), its_own, atol=1e-5)
    assert torch.allclose(logits(model, lanes), alone, atol=1e-5)
    bank.unload("again")
    bank.unload("small")
    assert bank.bytes == 0


def test_what_does_not_fit_is_refused() -> None:
    model, other = tiny.tiny_model(), tiny.tiny_model(tiny.tiny_config(hidden_size=32))
    adapter = dataclasses.replace(random_adapter(other), source="x (made for y)")
    for refused in (Adapters(model).load, lambda name, adapter: merge_(model, adapter)):
        with pytest.raises(
            InputError, match=r"x \(made for y\) has factors .* where this model needs .* another model"
        ):
            refused("x", adapter)
    deep = Adapter({"layers.9.mlp.up_proj.weight": adapter.factors["layers.0.mlp.up_proj.weight"]})
    with pytest.raises(InputError, match=r"changes layers.9.mlp.up_proj.weight, which this model does not have"):
        deep.check(model)
    for name, shape, message in (
        ("norm.weight", (25,), r"replaces norm.weight by \[25\], where this model has \[24\]"),
        ("norm.bias", (24,), r"replaces norm.bias, which this model does not have"),
        ("layers.9.router.scale", (24,), r"replaces layers.9.router.scale, which this model does not have"),
        ("lm_head.weight", (61, 25), r"replaces lm_head.weight by \[61, 25\]"),
    ):
        with pytest.raises(InputError, match=message):
            Adapter({}, whole={name: torch.ones(shape)}).check(model)


# ---- merged ----------------------------------------------------------------------------------------------------------


def test_merged_in_fewer_bits_of_float_and_taken_out() -> None:
    """The sum is taken in float32 and rounded once; parameters stay parameters, buffers buffers."""
    model = tiny.tiny_model(name="fused").bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = random_adapter(model)
    adapter = Adapter(
        adapter.factors, whole={"norm.weight": torch.full((24,), 2.0), "layers.0.encode_scalar": torch.ones(1)}
    )
    unmerge = merge_(model, adapter)
    for name, tensor in model.state_dict().items():
        if name in adapter.factors:
            expected = (before[name].float() + adapter.factors[name].delta()).bfloat16()
        else:
            expected = adapter.whole.get(name, before[name]).bfloat16()
        assert torch.equal(tensor, expected), name
    unmerge()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_merged() -> None:
    adapter = random_adapter(tiny.tiny_model())
    packed = quantize_(tiny.tiny_model(tiny.tiny_config(), name="fused"), "int8")
    with pytest.raises(InputError, match=r"is not plain numbers, into which .* convert MODEL --adapter DIR"):
        merge_(packed, adapter)
    model = tiny.tiny_model()
    with pytest.raises(InputError, match=r"encode and denoise differently, which one weight cannot hold; serve it"):
        merge_(model, Adapter(adapter.factors, adapter.factors))


# ---- trained ---------------------------------------------------------------------------------------------------------


def loss_of(model: Model) -> Tensor:
    return logits(model, TRAINED).square().mean()


def test_training_factors_of_experts_is_dense_training_of_that_rank() -> None:
    """Five steps of both, from the same numbers: factors beside frozen experts, and experts that are W + scale bᵀ a."""
    start = random_adapter(tiny.tiny_model(), ("experts",), seed=4)
    model = trainable_(tiny.tiny_model(), start)
    optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    dense = tiny.tiny_model()
    base = {name: tensor.clone() for name, tensor in dense.named_parameters()}
    pairs = {name: (nn.Parameter(own.a.clone()), nn.Parameter(own.b.clone())) for name, own in start.factors.items()}
    other = torch.optim.AdamW([one for pair in pairs.values() for one in pair], lr=0.05)
    for _ in range(5):
        optimiser.zero_grad()
        one = loss_of(model)
        one.backward()
        optimiser.step()
        weights = {name: base[name] + start.factors[name].scale * b.mT @ a for name, (a, b) in pairs.items()}
        other.zero_grad()
        two: Any = torch.func.functional_call(
            _Lossy(dense), {f"model.{name}": own for name, own in weights.items()}, ()
        )
        two.backward()
        other.step()
        assert torch.allclose(one.detach(), two.detach(), rtol=1e-5)
    result = trained(model)
    assert not are_same(result, start)
    for name, (a, b) in pairs.items():
        assert torch.allclose(result.factors[name].a, a, atol=1e-4) and torch.allclose(
            result.factors[name].b, b, atol=1e-4
        )


class _Lossy(nn.Module):
    """The loss as a module's forward, for weights that are put in for one call."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return loss_of(self.model)


def test_what_was_trained_is_an_adapter_again() -> None:
    start = random_adapter(tiny.tiny_model())
    model = trainable_(tiny.tiny_model(), start)
    assert are_same(trained(model), start)
    assert {name.rpartition(".")[2] for name, one in model.named_parameters() if one.requires_grad} <= {
        *("a", "b", "gate_up_proj_a", "gate_up_proj_b", "down_proj_a", "down_proj_b"),
    }
    merged = tiny.tiny_model()
    merge_(merged, start)
    assert torch.allclose(logits(model, TRAINED), logits(merged), atol=1e-4)
    with pytest.raises(InputError, match="factors of its own for denoise, which cannot be trained further"):
        trainable_(tiny.tiny_model(), Adapter(start.factors, start.factors))
