"""ops/triton/norm.py: under the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_interpreter

from sfumato.ops import reference
from sfumato.ops.contract import JoinNorms
from sfumato.ops.triton import norm, tuning

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """A fast op's error is at most twice that of plain PyTorch, and a little rounding of the last place."""
    assert fast.dtype == plain.dtype and fast.shape == plain.shape
    allowed = 2 * (plain.float() - exact).abs().max() + 2e-6 * exact.abs().max()
    assert (fast.float() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2816), (2, 3, 48), (5, 7), (3, 5, 2, 16), (1, 9, 2, 512)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    x = randn(*shape, dtype=dtype) * 3
    weight = randn(shape[-1], dtype=dtype, seed=1) if weighted else None
    exact = reference.rms_norm(x.float(), None if weight is None else weight.float(), EPS)
    check(norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), exact)


@pytest.mark.parametrize("cut", [slice(0, 32), slice(32, 64), slice(None, None, 2)])
def test_rms_norm_of_a_slice(cut: slice) -> None:
    whole = randn(2, 3, 4, 64, dtype=torch.float32)
    assert torch.allclose(norm.rms_norm(whole[..., cut], None, EPS), reference.rms_norm(whole[..., cut], None, EPS))
    heads = whole.view(2, 3, 256)[..., 64:192].view(2, 3, 2, 64)
    assert torch.allclose(norm.rms_norm(heads, None, EPS), reference.rms_norm(heads, None, EPS))
    turned = whole.transpose(1, 2)
    assert torch.allclose(norm.rms_norm(turned, None, EPS), reference.rms_norm(turned, None, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(16, 256), (2, 512), (3, 24), (1, 8)])
def test_norm_rope(heads: int, size: int, dtype: torch.dtype) -> None:
    x, weight = randn(2, 3, heads, size, dtype=dtype), randn(size, dtype=dtype, seed=1)
    angle = randn(2, 3, size, dtype=torch.float32, seed=2) * 9
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    exact = reference.norm_rope(x.float(), weight.float(), EPS, cos.float(), sin.float())
    check(
        norm.norm_rope(x, weight, EPS, cos, sin),
        reference.norm_rope(x, weight, EPS, cos, sin),
        exact,
    )


def test_norm_rope_of_slices_and_shared_angles() -> None:
    x = randn(2, 5, 6 * 32, dtype=torch.float32)[..., 32:160].view(2, 5, 4, 32)
    angle = randn(1, 5, 32, dtype=torch.float32, seed=2).expand(2, 5, 32)
    weight = randn(32, dtype=torch.float32, seed=1)
    with tuning.using("norm_rope", VALUES=64):
        fast = norm.norm_rope(x, weight, EPS, angle.cos(), angle.sin())
    assert torch.allclose(fast, reference.norm_rope(x, weight, EPS, angle.cos(), angle.sin()), atol=1e-6)
    one = angle[:1].cos().expand(2, 5, 32)
    fast = norm.norm_rope(x, weight, EPS, one, angle.sin())
    assert torch.allclose(fast, reference.norm_rope(x, weight, EPS, one, angle.sin()), atol=1e-6)


def test_norm_rope_with_float32_angles_gives_float32() -> None:
    x, weight = randn(1, 2, 2, 16, dtype=torch.bfloat16), randn(16, dtype=torch.bfloat16, seed=1)
    cos, sin = randn(1, 2, 16, dtype=torch.float32, seed=2), randn(1, 2, 16, dtype=torch.float32, seed=3)
    fast, plain = norm.norm_rope(x, weight, EPS, cos, sin), reference.norm_rope(x, weight, EPS, cos, sin)
    assert fast.dtype == plain.dtype == torch.float32
    assert (fast - plain).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for the same numbers
def test_squares_that_overflow_are_no_zeros() -> None:
    x = randn(3, 48, dtype=torch.float32)
    x[1] = 1e30
    weight, angle = randn(48, dtype=torch.float32, seed=1), randn(1, 3, 48, dtype=torch.float32, seed=2)
    turned = norm.norm_rope(x.view(1, 3, 1, 48), weight, EPS, angle.cos(), angle.sin())[0, :, 0]
    added = norm.norm_add(torch.ones(3, 48), x, weight, EPS)
    for out in norm.rms_norm(x, weight, EPS), turned, added:
        assert torch.isfinite(out).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2816), (2, 3, 48), (7, 5)])
def test_norm_add(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    residual, x, weight = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape, shape[-1:])))
    exact = reference.norm_add(residual.float(), x.float(), weight.float(), EPS)
    check(norm.norm_add(residual, x, weight, EPS), reference.norm_add(residual, x, weight, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2816), (6, 48), (7, 5)])
@pytest.mark.parametrize("scales", ["one", "each"])
def test_join(shape: tuple[int, ...], dtype: torch.dtype, scales: str) -> None:
    parts = [randn(*shape, dtype=dtype, seed=i) for i in range(3)]
    norms = JoinNorms(*(randn(shape[-1], dtype=dtype, seed=3 + i) for i in range(3)))
    wide = JoinNorms(*(weight.float() for weight in norms))
    scale = randn(*((1,) if scales == "one" else (shape[0], 1)), dtype=dtype, seed=9)
    one, two, three = parts
    exact = reference.join(one.float(), two.float(), three.float(), wide, EPS, scale.float())
    check(norm.join(one, two, three, norms, EPS, scale), reference.join(one, two, three, norms, EPS, scale), exact)


def test_join_with_float32_scales_gives_float32() -> None:
    one, two, three = (randn(3, 16, dtype=torch.bfloat16, seed=i) for i in range(3))
    norms = JoinNorms(*(randn(16, dtype=torch.bfloat16, seed=3 + i) for i in range(3)))
    scale = randn(3, 1, dtype=torch.float32, seed=9)
    fast, plain = (ops.join(one, two, three, norms, EPS, scale) for ops in (norm, reference))
    assert fast.dtype == plain.dtype == torch.float32
    assert torch.allclose(fast, plain, rtol=2e-2, atol=2e-2)


def test_no_rows() -> None:
    none = torch.empty(0, 16)
    assert norm.rms_norm(none, None, EPS).shape == (0, 16)
    assert norm.norm_add(none, none, torch.ones(16), EPS).shape == (0, 16)


@pytest.mark.parametrize("values", [8, 64])
def test_a_row_does_not_depend_on_its_batch(values: int) -> None:
    x, weight = randn(9, 24, dtype=torch.float32), randn(24, dtype=torch.float32, seed=1)
    with tuning.using("rms_norm", VALUES=values):
        assert torch.equal(norm.rms_norm(x, weight, EPS)[4], norm.rms_norm(x[4:5], weight, EPS)[0])


triton_interpreter.in_a_child(globals())
