"""model/offload.py: the plan, the order of copies, and bit for bit the model without it.

The device is the CPU here, its buffers other memory than the host's. What CUDA adds, copies that arrive late, is
played by a link that lets them arrive when they are waited for and no earlier.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.save import save
from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import generate
from sfumato.errors import CapacityError, InputError
from sfumato.events import Done
from sfumato.model import offload
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.offload import Placement, attach_, is_streamed, offload_, packed_bytes, plan, sizes_of, to_host
from sfumato.ops import reference
from sfumato.ops.contract import Matrix
from sfumato.ops.packed import Packed
from sfumato.options import Options

SLACK = 6 * 256
"""What a buffer reserves beside each tensor, so that its parts can be aligned."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def limit_for(model: Model, streamed: int, buffers: int = 2) -> int:
    """The bytes that leave the experts of so many layers on the host."""
    sizes = sizes_of(model)
    experts = sum(size for name, size in sizes.items() if name.startswith("layers.0.experts."))
    room = buffers * (experts + 2 * SLACK) if streamed else 0
    return sum(sizes.values()) - streamed * experts + room


def blocks(model: Model) -> list[Any]:
    return list(model.layers)


def least_limit(model: Model) -> int:
    with pytest.raises(CapacityError) as refused:
        plan(sizes_of(model), 1, "cpu")
    return int(str(refused.value).split("at least ")[1].split(" bytes")[0])


WAYS = 5
"""Passes of the stack in one round of `run_all`."""


def run_all(model: Model, passes: int = 2) -> list[Tensor]:
    """Hidden states of every way through the stack, each one of its `WAYS`, several times over."""
    draws, config = torch.Generator().manual_seed(3), model.config
    outputs = []
    with torch.inference_mode():
        for _ in range(passes):
            cache = KVCache.allocate(config, 2, 64, model.device, model.dtype)
            tokens = torch.randint(0, config.vocab_size, (2, 9), generator=draws).to(model.device)
            canvas = torch.randint(0, config.vocab_size, (2, config.canvas_length), generator=draws).to(model.device)
            outputs.append(model.encode(tokens, cache))
            soft = model.denoise(canvas, cache)
            outputs += [soft, model.denoise(canvas, cache, soft)]
            outputs += model.encode_and_denoise(tokens[:, :4], [4, 3], canvas, cache)
            outputs.append(model.read(tokens[:, :3], [3, 1], canvas, cache, [1, 1]))
    return outputs


def all_equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- the plan -------------------------------------------------------------------------------------------------------


def even_sizes(layers: int = 30) -> dict[str, int]:
    """A model of round numbers: experts 1000 KB a layer, its other matrices 100, its norms 1; 5000 beside."""
    sizes = {"embed_tokens.weight": 4_000_000, "self_conditioning.up_proj.weight": 900_000, "norm.weight": 100_000}
    for n in range(layers):
        sizes |= {f"layers.{n}.experts.gate_up_proj": 667_000, f"layers.{n}.experts.down_proj": 333_000}
        sizes |= {f"layers.{n}.self_attn.q_proj.weight": 60_000, f"layers.{n}.mlp.up_proj.weight": 40_000}
        sizes |= {f"layers.{n}.input_layernorm.weight": 900, f"layers.{n}.encode_scalar": 100}
    return sizes


WHOLE = 5_000_000 + 30 * 1_101_000
BUFFER = 1_000_000 + 2 * SLACK


def test_what_fits_stays() -> None:
    placement = plan(even_sizes(), WHOLE, "cpu")
    assert (placement.streamed, placement.whole, placement.buffers, placement.host_bytes) == ((), (), 0, 0)
    assert placement.total_bytes == placement.device_bytes == WHOLE
    assert not any(map(placement.is_on_host, even_sizes()))
    assert placement.sentence() == "all 30 layers (38.0 MB of weights) on cpu"


