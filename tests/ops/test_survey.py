"""ops/__init__.py: the survey of implementations says what `load` does, also of a format that has no kernels."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import ops
from sfumato.errors import InputError
from sfumato.ops.cpu import weights as cpu_weights
from sfumato.ops.packed import CODES, Code, Grid, Packed


def test_a_survey_says_what_load_does_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(dtype: torch.dtype | None, packed: Any = ()) -> str:
        warnings.warn("the compiler failed", stacklevel=2)
        return "the compiler failed"

    monkeypatch.setattr("sfumato.ops.cpu.obstacle", obstacle)
    standings = {one.name: one for one in ops.survey("cpu", torch.bfloat16)}
    assert standings["cpu"] == ("cpu", "the compiler failed", False)
    assert [name for name, one in standings.items() if one.is_auto] == ["fused"]


class _NewCode(Code):
    """A format without kernels: signed bytes, one scale an output."""

    name, bits = "int9", 8

    def unpack(self, packed: Packed) -> Tensor:
        return packed.data.float() * packed.scale[..., None]

    def grid(self, packed: Packed) -> Grid:
        raise NotImplementedError


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Packed:
    """A weight [8, 64] in a format that only `CODES` knows."""
    monkeypatch.setitem(CODES, "int9", _NewCode())
    codes = torch.arange(512).view(8, 64).remainder(255).sub(127).to(torch.int8)
    return Packed("int9", (8, 64), codes, torch.full((8,), 1 / 64), 64)


def test_a_new_format_runs_unpacked(unknown: Packed) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for name in ("reference", "fused"):
        (out,) = ops.load(name).linear(x, unknown)
        torch.testing.assert_close(out, x @ unknown.dense().mT)
    assert (unknown.stored, unknown.product) == ("int9", None)


def test_the_cpu_operations_refuse_a_new_format(unknown: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.ops.cpu.build.obstacle", lambda: None)
    standings = {one.name: one for one in ops.survey("cpu", torch.bfloat16, [unknown])}
    assert standings["cpu"] == ("cpu", "int9 weights", False) and standings["fused"].is_auto
    assert ops.load("auto", "cpu", torch.bfloat16, [unknown]).name == "fused"
    with pytest.raises(InputError, match="the cpu operations cannot take int9 weights; choose ops='fused'"):
        cpu_weights.pack(unknown)


def test_the_triton_operations_refuse_a_new_format(unknown: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sfumato.ops.triton import forms

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    kinds = "only int8, int4, fp8, nvfp4, mxfp4"
    standings = {one.name: one for one in ops.survey("cuda", torch.bfloat16, [unknown])}
    assert standings["triton"] == ("triton", kinds, False) and standings["fused"].is_auto
    assert ops.load("auto", "cuda", torch.bfloat16, [unknown]).name == "fused"
    with pytest.raises(InputError, match=f'this int9 weight: they take {kinds}; choose ops="fused"'):
        forms.pack(unknown)
