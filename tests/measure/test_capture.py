"""measure/capture.py: what a CUDA graph would refuse of a step, found without a GPU: the checker's own rules, then
every kind of step of a thin model in the released pattern (30 layers, 128 experts) on meta tensors; and that
launches go to the model's device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.measure.capture import Variant, meta_model, meta_step, watch
from sfumato.ops import load, triton
from sfumato.quant import recipes

pytest.importorskip("triton")
SLIDING, FULL = tiny.THIN_SLIDING, tiny.THIN_FULL
THIN = tiny.THIN

X = torch.empty(4, 6, device="meta")
PLACES = torch.empty(4, dtype=torch.long, device="meta")
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor of host numbers": (lambda: torch.tensor([1.0, 2.0], device="meta"), "tensor brings numbers"),
    "a number that is read": (lambda: X.sum().item(), "item waits"),
    "numbers that are read": (lambda: X.tolist(), "tolist waits"),
    "a condition": (lambda: bool(X.sum() > 0), "__bool__ waits"),
    "a copy to the host": (lambda: X.cpu(), "cpu waits"),
    "a copy from the host": (lambda: torch.zeros(3).to("meta"), "tensors of the host and of the device"),
    "a copy in place": (lambda: torch.zeros(4, 6, device="meta").copy_(torch.zeros(4, 6)), "of the host and"),
    "rows of a list": (lambda: X[[0, 2]], "__getitem__ with a list"),
    "rows of a list, written": (lambda: X.__setitem__([0, 2], 1.0), "__setitem__ with a list"),
    "a mask": (lambda: X[X > 0], "index with a mask"),
    "where something is": (lambda: X.nonzero(), "nonzero reads"),
    "the distinct": (lambda: PLACES.unique(), "unique"),
    "counts": (lambda: torch.bincount(PLACES), "bincount reads"),
    "repeats": (lambda: PLACES.repeat_interleave(PLACES), "repeat_interleave reads"),
    "a generator": (lambda: torch.rand(3, device="meta"), "rand draws"),
    "a generator in place": (lambda: torch.empty(3, device="meta").normal_(), "normal_ draws"),
    "memory of the host": (lambda: (torch.zeros(3), X + 1), "zeros makes memory that is not of the device"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_capture_refuses(what: str) -> None:
    run, sentence = REFUSED[what]
    with torch.inference_mode():
        watched = watch(run).refusals
    assert any(sentence in refusal for refusal in watched), watched


def test_what_a_capture_takes() -> None:
    def run() -> Tensor:
        y = torch.empty_like(X).copy_(X)[1:, None].expand(-1, 2, -1)
        y = torch.where(y > 0, y, 0.5).sort(-1)[0].cumsum(-1) + torch.arange(6, device="meta")
        return y.index_select(0, torch.zeros(2, dtype=torch.long, device="meta"))

    with torch.inference_mode():
        watched = watch(run)
    assert not watched.refusals
    names = [node.name for node in watched.nodes]
    assert names == ["copy_", "gt", "where", "sort", "cumsum", "arange", "add", "zeros", "index_select"]
    assert list(watched.outside) == [X.untyped_storage()._cdata]


def test_a_refusal_names_the_line() -> None:
    model = meta_model(dataclasses.replace(THIN, layers=(SLIDING, FULL)), load("fused"), "")
    with torch.inference_mode():
        watched = watch(lambda: model.ops.experts(*experts_arguments(model))).refusals
    assert any(refusal.startswith("bincount reads") and "ops/fused.py:" in refusal for refusal in watched), watched


def experts_arguments(model: Any) -> list[Tensor]:
    x = torch.empty(8, THIN.hidden_size, dtype=torch.bfloat16, device="meta")
    index, weight = torch.empty(8, 8, dtype=torch.long, device="meta"), torch.empty(8, 8, device="meta")
    experts = model.layers[0].experts
    return [x, index, weight, experts.gate_up_proj, experts.down_proj]


RECIPES = ("", *recipes.RECIPES)
BOTH = (False, True)
FLAGS: list[dict[str, Any]] = [
    {"bans": bans, "has_pins": pins, "has_early": early} for bans, pins, early in product((0, 4), BOTH, BOTH)
]
NONE, ALL = FLAGS[0], FLAGS[-1]
VARIANTS = [
    *(Variant(recipe, rows, e, **f) for recipe, rows, e, f in product(RECIPES, (1, 16), BOTH, (NONE, ALL))),
    *(Variant("", rows, e, dtype=torch.float32, **ALL) for rows, e in product((1, 2), BOTH)),
    *(Variant(recipe, rows, True, rank=16, **ALL) for recipe, rows in (("int4", 1), ("fp8", 16))),
    *(Variant("int4", rows, rows > 1, has_further_rules=True, **f) for rows, f in product((1, 2), (NONE, ALL))),
    *(Variant("int4", rows, e, **f) for rows, e, f in product((1, 2, 3, 4, 8), BOTH, FLAGS)),
]


@pytest.mark.parametrize("rows", sorted({variant.rows for variant in VARIANTS}))
def test_no_step_does_what_a_capture_refuses(rows: int) -> None:
    ops = triton.record()
    for variant in (one for one in VARIANTS if one.rows == rows):
        stepped, refreshed = meta_step(THIN, ops, variant)
        assert not stepped.refusals, variant
        assert not refreshed.refusals, variant
        assert sum(node.is_kernel for node in stepped.nodes) > 30 * 8
        assert refreshed.nodes


# ---- devices --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`torch.cuda.device` and its current device without a GPU: a list whose last element is the current one."""
    stack = [0]

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        stack.append(which.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    yield stack


class On1(Tensor):
    """A meta tensor that claims to be on the second GPU."""

    device = torch.device("cuda", 1)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, int]] = []

    def launch(x: Tensor) -> None:
        launches.append((type(x).__name__, stack[-1]))

    def launch_second(_: None, x: Tensor) -> None:
        launch(x)

    guarded = triton.on_its_device(launch)
    with claimed(monkeypatch) as stack:
        x = torch.empty(4, device="meta")
        guarded(x.as_subclass(On1))
        guarded(x)
        triton.on_its_device(launch_second)(None, x.as_subclass(On1))
    assert launches == [("On1", 1), ("Tensor", 0), ("On1", 1)]
    assert stack == [0]


def test_each_operation_is_guarded() -> None:
    ops = triton.record()
    plain = {f.name for f in dataclasses.fields(ops) if callable(getattr(ops, f.name))} - {"pack"}
    assert {name for name in plain if not hasattr(getattr(ops, name), "__wrapped__")} == set()
    assert {"linear", "attention", "experts", "read_out", "soft_embedding"} <= plain


def test_rocm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    why = triton.obstacle(torch.device("cuda", 0))
    assert why is not None and "AMD's (ROCm)" in why
    from sfumato import ops

    assert ops._fastest(torch.device("cuda", 0), torch.bfloat16, ()) == "fused"
