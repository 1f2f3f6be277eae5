"""Weights in fewer bits: how wrong they may be, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sfumato.events import InputError
from sfumato.ops import packed
from sfumato.ops.packed import KINDS, Packed, quantise, unpack


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype) * 0.03


@pytest.mark.parametrize("shape", [(5, 96), (1, 2), (3, 7, 64), (4, 2, 704)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_bounded(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = weights(*shape, dtype=dtype)
    form = quantise(weight, kind)
    back = unpack(form)
    assert form.shape == back.shape == shape and back.dtype == torch.float32
    error = (back - weight.float()).abs()
    largest = weight.float().abs().amax(-1, keepdim=True)
    if kind == "int8":
        assert (error <= largest / 254 * 1.0001).all()
    elif kind == "fp8":  # three bits of mantissa; below 2^-6 of the range's unit, steps of 2^-9
        assert (error <= torch.maximum(weight.float().abs() * 2**-4, largest / 448 * 2**-10) * 1.0001).all()
    else:  # of each group the mean square is at most what plain rounding guarantees
        groups = error.reshape(*shape[:-1], -1, form.group)
        top = weight.float().reshape(groups.shape).abs().amax(-1)
        assert (groups.pow(2).mean(-1).sqrt() <= top / 14 * 1.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layout(kind: str) -> None:
    form = quantise(weights(3, 6, 128), kind, group=32)
    expected = {
        "int8": (torch.int8, (3, 6, 128), torch.float32, (3, 6), 128),
        "fp8": (torch.float8_e4m3fn, (3, 6, 128), torch.float32, (3, 6), 128),
        "int4": (torch.uint8, (3, 6, 64), torch.float16, (3, 6, 4), 32),
    }[kind]
    assert (form.data.dtype, tuple(form.data.shape), form.scale.dtype, tuple(form.scale.shape), form.group) == expected
    assert form.bytes == form.data.nbytes + form.scale.nbytes
    assert form.device == torch.device("cpu")
    moved = form.to("cpu")
    assert isinstance(moved, Packed) and torch.equal(unpack(moved), unpack(form))


def test_int4_keeps_the_even_input_low() -> None:
    weight = torch.tensor([[7.0, -7.0] + [0.0] * 30])
    form = quantise(weight, "int4", group=32)
    assert form.data[0, 0].item() == (1 << 4) | 15
    assert (form.data[0, 1:] == 0x88).all()
    assert torch.equal(unpack(form), weight)


def test_int4_group_divides_the_inputs() -> None:
    assert quantise(weights(4, 704), "int4", group=128).group == 64
    assert quantise(weights(4, 2816), "int4", group=128).group == 128
    assert quantise(weights(4, 24), "int4").group == 8


def test_int4_is_better_than_plain_rounding() -> None:
    weight = weights(64, 256)
    groups = weight.reshape(64, 4, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / scale).round() * scale - groups
    assert (unpack(quantise(weight, "int4")) - weight).pow(2).mean() < plain.pow(2).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_any_magnitude(kind: str, factor: float) -> None:
    weight = weights(8, 64) * factor
    back = unpack(quantise(weight, kind))
    assert torch.isfinite(back).all()
    assert ((back - weight).double().norm() / weight.double().norm()).item() < (0.12 if kind == "int4" else 0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows(kind: str) -> None:
    weight = weights(4, 64)
    weight[1] = 0
    back = unpack(quantise(weight, kind))
    assert (back[1] == 0).all() and torch.isfinite(back).all()
    assert (unpack(quantise(torch.zeros(2, 3, 64), kind)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(3, 5, 64)
    whole = quantise(weight, kind)
    monkeypatch.setattr(packed, "_CHUNK", 200)
    parts = quantise(weight, kind)
    assert torch.equal(unpack(whole), unpack(parts)) and torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_unpack_rounds_once(kind: str) -> None:
    form = quantise(weights(8, 64), kind)
    assert torch.equal(unpack(form, torch.bfloat16), unpack(form).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind: str, bad: float) -> None:
    weight = weights(4, 64)
    weight[2, 3] = bad
    with pytest.raises(InputError, match="1 of the 256 weights are not finite"):
        quantise(weight, kind)


def test_refusals() -> None:
    with pytest.raises(InputError, match="int8, fp8, int4"):
        quantise(weights(4, 64), "int3")
    with pytest.raises(InputError, match="32, 64, 128"):
        quantise(weights(4, 64), "int4", group=48)
    with pytest.raises(InputError, match="7"):
        quantise(weights(4, 7), "int4")
    with pytest.raises(InputError, match="shape"):
        quantise(torch.zeros(4, 4, dtype=torch.int32), "int8")
    with pytest.raises(InputError, match="shape"):
        quantise(weights(64), "int8")
