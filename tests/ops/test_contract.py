"""ops/contract.py: a weight that nothing here knows, a base with two factors, runs, is counted and is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import Tensor

from sfumato import ops
from sfumato.errors import CapacityError, InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import Experts, Model, products, replace_, weights_of
from sfumato.model.offload import offload_, plan, sizes_of
from sfumato.ops.contract import Matrix, Weight, dense, round_input, tensors_of
from sfumato.ops.cpu import weights as panels
from sfumato.ops.packed import Packed
from sfumato.quant.formats import pack


@dataclass(frozen=True, eq=False)
class Adapted:
    """A base, plain or in fewer bits, and a product of two factors that is added to it."""

    base: Matrix
    down: Tensor
    """[.., R, I]."""
    up: Tensor
    """[.., O, R]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)

    @property
    def stored(self) -> str | None:
        return None if isinstance(self.base, Tensor) else self.base.stored

    @property
    def product(self) -> str | None:
        return None if isinstance(self.base, Tensor) else self.base.product

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*tensors_of(self.base), self.down, self.up)

    def each(self, change: Callable[[Tensor], Tensor]) -> Adapted:
        base = change(self.base) if isinstance(self.base, Tensor) else self.base.each(change)
        return Adapted(base, change(self.down), change(self.up))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (dense(self.base, torch.float32).float() + self.up.float() @ self.down.float()).to(dtype)

    def round_input(self, x: Tensor) -> Tensor:
        return round_input(x, self.base)

    def __getitem__(self, expert: int) -> Adapted:
        return Adapted(self.base[expert], self.down[expert], self.up[expert])


RANK = 2
BASES = ["plain", "int4"]
NAMES = ["reference", "fused"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def adapted_model(base: str, name: str) -> Model:
    """A tiny model whose every product has two factors beside its weight."""
    model, draws = tiny.tiny_model(), torch.Generator().manual_seed(5)
    for owner, leaf in list(products(model)):
        weight = getattr(owner, leaf).detach()
        *stack, outputs, inputs = weight.shape
        down = torch.randn(*stack, RANK, inputs, generator=draws) / inputs**0.5
        up = torch.randn(*stack, outputs, RANK, generator=draws) / 10
        replace_(owner, leaf, Adapted(weight if base == "plain" else pack(weight, base), down, up))
    return model.use_(ops.load(name)).pack_()


def hidden_states(model: Model) -> list[Tensor]:
    draws, config = torch.Generator().manual_seed(3), model.config
    cache = KVCache.allocate(config, 2, 64, model.device, model.dtype)
    tokens = torch.randint(0, config.vocab_size, (2, 9), generator=draws)
    canvas = torch.randint(0, config.vocab_size, (2, config.canvas_length), generator=draws)
    with torch.inference_mode():
        return [model.encode(tokens, cache), model.denoise(canvas, cache)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", BASES)
def test_it_runs_as_the_weight_that_it_stands_for(base: str, name: str) -> None:
    model, merged = adapted_model(base, name), adapted_model(base, name)
    for owner, leaf in list(products(merged)):
        weight = getattr(owner, leaf)
        assert isinstance(weight, Adapted) and isinstance(weight, Weight)
        assert isinstance(weight.base, Tensor if base == "plain" else Packed)
        replace_(owner, leaf, weight.dense(torch.float32))
    for actual, expected in zip(hidden_states(model), hidden_states(merged), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    without = adapted_model(base, name)
    for owner, leaf in list(products(without)):
        replace_(owner, leaf, getattr(owner, leaf).base)
    assert not torch.allclose(hidden_states(model)[0], hidden_states(without)[0], atol=1e-2)


@pytest.mark.parametrize("base", BASES)
def test_all_its_tensors_are_counted(base: str) -> None:
    model = adapted_model(base, "fused")
    counted = {id(tensor) for tensor in weights_of(model)}
    names = {module: name for name, module in model.named_modules()}
    sizes = sizes_of(model)
    for owner, leaf in products(model):
        weight = getattr(owner, leaf)
        own = [weight.base] if isinstance(weight.base, Tensor) else [weight.base.data, weight.base.scale]
        assert {id(tensor) for tensor in (*own, weight.down, weight.up)} <= counted
        total = sum(tensor.nbytes for tensor in (*own, weight.down, weight.up))
        assert sizes[f"{names[owner]}.{leaf}"] == weight.nbytes == total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", BASES)
def test_all_its_tensors_are_moved(base: str, name: str) -> None:
    """Every tensor that a streamed layer is multiplied with lies in a buffer, and gives the same bits."""
    model, expected = adapted_model(base, name), hidden_states(adapted_model(base, name))
    with pytest.raises(CapacityError) as refused:
        plan(sizes_of(model), 1, "cpu")
    placement = offload_(model, int(str(refused.value).split("at least ")[1].split(" bytes")[0]))
    assert len(placement.streamed) == len(model.config.layers)
    held = [getattr(owner, leaf) for owner, leaf in products(model) if isinstance(owner, Experts)]
    on_host = {part.data_ptr() for weight in held for part in weight.tensors}
    used: list[Matrix] = []
    record = model.ops

    def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix, /) -> Tensor:
        used.extend((gate_up_EFD, down_EDF))
        return record.experts(x_ND, index_NJ, weight_NJ, gate_up_EFD, down_EDF)

    actual = hidden_states(model.use_(replace(record, experts=experts)))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert len(used) == 2 * len(held) and all(isinstance(weight, Adapted) for weight in used)
    assert not on_host & {part.data_ptr() for weight in used for part in tensors_of(weight)}


def test_an_implementation_that_cannot_take_it_says_so() -> None:
    weight = Adapted(torch.zeros(8, 64), torch.zeros(RANK, 64), torch.zeros(8, RANK))
    with pytest.raises(InputError, match="the cpu operations cannot take a Adapted; choose ops='fused'"):
        panels.pack(weight)
