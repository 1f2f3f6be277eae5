"""quant/formats.py and ops/packed.py: how wrong they may be, what their bytes mean, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.errors import InputError
from sfumato.ops.contract import dense, round_input
from sfumato.quant import formats
from sfumato.quant.formats import FORMATS, Format, Packed, error, pack

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype) * 0.03


def adversarial(rows: int, inputs: int) -> torch.Tensor:
    """Rows that formats trip over: zeros, one outlier, all alike, all negative, ties, huge, tiny, alternating signs."""
    w = weights(rows, inputs)
    w[0] = 0
    w[1, 3] = 50
    w[2] = 0.7
    w[3] = -w[3].abs()
    w[4] = torch.arange(inputs) % 15 - 7
    w[5] *= 1e6
    w[6] *= 1e-6
    w[7] = torch.where(torch.arange(inputs) % 2 == 0, 1.0, -1.0)
    return w


@pytest.mark.parametrize("shape", [(5, 96), (1, 32), (3, 7, 64), (4, 2, 704)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_bounded(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = weights(*shape, dtype=dtype)
    form = pack(weight, name)
    back = form.dense()
    assert form.shape == back.shape == shape and back.dtype == torch.float32
    wrong = (back - weight.float()).abs()
    largest = weight.float().abs().amax(-1, keepdim=True)
    if form.kind == "int8":
        assert (wrong <= largest / 254 * 1.0001).all()
    elif form.kind == "fp8":  # three bits of mantissa; below 2^-6 of the range's unit, steps of 2^-9
        unit = largest if name == "fp8" else weight.float().abs().amax()
        assert (wrong <= torch.maximum(weight.float().abs() * 2**-4, unit / 448 * 2**-10) * 1.0001).all()
    else:  # of each group the mean square is at most what plain rounding guarantees, and its scale's rounding
        groups = wrong.reshape(*shape[:-1], -1, form.group)
        top = weight.float().reshape(groups.shape).abs().amax(-1)
        most = {"int4": 1 / 14, "nvfp4": 1 / 6, "mxfp4": 1 / 4}[form.kind]
        assert (groups.pow(2).mean(-1).sqrt() <= top * most * 1.02).all()
    squares = ((back.double() - weight.double()).square().sum() / weight.double().square().sum()).sqrt()
    assert error(weight, form) == pytest.approx(float(squares))


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_is_what_the_format_says(name: str) -> None:
    form = Format.named(name)
    assert form.name == name
    for shape in ((3, 6, 128), (150, 160)):
        packed = pack(weights(*shape), name)
        assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.parts.items()} == form.parts(shape)
        assert packed.nbytes == sum(part.nbytes for part in packed.parts.values())
        moved = packed.to("cpu")
        assert isinstance(moved, Packed) and torch.equal(moved.dense(), packed.dense())
        if len(shape) == 3 and name != "fp8-block":
            assert torch.equal(packed[1].dense(), packed.dense()[1])


def test_int4_keeps_the_even_input_low() -> None:
    weight = torch.tensor([[7.0, -7.0] + [0.0] * 30])
    form = pack(weight, "int4-g32")
    assert form.data[0, 0].item() == (1 << 4) | 15
    assert (form.data[0, 1:] == 0x88).all()
    assert torch.equal(form.dense(), weight)


def test_int4_uses_the_code_that_one_side_has_more() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :16] = 8.0 * torch.tensor([1, 0.125, -0.25, 0.5]).repeat(4)
    form = pack(weight, "int4-g32")
    assert torch.equal(form.dense(), weight)  # 8 is no code; -8 with a scale below zero is
    assert form.scale.item() == -1.0


def test_int4_group_divides_the_inputs() -> None:
    assert pack(weights(4, 704), "int4-g128").group == 64
    assert pack(weights(4, 2816), "int4-g128").group == 128
    assert pack(weights(4, 24), "int4").group == 8


def test_int4_is_better_than_plain_rounding() -> None:
    weight = weights(64, 256)
    groups = weight.reshape(64, 4, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / scale).round() * scale - groups
    assert (pack(weight, "int4").dense() - weight).pow(2).mean() < 0.85 * plain.pow(2).mean()
    assert error(weight, pack(weight, "int4-asym")) < error(weight, pack(weight, "int4"))
    shifted = weight + 0.1
    assert error(shifted, pack(shifted, "int4-asym")) < 0.6 * error(shifted, pack(shifted, "int4"))


def test_importance_moves_the_error_where_it_costs_least() -> None:
    weight, importance = weights(32, 128), torch.ones(128)
    importance[:16] = 100
    plain, weighed = (pack(weight, "int4", counts).dense() - weight for counts in (None, importance))
    assert weighed[:, :16].norm() < 0.95 * plain[:, :16].norm()
    stack, each = weights(2, 32, 128), torch.stack([importance, torch.ones(128)])
    both = pack(stack, "int4", each)
    assert torch.equal(both[0].dense(), pack(stack[0], "int4", importance).dense())
    assert torch.equal(both[1].dense(), pack(stack[1], "int4").dense())


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_unpacks_as_defined_in_float64(seed: int) -> None:
    """Any bytes: e2m1 x e4m3 x float32, in the order in which float32 computes it: (code x scale) x factor."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (6, 32), generator=generator, dtype=torch.uint8)
    scale = torch.randint(127, (6, 4), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    factor = torch.rand(6, generator=generator) * 10.0 ** float(torch.randint(-6, 3, (1,), generator=generator))
    got = Packed("nvfp4", (6, 64), data, scale, 16, None, factor).dense()
    for row in range(6):
        for place in range(64):
            byte = int(data[row, place // 2])
            code = byte & 15 if place % 2 == 0 else byte >> 4
            value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7] * float(scale[row, place // 16])
            assert value == torch.tensor(value, dtype=torch.float32).item()  # exact so far: 1 + 3 bits of mantissa
            exact = value * float(factor[row])
            assert got[row, place].item() == torch.tensor(exact, dtype=torch.float64).float().item()


def test_mxfp4_unpacks_as_defined_in_float64() -> None:
    data = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    scale = torch.tensor([0, 1, 2, 64, 100, 126, 127, 128, 130, 150, 190, 200, 220, 250, 251, 252], dtype=torch.uint8)
    got = Packed("mxfp4", (16, 32), data, scale[:, None], 32).dense()
    for row in range(16):
        for place in range(32):
            byte = int(data[row, place // 2])
            code = byte & 15 if place % 2 == 0 else byte >> 4
            exact = (-1.0 if code & 8 else 1.0) * E2M1[code & 7] * 2.0 ** (int(scale[row]) - 127)
            assert got[row, place].item() == torch.tensor(exact, dtype=torch.float64).float().item()
    assert Packed("mxfp4", (1, 32), data[:1], torch.tensor([[255]], dtype=torch.uint8), 32).dense().isnan().all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_four_bit_floats_take_the_nearest_code(name: str) -> None:
    """For the scales that were chosen, no other code is nearer; a tie goes to the even one."""
    weight = adversarial(9, 64)
    packed = pack(weight, name)
    codes = torch.stack([packed.data & 15, packed.data >> 4], -1).reshape(9, -1, packed.group)
    one = pack(torch.zeros(9, 64), name)
    steps = []
    for code in range(16):
        every = torch.full_like(one.data, code | code << 4)
        steps.append(Packed(name, (9, 64), every, packed.scale, packed.group, None, packed.factor).dense())
    distance = (torch.stack(steps, -1) - weight[..., None]).abs()
    chosen = distance.gather(-1, codes.reshape(9, 64, 1).long())[..., 0]
    # One more rounding lies between the quotient that chose the code and this difference.
    assert (chosen <= distance.amin(-1) * (1 + 1e-5) + weight.abs() * 1e-6).all()
    exact = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4])
    if name == "mxfp4":
        assert pack(exact, name).dense()[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("name", FORMATS)
def test_adversarial_rows(name: str) -> None:
    weight = adversarial(9, 64)
    back = pack(weight, name).dense()
    assert torch.isfinite(back).all() and not back[0].any()
    if "tensor" in name or "block" in name or name == "nvfp4":
        return  # one scale, or one factor, for rows that differ by 10^12
    most = {"int8": 0.02, "int4": 0.16, "fp8": 0.04, "mxfp4": 0.2}[Format.named(name).kind]
    for row in (2, 3, 5, 6, 7):
        assert (back[row] - weight[row]).norm() <= most * weight[row].norm(), row


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_any_magnitude(name: str, factor: float) -> None:
    weight = weights(8, 64) * factor
    back = pack(weight, name).dense()
    assert torch.isfinite(back).all()
    most = 0.14 if "4" in Format.named(name).kind else 0.04
    assert ((back - weight).double().norm() / weight.double().norm()).item() < most


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows(name: str) -> None:
    weight = weights(4, 64)
    weight[1] = 0
    back = pack(weight, name).dense()
    assert (back[1] == 0).all() and torch.isfinite(back).all()
    assert (pack(torch.zeros(2, 3, 64), name).dense() == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(3, 5, 64)
    whole = pack(weight, name)
    monkeypatch.setattr(formats, "_CHUNK", 200)
    parts = pack(weight, name)
    assert torch.equal(whole.dense(), parts.dense())
    assert torch.equal(whole.scale.view(torch.uint8), parts.scale.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_unpack_rounds_once(name: str) -> None:
    form = pack(weights(8, 64), name)
    assert torch.equal(form.dense(torch.bfloat16), form.dense().bfloat16())
    assert torch.equal(dense(form, torch.bfloat16), form.dense().bfloat16())


def test_fp8_rounds_what_it_multiplies() -> None:
    x, weight = weights(5, 64), weights(7, 64)
    met = round_input(x, pack(weight, "fp8"))
    assert 0.01 < ((met - x).norm() / x.norm()).item() < 0.04
    assert torch.equal(round_input(met, pack(weight, "fp8")), met)  # what is rounded stays
    assert round_input(x, pack(weight, "int8")) is x and round_input(x, weight) is x
    assert not round_input(torch.zeros(2, 64), pack(weight, "fp8")).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_not_finite(name: str, bad: float) -> None:
    weight = weights(4, 64)
    weight[2, 3] = bad
    with pytest.raises(InputError, match="1 of the 256 weights are not finite"):
        pack(weight, name)


def test_refusals() -> None:
    with pytest.raises(InputError, match="no format 'int3'; choose one of int8, int4-g32"):
        pack(weights(4, 64), "int3")
    with pytest.raises(InputError, match="no format 'int4-g48'"):
        pack(weights(4, 64), "int4-g48")
    with pytest.raises(InputError, match="2 inputs together and this weight has 7; take int8 or fp8"):
        pack(weights(4, 7), "int4")
    with pytest.raises(InputError, match="16 inputs together and this weight has 40"):
        pack(weights(4, 40), "nvfp4")
    with pytest.raises(InputError, match="shape"):
        pack(torch.zeros(4, 4, dtype=torch.int32), "int8")
    with pytest.raises(InputError, match="shape"):
        pack(weights(64), "int8")


def test_bits_of_the_formats_at_the_released_sizes() -> None:
    bits = {}
    for name in FORMATS:
        parts = Format.named(name).parts((1408, 2816))
        bits[name] = sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts.values()) * 8 / (1408 * 2816)
    assert bits["int4"] == 4.25 and bits["int4-g32"] == 4.5 and bits["int4-g128"] == 4.125
    assert bits["int4-asym"] == 4.5 and bits["mxfp4"] == 4.25
    assert bits["int8"] == bits["fp8"] == pytest.approx(8.0114, abs=1e-4)
    assert bits["nvfp4"] == pytest.approx(4.5114, abs=1e-4)