def test_least_is_streamed() -> None:
    """One byte less than everything: two buffers cost what two layers bring, so three go."""
    assert len(plan(even_sizes(), WHOLE - 1, "cpu").streamed) == 3
    assert len(plan(even_sizes(), WHOLE - 1, "cpu", buffers=1).streamed) == 2
    for count in range(3, 31):
        limit = WHOLE - count * 1_000_000 + 2 * BUFFER
        at, below = plan(even_sizes(), limit, "cpu"), plan(even_sizes(), limit - 1, "cpu")
        assert len(at.streamed) == count and at.total_bytes == limit and not at.whole
        assert (len(below.streamed), len(below.whole)) == ((count + 1, 0) if count < 30 else (30, 3))
        assert at.host_bytes == count * 1_000_000 and at.device_bytes == WHOLE - at.host_bytes
        assert plan(even_sizes(), limit + 777, "cpu", reserve=777) == at


@pytest.mark.parametrize("count", range(3, 31))
def test_streamed_layers_lie_apart(count: int) -> None:
    """Round the pass, its end joined to its beginning, all gaps are within one of each other."""
    streamed = plan(even_sizes(), WHOLE - count * 1_000_000 + 2 * BUFFER, "cpu").streamed
    gaps = [after - before for before, after in zip(streamed, [*streamed[1:], streamed[0] + 30], strict=True)]
    assert len(streamed) == count and max(gaps) - min(gaps) <= 1 and streamed == tuple(sorted(set(streamed)))


def test_experts_go_before_other_matrices_and_norms_never() -> None:
    all_experts = WHOLE - 30 * 1_000_000 + 2 * BUFFER
    placement = plan(even_sizes(), all_experts - 600_000, "cpu")
    assert len(placement.streamed) == 30 and 0 < len(placement.whole) < 30
    place = placement.whole[0]
    on_host = {name for name in even_sizes() if placement.is_on_host(name)}
    assert f"layers.{place}.self_attn.q_proj.weight" in on_host and f"layers.{place}.experts.down_proj" in on_host
    assert {name for name in on_host if "experts" not in name} == {
        f"layers.{n}.{rest}" for n in placement.whole for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight")
    }
    assert placement.host_bytes == sum(even_sizes()[name] for name in on_host)
    assert placement.device_of(f"layers.{place}.mlp.up_proj.weight") == torch.device("cpu")


def test_least_limit_is_named_and_does() -> None:
    least = 5_000_000 + 30 * 1000 + 2 * (1_100_000 + 4 * SLACK)
    with pytest.raises(CapacityError, match=f"give at least {least} bytes") as refused:
        plan(even_sizes(), least - 1, "cpu")
    assert "the memory limit is 7.2 MB" in str(refused.value)
    assert len(plan(even_sizes(), least, "cpu").whole) == 30
    with pytest.raises(CapacityError, match=f"give at least {least + 50} bytes"):
        plan(even_sizes(), least, "cpu", reserve=50)
    with pytest.raises(InputError, match="buffers is 0"):
        plan(even_sizes(), WHOLE, "cpu", buffers=0)


def test_device_of_a_cuda_plan_needs_no_cuda() -> None:
    placement = plan(even_sizes(), WHOLE - 9 * 1_000_000 + 2 * BUFFER, "cuda:0")
    on_host = [name for name in even_sizes() if placement.device_of(name) == torch.device("cpu")]
    assert len(on_host) == 18 and all(".experts." in name for name in on_host)
    assert placement.device_of("embed_tokens.weight") == torch.device("cuda:0")
    assert not placement.is_on_host("layers.99.experts.down_proj") and not placement.is_on_host("layers.1.experts.x")


