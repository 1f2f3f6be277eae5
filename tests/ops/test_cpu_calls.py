"""ops/cpu/calls.py: every function of the library refuses what it does not take, before it touches any memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import endings
import pytest
import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops import cpu
from sfumato.ops.contract import BlockPass, JoinNorms, Layer
from sfumato.ops.cpu import build, calls
from sfumato.ops.lowrank import LanePair, Lanes, LaneSwitch, LowRank
from sfumato.ops.masks import Mask
from sfumato.quant import formats

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")

WIDTH, HEADS, GROUPS, HEAD, WORDS = 48, 4, 2, 16, 61


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask_of(
    rows: tuple[int, ...] = (1, 0), lengths: tuple[int, ...] = (9, 3), counts: tuple[int, ...] = (4, 2)
) -> Mask:
    return Mask([*rows], torch.tensor(rows), torch.tensor(lengths), torch.tensor(counts), 4, 6, 8, 20, 9)


def router() -> LowRank:
    """With factors, which the twenty tokens of every call here have."""
    switch = LaneSwitch()
    switch.lanes = Lanes.of([LanePair(0, 0)] * 2, 4, 6, "cpu")
    return LowRank(random(3, WIDTH), random(1, 4, WIDTH), random(1, 4, 3), switch)


def layer() -> Layer:
    def norm(size: int = WIDTH) -> Tensor:
        return random(size)

    def pack(*shape: int) -> Any:
        return cpu.pack(random(*shape))

    kv = GROUPS * HEAD
    return Layer(
        norm(), pack(HEADS * HEAD, WIDTH), pack(kv, WIDTH), pack(kv, WIDTH), pack(WIDTH, HEADS * HEAD), norm(HEAD),
        norm(HEAD), norm(), norm(), pack(40, WIDTH), pack(40, WIDTH), pack(WIDTH, 40), norm(), norm(), router(),
        random(3), norm(), pack(3, 48, WIDTH), pack(3, WIDTH, 24), norm(), norm(), 2, 1e-6,
    )  # fmt: skip


def run_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation once, with all that may be left out."""
    x, norm, norms = random(20, WIDTH), random(WIDTH), JoinNorms(*(random(WIDTH) for _ in range(3)))
    cpu.linear(x, cpu.pack(random(30, WIDTH)))
    cpu.rms_norm(x, norm, 1e-6)
    cpu.norm_add(x, x, norm, 1e-6)
    cpu.join(x, x, x, norms, 1e-6, random(20, 1))
    index, share = cpu.route(x, norm, router(), random(3), 2, 1e-6)
    cpu.experts(x, index, share, cpu.pack(random(3, 48, WIDTH)), cpu.pack(random(3, WIDTH, 24)))
    cpu.feed_forward(x, cpu.pack(random(40, WIDTH)), cpu.pack(random(40, WIDTH)), cpu.pack(random(WIDTH, 40)))
    q, new, ring, angle = (random(2, 10, HEADS, HEAD), random(2, 10, GROUPS, HEAD), random(3, 21, GROUPS, HEAD),
                           random(2, 10, HEAD))  # fmt: skip
    cpu.norm_rope(q, random(HEAD), 1e-6, angle, angle)
    cpu.attention(q, new, new, ring, ring, mask_of())
    x_BTD = random(2, 10, WIDTH)
    cpu.block(x_BTD, layer(), BlockPass(angle, angle, ring, ring, mask_of(), random(20, 1)))
    embed, some = random(WORDS, WIDTH), torch.rand(2, 10)
    read = cpu.read_out(x_BTD, embed, 30.0, torch.ones(2), some, None, (some < 0.5, torch.tensor([3, 60])))
    cpu.soft_embedding(read.logits_BLV, embed, torch.tensor(2.0), read.tiles)
    state = endings.canvases(1, True, True, torch.float32)
    result, soft = endings.pass_result([0, 1], 1, False, torch.float32)
    endings.concluded(monkeypatch, cpu.conclude_, state, [0, 1], result, soft)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[Any, ...], dict[str, int]]]:
    """A call of each function that it takes: its values, and its sizes."""
    every: dict[str, tuple[tuple[Any, ...], dict[str, int]]] = {}
    real = calls.call

    def record(name: str, *values: Any, **sizes: int) -> None:
        every[name] = values, dict(sizes)
        real(name, *values, **sizes)

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "call", record)
        run_all(patch)
    assert every.keys() == calls._TAKES.keys()
    return every


def spoiled(value: Any, like: calls._Part) -> dict[str, Any]:
    """The ways in which a tensor or a weight is not what it must be."""
    if not isinstance(value, Tensor):
        shape = value.shape
        wrong: dict[str, Any] = {} if like.is_optional else {"None": None}
        for axis in range(len(shape)):
            wrong[f"axis {axis}"] = value._replace(shape=(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]))
        return wrong
    other = torch.float64 if value.dtype != torch.float64 else torch.float32
    ways: dict[str, Any] = {"dtype": value.to(other), "half the bytes": value.to(torch.int16), "none": None}
    ways["device"] = value.to("meta")
    ways["dimensions"] = value[None]
    if value.numel() > 1:
        ways["gaps"] = torch.stack([value, value], -1)[..., 0]
        ways["expanded"] = value.flatten()[:1].expand(value.numel()).view(value.shape)
    for axis in range(value.dim()):
        longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
        ways[f"axis {axis}"] = longer
    return {name: one for name, one in ways.items() if not (one is None and like.is_optional)}