def test_sentence() -> None:
    placement = Placement(
        torch.device("cuda:0"), 30, tuple(range(0, 27, 3)), (), 10_200_000_000, 4_300_000_000, 480_000_000, 2
    )
    assert placement.sentence(24e9) == (
        "21 of 30 layers whole on cuda:0 (10.2 GB of weights, 1.0 GB of buffers), the experts of 9 (4.3 GB) in pinned "
        "host memory; a step streams 4.3 GB, at 24.0 GB/s measured: it takes at least 179 ms"
    )
    deeper = dataclasses.replace(placement, streamed=tuple(range(30)), whole=(3, 10, 20))
    assert "the experts of 30 and the other matrices of 3 (4.3 GB)" in deeper.sentence()
    assert "measured" not in deeper.sentence()


@pytest.mark.parametrize("name", tiny.OPS)
def test_a_loader_can_know_the_sizes_before(name: str) -> None:
    """From shapes alone, what the packed model then takes."""
    model = tiny.tiny_model(name=name)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Model(model.config, model.ops).state_dict().items()}
    matrices = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj")
    sizes = {
        key: packed_bytes(shape, model.dtype, model.ops.pack) if set(key.split(".")) & set(matrices) else None
        for key, shape in shapes.items()
    }
    assert {key: size for key, size in sizes.items() if size is not None}.items() <= sizes_of(model).items()
    assert shapes.keys() == sizes_of(model).keys()


# ---- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("name", tiny.OPS)
def test_hidden_states_are_the_same(name: str, buffers: int) -> None:
    config = tiny.random_config(2, layers=tiny.tiny_config().layers * 2)
    expected = run_all(tiny.tiny_model(config, name=name))
    for streamed in (0, buffers + 1, 8):
        model = tiny.tiny_model(config, name=name)
        placement = offload_(model, limit_for(model, streamed, buffers), buffers=buffers)
        assert len(placement.streamed) == streamed and is_streamed(model) is bool(streamed)
        assert all_equal(run_all(model), expected)
    model = tiny.tiny_model(config, name=name)
    placement = offload_(model, least_limit(model))
    assert len(placement.whole) == 8
    assert all_equal(run_all(model), expected)


@pytest.mark.parametrize("name", tiny.OPS)
def test_the_engine_writes_the_same(name: str) -> None:
    """nano, two puzzles' worth of prompt in one batch; also the autoregressive mode, whose passes are one token."""

    def answers(model: Model) -> list[tuple[list[int], int]]:
        prompts = [[2, *range(20, 60)], [2, *range(90, 101)]]
        events = list(generate(model, prompts, Options(max_tokens=100, max_steps=4, seed=5)))
        events += generate(model, prompts[1:], Options(max_tokens=4, mode="autoregressive", temperature=0.0))
        return [(event.tokens, event.usage.passes) for event in events if isinstance(event, Done)]

    expected = answers(load("nano", replace(PLAIN, ops=name)))
    assert len(expected) == 3 and all(tokens for tokens, _ in expected)
    for streamed in (3, 8, None):
        model = load("nano", replace(PLAIN, ops=name))
        placement = offload_(model, least_limit(model) if streamed is None else limit_for(model, streamed))
        assert len(placement.streamed) == (streamed or 8) and bool(placement.whole) is (streamed is None)
        assert answers(model) == expected


def pack_all_parts(weight: Matrix) -> Packed:
    """A packed weight that has every part there is."""
    assert isinstance(weight, Tensor)
    scale = weight.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(weight / scale + 127).to(torch.uint8)
    return Packed(
        "int8", tuple(weight.shape), codes, scale, weight.shape[-1], -127 * scale, torch.full(weight.shape[:-1], 1.1)
    )


def test_packed_weights_travel_whole() -> None:
    def packed_model() -> Model:
        model = tiny.tiny_model()
        return model.use_(dataclasses.replace(reference.OPS, pack=pack_all_parts)).pack_()

    expected = run_all(packed_model())
    model = packed_model()
    assert isinstance(blocks(model)[1].experts.down_proj, Packed)
    assert sizes_of(model)["layers.1.experts.down_proj"] == blocks(model)[1].experts.down_proj.nbytes
    offload_(model, least_limit(model))
    assert all_equal(run_all(model), expected)
    held = blocks(model)[1].experts.down_proj
    assert isinstance(held, Packed) and held.shape == (5, 24, 12) and held.kind == "int8"


def test_weights_of_a_mapped_file(tmp_path: Any) -> None:
    """A loader leaves on the host what the plan says, mapped as it lies; `attach_` takes it from there."""
    expected = run_all(tiny.tiny_model())
    model = tiny.tiny_model()
    placement = plan(sizes_of(model), limit_for(model, 3), "cpu")
    mapped = {}
    for name, parameter in list(model.named_parameters()):
        if placement.is_on_host(name):
            file = tmp_path / name
            file.write_bytes(parameter.detach().numpy().tobytes())
            mapped[name] = torch.from_file(str(file), shared=False, size=parameter.numel()).view(parameter.shape)
            parameter.data = mapped[name]
    assert len(mapped) == 6
    attach_(model, placement)
    layer = placement.streamed[0]
    held = blocks(model)[layer].experts.down_proj
    assert held.data_ptr() == mapped[f"layers.{layer}.experts.down_proj"].data_ptr(), "copied instead of mapped"
    assert all_equal(run_all(model), expected)


# ---- who copies what, and when --------------------------------------------------------------------------------------


class LateLink:
    """Copies that arrive when they are waited for and not before; until then their places hold what is no number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[list[tuple[Tensor, Tensor]]] = []
        self.waited = 0
        monkeypatch.setattr(offload, "_begin", self.begin)
        monkeypatch.setattr(offload, "_wait_for", self.wait_for)

    def begin(self, pairs: list[tuple[Tensor, Tensor]], link: object) -> list[tuple[Tensor, Tensor]]:
        for view, _ in pairs:
            view.fill_(float("nan"))
        self.began.append(pairs)
        return pairs

    def wait_for(self, pairs: list[tuple[Tensor, Tensor]], link: object) -> None:
        self.waited += 1
        for view, host in pairs:
            view.copy_(host)


@pytest.mark.parametrize("buffers", [1, 2])
def test_copies_run_ahead_and_none_is_read_too_soon_or_overwritten(
    monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    config = tiny.tiny_config(layers=tiny.tiny_config().layers * 2)
    model, expected = tiny.tiny_model(config), run_all(tiny.tiny_model(config), passes=3)
    plain = tiny.tiny_model(config)
    layer_of = {block.experts.down_proj.data_ptr(): block.index for block in blocks(model)}
    link = LateLink(monkeypatch)
    placement = offload_(model, limit_for(model, 4, buffers), buffers=buffers)
    order = list(placement.streamed)
    ran: list[tuple[int, int]] = []
    for block in blocks(model):  # behind the feeder's own hook
        block.register_forward_pre_hook(lambda block, _: ran.append((block.index, len(link.began))))
    assert all_equal(run_all(model, passes=3), expected)
    started = [next(layer_of[p] for _, host in pairs if (p := host.data_ptr()) in layer_of) for pairs in link.began]
    passes = 3 * WAYS
    # Each pass streams each layer once, in order, and at the end those that the next pass begins with are on their way.
    assert started == (order * (passes + 1))[: passes * len(order) + buffers]
    # When a block runs, behind the first pass's first, every buffer but its own is being filled with what follows.
    streamed = [count for layer, count in ran if layer in order]
    assert streamed == [1, *range(1 + buffers, passes * len(order) + buffers)]
    assert link.waited == passes * len(order)
    for ours, theirs in zip(blocks(model), blocks(plain), strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)


def test_buffers_are_reused_and_residents_stay_where_they_are() -> None:
    model = tiny.tiny_model()
    resident = {name: value.data_ptr() for name, value in model.named_parameters() if "experts" not in name}
    placement = offload_(model, limit_for(model, 3))
    assert placement.total_bytes == limit_for(model, 3) and len(placement.streamed) == 3
    calls: list[int] = []
    host = {n: blocks(model)[n].experts.down_proj.data_ptr() for n in placement.streamed}
    for n in placement.streamed:  # behind the feeder's own hook
        blocks(model)[n].register_forward_pre_hook(lambda block, _: calls.append(block.experts.down_proj.data_ptr()))
    run_all(model)
    assert len(calls) == 2 * WAYS * 3 and len(set(calls)) == 2, "two buffers, whoever comes"
    assert not set(calls) & set(host.values())
    assert all(one != two for one, two in pairwise(calls)), "taken in turns"
    assert {name: value.data_ptr() for name, value in model.named_parameters() if "experts" not in name} == resident
    # Of three layers one is in neither buffer: its attribute is the host's tensor again.
    now = {n: blocks(model)[n].experts.down_proj.data_ptr() for n in placement.streamed}
    assert sum(now[n] == host[n] for n in now) >= 1


def test_on_cuda_a_copy_stands_between_what_was_computed_and_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `_begin` and `_wait_for` ask of CUDA, in which order; a GPU's own test is below."""
    log: list[tuple[object, ...]] = []

    class Link:
        device = torch.device("cpu")

        def wait_stream(self, other: object) -> None:
            log.append(("copies wait for", other))

    class Current:
        def wait_event(self, event: object) -> None:
            log.append(("computing waits for", event))

    class Event:
        def record(self, stream: object) -> None:
            log.append(("event on", stream))

    class View:
        def copy_(self, host: object, non_blocking: bool) -> None:
            log.append(("copy", host, non_blocking))

    current, link = Current(), Link()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def on(stream: object) -> nullcontext[None]:
        log.append(("on", stream))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", on)
    pairs: Any = [(View(), "data"), (View(), "scale")]
    event = offload._begin(pairs, link)  # type: ignore[arg-type]
    offload._wait_for(event, link)  # type: ignore[arg-type]
    copies = [("copy", "data", True), ("copy", "scale", True)]
    assert log[:-1] == [("copies wait for", current), ("on", link), *copies, ("event on", link)]
    assert log[-1] == ("computing waits for", event)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_pass_does_no_harm(monkeypatch: pytest.MonkeyPatch, late: bool, buffers: int) -> None:
    config = tiny.tiny_config(layers=tiny.tiny_config().layers * 2)
    expected = run_all(tiny.tiny_model(config))
    model = tiny.tiny_model(config)
    if late:
        LateLink(monkeypatch)
    placement = offload_(model, limit_for(model, 6, buffers), buffers=buffers)
    assert len(placement.streamed) == 6
    for n in (0, 3, 4, 7, 1):
        experts = blocks(model)[n].experts
        forward = experts.forward

        def stop(*_: object) -> Tensor:
            raise KeyboardInterrupt

        experts.forward = stop
        with pytest.raises(KeyboardInterrupt):
            run_all(model)
        experts.forward = forward
        assert all_equal(run_all(model, passes=1), expected[: WAYS + 1])
    assert all_equal(run_all(model), expected)