def test_every_function_checks_every_tensor(
    recorded: dict[str, tuple[tuple[Any, ...], dict[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with one value alone, its type, size, place or gaps, is an error; nothing is called."""
    count = 0
    for name, (values, sizes) in recorded.items():
        entry = calls._ENTRIES[name]
        monkeypatch.setattr(entry, "function", lambda *_: pytest.fail("the library was called"))
        free = sizes_of_one(entry) - sizes.keys()
        for at, part in enumerate(entry.parts):
            if not part.sizes or values[at] is None:
                continue
            for how, wrong in spoiled(values[at], part).items():
                if how.startswith("axis") and part.sizes[int(how[5:])][1] in free:
                    continue  # nothing else has this size: it may be any
                changed = (*values[:at], wrong, *values[at + 1 :])
                with pytest.raises(InputError) as error:
                    entry(changed, dict(sizes))
                assert "must be" in str(error.value) or "take float32 and bfloat16" in str(error.value), how
                count += 1
    assert count > 400


def sizes_of_one(entry: calls._LibraryFunction) -> set[str]:
    """Sizes that one tensor alone has."""
    names = [name for part in entry.parts for _, name in part.sizes]
    return {name for name in names if names.count(name) == 1}


def test_a_message_says_what_it_must_be() -> None:
    with pytest.raises(InputError) as error:
        cpu.soft_embedding(torch.zeros(1, 8, WORDS), random(WORDS, WIDTH).bfloat16(), torch.tensor(2.0))
    assert str(error.value) == (
        "embed in sf_soft_embedding must be a contiguous float32 tensor [V, D] on the CPU, not bfloat16 "
        "[61, 48] on cpu; convert it first"
    )
    with pytest.raises(InputError, match=r"take float32 and bfloat16, not torch.float16"):
        cpu.rms_norm(torch.zeros(2, 8).half(), None, 1e-6)


def test_float32_logits_beside_a_bfloat16_embedding_end_no_process() -> None:
    """They wrote behind the end of what was allocated: the process ended at the next allocation."""
    program = """
import torch
from sfumato.errors import InputError
from sfumato.ops import cpu
for _ in range(20):
    try:
        cpu.soft_embedding(torch.randn(4, 64, 4000), torch.randn(4000, 64).bfloat16(), torch.tensor(1.0))
    except InputError as error:
        said = str(error)
    kept = [torch.randn(1000) for _ in range(50)]
print(said)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "embed in sf_soft_embedding must be" in done.stdout, done.stderr


def test_numbers_that_say_where_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index, share = random(5, WIDTH), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    stacks = cpu.pack(random(3, 48, WIDTH)), cpu.pack(random(3, WIDTH, 24))
    for wrong in (3, -1, 2**40):
        index[4, 1] = wrong
        with pytest.raises(InputError, match="the index of an expert is outside"):
            cpu.experts(x, index, share, *stacks)
    with pytest.raises(InputError, match="more experts are asked for than there are"):
        cpu.route(x, random(WIDTH), random(3, WIDTH), random(3), 4, 1e-6)
    q, new, ring = random(2, 10, HEADS, HEAD), random(2, 10, GROUPS, HEAD), random(3, 21, GROUPS, HEAD)
    for mask in (
        mask_of(rows=(3, 0)), mask_of(rows=(-1, 0)), mask_of(lengths=(-1, 0)), mask_of(counts=(5, 0)),
        mask_of(counts=(0, -1)),
    ):  # fmt: skip
        with pytest.raises(InputError, match="a row of the pass is outside the cache's rows"):
            cpu.attention(q, new, new, ring, ring, mask)
        with pytest.raises(InputError, match="a row of the pass is outside the cache's rows"):
            angle = random(2, 10, HEAD)
            cpu.block(random(2, 10, WIDTH), layer(), BlockPass(angle, angle, ring, ring, mask, random(1)))
    with pytest.raises(InputError, match="k_ring in sf_attention must be"):
        cpu.attention(q, new, new, ring, ring, replace(mask_of(), ring=30))
    with pytest.raises(InputError, match="heads of queries are no multiple"):
        cpu.attention(random(2, 10, 3, HEAD), new, new, ring, ring, mask_of())
    result, soft = endings.pass_result([0, 1], 1, False, torch.float32)
    state = endings.canvases(1, True, True, torch.float32)
    for change in ("row", "pin"):
        if change == "pin":
            state.pin_XL[1, 3] = 10**9
        at = [0, 99] if change == "row" else [0, 1]
        with pytest.raises((InputError, IndexError)):
            endings.concluded(monkeypatch, cpu.conclude_, state, at, result, soft)


def test_weights_that_do_not_fit_x_are_refused() -> None:
    x, weight = random(3, 64), cpu.pack(random(40, 64))
    with pytest.raises(InputError, match=r"x has 64 inputs, and a weight is \[40, 32\]"):
        cpu.linear(x, weight, cpu.pack(formats.pack(random(40, 32), "int4-g32")))
    with pytest.raises(InputError, match=r"up in sf_feed_forward must be \[F, D\] with D = 64, F = 40"):
        cpu.feed_forward(x, weight, cpu.pack(random(32, 64)), cpu.pack(random(64, 40)))
    with pytest.raises(InputError, match=r"down in sf_experts must be \[E, D, F\]"):
        index, share = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
        cpu.experts(x, index, share, cpu.pack(random(3, 80, 64)), cpu.pack(random(2, 64, 40)))