def test_a_copy_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = run_all(tiny.tiny_model()), tiny.tiny_model()
    offload_(model, limit_for(model, 4))
    begin, count = offload._begin, 0

    def fails(pairs: list[tuple[Tensor, Tensor]], link: Any) -> Any:
        nonlocal count
        count += 1
        if count in (1, 9):
            pairs[0][0].fill_(float("nan"))
            raise RuntimeError("the link broke")
        return begin(pairs, link)

    monkeypatch.setattr(offload, "_begin", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the link broke"):
            run_all(model)
    assert all_equal(run_all(model), expected)


# ---- around it ------------------------------------------------------------------------------------------------------


def test_a_streamed_model_is_not_placed_again() -> None:
    model = tiny.tiny_model()
    placement = offload_(model, limit_for(model, 3))
    for again in (lambda: offload_(model, 10**9), lambda: attach_(model, placement)):
        with pytest.raises(InputError, match="streamed already"):
            again()
    with pytest.raises(InputError, match="for 4 layers and the model has 1"):
        attach_(tiny.tiny_model(tiny.tiny_config(layers=tiny.tiny_config().layers[1:2])), placement)


def test_sizes_that_were_wrong_are_found_before_a_pass() -> None:
    model = tiny.tiny_model()
    wrong = {name: size // 2 if "experts" in name else size for name, size in sizes_of(model).items()}
    placement = plan(wrong, sum(wrong.values()) - 1, "cpu")
    placement = dataclasses.replace(placement, buffer_bytes=placement.buffer_bytes - 4 * SLACK)
    with pytest.raises(CapacityError, match="of a buffer that was planned with"):
        attach_(tiny.tiny_model(), placement)


def test_a_streamed_model_is_not_saved(tmp_path: Any) -> None:
    model = tiny.tiny_model()
    offload_(model, limit_for(model, 3))
    with pytest.raises(InputError, match="is not as the released layout has it"):
        save(model, tmp_path / "saved")


def test_all_stays_usable_where_inference_mode_was_on() -> None:
    expected, model = run_all(tiny.tiny_model()), tiny.tiny_model()
    with torch.inference_mode():
        offload_(model, limit_for(model, 3))
    with torch.no_grad():
        cache = KVCache.allocate(model.config, 2, 64, model.device, model.dtype)
        tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
        assert torch.equal(model.encode(tokens, cache), expected[0])


def test_a_dropped_model_leaves_no_buffer() -> None:
    model = tiny.tiny_model()
    offload_(model, limit_for(model, 3))
    run_all(model, passes=1)
    held = weakref.ref(blocks(model)[0])
    del model
    gc.collect()
    assert held() is None


def test_to_host_keeps_what_is_there() -> None:
    tensor = torch.randn(3, 4)
    assert to_host(torch.nn.Parameter(tensor), "cpu").data_ptr() == tensor.data_ptr()
    assert type(to_host(torch.nn.Parameter(tensor), "cpu")) is Tensor


def test_bandwidth_is_measured_in_a_moment() -> None:
    assert 1e8 < offload.bandwidth("cpu", seconds=0.05, count=1 << 22) < 1e13


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("buffers", [1, 2])
def test_cuda_streams_the_same_answers(buffers: int) -> None:
    """Layers large enough that copies take longer than launching a pass: a buffer read too soon would show. Two experts
    a token, so that the order in which the GPU adds them does not matter."""
    config = tiny.tiny_config(
        layers=tiny.tiny_config().layers * 2, hidden_size=256, intermediate_size=256, expert_size=512, num_experts=32
    )

    def model() -> Model:
        return tiny.tiny_model(config, name="fused").to("cuda", torch.bfloat16)

    expected, streamed = run_all(model(), passes=4), model()
    placement = offload_(streamed, limit_for(streamed, 6, buffers), buffers=buffers)
    held = blocks(streamed)[placement.streamed[0]].experts.down_proj
    assert held.is_pinned() and blocks(streamed)[0].self_attn.q_proj.weight.is_cuda
    assert all_equal(run_all(streamed, passes=4), expected)
    from_host = tiny.tiny_model(config, name="fused").to(torch.bfloat16)
    offload_(from_host, limit_for(from_host, 6, buffers), "cuda", buffers=buffers)
    assert from_host.device.type == "cuda" and all_equal(run_all(from_host, passes=4), expected)


@pytest.mark.gpu
def test_cuda_engine_writes_the_same() -> None:
    def answer(model: Model) -> list[int]:
        events = list(
            generate(
                model, [[2, *range(20, 60)]], Options(max_tokens=82, seed=5), settings=EngineSettings(record=False)
            )
        )
        return next(event.tokens for event in events if isinstance(event, Done))

    expected, model = answer(load("nano", replace(PLAIN, device="cuda"))), load("nano", replace(PLAIN, device="cuda"))
    offload_(model, limit_for(model, 5))
    assert answer(model) == expected
    assert offload.bandwidth("cuda") > 1e8
