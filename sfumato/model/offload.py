"""Partial offload: as many layers' weights on the device as fit, the rest in host memory, streamed ahead of use.

A canvas uses nearly every expert of every layer, so no weight is used less than another, and what can be gained is to
copy while the device computes. `plan` spreads the layers that are streamed evenly among the resident ones, and moves
of a layer first its experts, nine tenths of its bytes. `attach_` hangs two hooks on each streamed block: before it
runs, its weights have arrived in one of a few buffers on the device; after it, the buffers are filled with the layers
that come next, the first ones again behind the last. On CUDA the copies run from pinned memory on a stream of their
own, ordered by events, and the host never waits; elsewhere they are plain copies.

Outside its buffer a streamed weight's attribute is the host's tensor, as a plain attribute: such a model runs, but is
neither saved nor trained, and a step of it cannot be recorded as a CUDA graph (`is_streamed`). One pass at a time. It
lacks experts that are computed on the host, several devices, and a way back.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sfumato.errors import CapacityError, InputError
from sfumato.model.network import Model
from sfumato.ops.contract import Matrix, Weight, tensors_of

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_OTHERS = tuple(f"self_attn.{side}_proj.weight" for side in "qkvo") + tuple(
    f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
)
"""What else of a layer is worth moving; norms, scalars and the router are small."""

_ALIGNED = 256
"""Bytes: where each tensor of a buffer begins, as the allocator would have it."""
_MOST_TENSORS = 6
"""Of one weight: data, scale, bias and factor of a packed one, and two low-rank factors beside it."""

Held = TypeVar("Held", bound=Matrix)
"""A weight of any form; what becomes of it has the same."""

# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where each weight lies. Bytes are those of the weights as they are packed."""

    device: torch.device
    layers: int
    streamed: tuple[int, ...]
    """Layers whose experts lie in host memory, ascending."""
    whole: tuple[int, ...]
    """Those of them whose other matrices do too."""
    device_bytes: int
    """Weights on the device, those beside the layers included."""
    host_bytes: int
    """Weights in host memory: what each pass streams."""
    buffer_bytes: int
    """Of one buffer."""
    buffers: int

    @property
    def total_bytes(self) -> int:
        """What weights and buffers take of the device."""
        return self.device_bytes + self.buffers * self.buffer_bytes

    def is_on_host(self, own_name: str) -> bool:
        """Whether this tensor of `Model.state_dict()` is streamed."""
        match = _LAYER.fullmatch(own_name)
        if match is None:
            return False
        layer, rest = int(match[1]), match[2]
        return (rest in _EXPERTS and layer in self.streamed) or (rest in _OTHERS and layer in self.whole)

    def device_of(self, own_name: str) -> torch.device:
        """Where a loader puts this tensor; what is on the host goes through `to_host`."""
        return torch.device("cpu") if self.is_on_host(own_name) else self.device

    def sentence(self, bandwidth: float | None = None) -> str:
        """The plan for a person; `bandwidth` in bytes a second, as `bandwidth` measures it."""
        if not self.streamed:
            return f"all {self.layers} layers ({_size(self.device_bytes)} of weights) on {self.device}"
        what = f"the experts of {len(self.streamed)}"
        if self.whole:
            what += f" and the other matrices of {len(self.whole)}"
        memory = "pinned host memory" if self.device.type == "cuda" else "host memory"
        text = (
            f"{self.layers - len(self.streamed)} of {self.layers} layers whole on {self.device} "
            f"({_size(self.device_bytes)} of weights, {_size(self.buffers * self.buffer_bytes)} of buffers), {what} "
            f"({_size(self.host_bytes)}) in {memory}; a step streams {_size(self.host_bytes)}"
        )
        if bandwidth is None:
            return text
        least = self.host_bytes / bandwidth * 1e3
        return f"{text}, at {_size(bandwidth)}/s measured: it takes at least {least:,.{0 if least >= 10 else 3}f} ms"


def plan(
    sizes: Mapping[str, int],
    limit_bytes: int,
    device: torch.device | str = "cuda",
    buffers: int = 2,
    reserve: int = 0,
) -> Placement:
    """The placement that streams least within `limit_bytes` of the device.

    `reserve` of them are kept free, for cache, logits and what a pass computes. `sizes` are bytes by own name, of all
    tensors, as they will be packed: `sizes_of` a model, or a loader's (`packed_bytes`). With `buffers` 1 a layer less
    is streamed, but no copy runs while a streamed layer is computed. CapacityError names the least limit that would
    do."""
    if buffers < 1:
        raise InputError(f"buffers is {buffers}; give at least 1, or 2 to copy while the device computes")
    place = torch.device(device)
    layers = 1 + max((int(match[1]) for name in sizes if (match := _LAYER.fullmatch(name))), default=-1)
    least: Placement | None = None
    steps = [(count, 0) for count in range(layers + 1)] + [(layers, count) for count in range(1, layers + 1)]
    for streamed, whole in steps:
        draft = _placement(sizes, place, layers, _spread(streamed, layers), _spread(whole, layers), buffers)
        if draft.total_bytes + reserve <= limit_bytes:
            return draft
        if least is None or draft.total_bytes < least.total_bytes:
            least = draft
    assert least is not None
    kept = f" and {_size(reserve)} beside them" if reserve else ""
    raise CapacityError(
        f"the memory limit is {_size(limit_bytes)}; {place} needs {_size(least.total_bytes)} for weights and buffers"
        f"{kept} where all that can be is streamed: give at least {least.total_bytes + reserve} bytes, or fewer bits "
        "a weight"
    )


def sizes_of(model: Model) -> dict[str, int]:
    """Bytes of each tensor of a model as it is, packed ones whole, by own name."""
    return {name: sum(part.nbytes for part in tensors_of(getattr(owner, leaf))) for name, owner, leaf in _places(model)}


def packed_bytes(shape: tuple[int, ...], dtype: torch.dtype, pack: Callable[[Tensor], Matrix]) -> int:
    """What a weight [O, I] or a stack [E, O, I] takes once it is packed: one matrix of zeros is packed to see.

    `pack` is `Ops.pack`, or a format and then that."""
    *stack, outputs, inputs = shape
    sample = torch.zeros(*[1 for _ in stack], outputs, inputs, dtype=dtype)
    return sum(part.nbytes for part in tensors_of(pack(sample))) * (stack[0] if stack else 1)


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """So many of the layers, as far apart as can be, the end of a pass and the beginning of the next included."""
    return tuple((2 * n + 1) * layers // (2 * count) for n in range(count))


def _placement(
    sizes: Mapping[str, int],
    device: torch.device,
    layers: int,
    streamed: tuple[int, ...],
    whole: tuple[int, ...],
    buffers: int,
) -> Placement:
    draft = Placement(device, layers, streamed, whole, 0, 0, 0, buffers if streamed else 0)
    on_host = {name: size for name, size in sizes.items() if draft.is_on_host(name)}
    needed = dict.fromkeys(streamed, 0)
    for name, size in on_host.items():
        needed[int(name.split(".")[1])] += size + _MOST_TENSORS * _ALIGNED
    host_bytes = sum(on_host.values())
    return dataclasses.replace(
        draft,
        device_bytes=sum(sizes.values()) - host_bytes,
        host_bytes=host_bytes,
        buffer_bytes=max(needed.values(), default=0),
    )


def bandwidth(device: torch.device | str, seconds: float = 0.2, count: int = 1 << 27) -> float:
    """Bytes a second from host memory (pinned, for CUDA) to the device.

    It is the fastest of copies of `count` bytes; where the device is the CPU, of copies within memory."""
    place = torch.device(device)
    source = torch.ones(count, dtype=torch.uint8, pin_memory=place.type == "cuda")
    target, until, fastest = torch.zeros(count, dtype=torch.uint8, device=place), time.perf_counter() + seconds, 0.0
    while not fastest or time.perf_counter() < until:
        _synchronise(place)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronise(place)
        fastest = max(fastest, count / (time.perf_counter() - began))
    return fastest


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---- the pass over a model ------------------------------------------------------------------------------------------


def offload_(
    model: Model, limit_bytes: int, device: torch.device | str | None = None, buffers: int = 2, reserve: int = 0
) -> Placement:
    """Place a packed model's weights within the limit, wherever they lie now, and stream what does not fit.

    `device` None: the model's own. CapacityError as `plan` and, with the model partly moved, where a memory is full."""
    _check_whole(model)
    placement = plan(sizes_of(model), limit_bytes, model.device if device is None else device, buffers, reserve)
    # Host first, so that a model that lies on the device makes room before anything comes.
    for name, owner, leaf in sorted(_places(model), key=lambda place: not placement.is_on_host(place[0])):
        if placement.is_on_host(name):
            _set(owner, leaf, to_host(getattr(owner, leaf), placement.device))
            continue
        try:
            _set(owner, leaf, _each(getattr(owner, leaf), lambda part: part.detach().to(placement.device)))
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{placement.device} is full at {name}, of {_size(placement.device_bytes)} of weights; lower the "
                "memory limit"
            ) from error
    attach_(model, placement)
    return placement


def to_host(value: Held, device: torch.device | str) -> Held:
    """A weight, packed or not, in host memory: pinned, if it is a CUDA device that will read it.

    What already is stays as it is, a mapped file too where nothing is to be pinned. CapacityError where the system
    gives no more memory."""
    is_for_cuda = torch.device(device).type == "cuda"

    def move(part: Tensor) -> Tensor:
        part = part.detach()
        if not is_for_cuda or part.is_pinned():
            return part.cpu()
        return part.cpu().contiguous().pin_memory()

    try:
        return _each(value, move)
    except RuntimeError as error:  # pinning fails with CUDA's own words
        raise CapacityError(
            f"host memory has no room to pin {_size(sum(part.nbytes for part in tensors_of(value)))} more: "
            f"{str(error).splitlines()[0]}; raise the memory limit, so that less is streamed"
        ) from error


@torch.inference_mode(False)  # a buffer that was made in inference mode could be filled only there
def attach_(model: Model, placement: Placement) -> None:
    """Stream the weights that this placement has on the host; all others are where they belong.

    A host weight is pinned here if it has to be and is not. InputError for a model that is streamed already,
    CapacityError where a layer's weights are larger than the plan had them."""
    _check_whole(model)
    if placement.layers != len(model.layers):
        raise InputError(f"the placement is for {placement.layers} layers and the model has {len(model.layers)}")
    if placement.streamed:
        try:
            feeder = Feeder(model, placement)
        except torch.OutOfMemoryError as error:
            need = _size(placement.buffers * placement.buffer_bytes)
            raise CapacityError(
                f"{placement.device} has no {need} left for buffers; lower the memory limit or free the device"
            ) from error
        for layer in placement.streamed:
            model.layers[layer].register_forward_pre_hook(feeder.before)
            model.layers[layer].register_forward_hook(feeder.after)
        vars(model)["is_streamed"] = True


def is_streamed(model: Model) -> bool:
    """Whether some weights arrive while a pass runs: the host takes part in it, so that no step can be recorded."""
    return "is_streamed" in vars(model)


def _check_whole(model: Model) -> None:
    if is_streamed(model):
        raise InputError("this model is streamed already; load it again to place it otherwise")


@dataclass
class _StreamedWeight:
    """A streamed weight: the attribute it is, its tensors on the host, and their places in each buffer."""

    owner: nn.Module
    leaf: str
    host: Matrix
    views: list[Matrix]


@dataclass
class _Buffer:
    number: int
    layer: int | None = None
    """Whose weights it holds, or will when they have arrived."""
    arrival: torch.cuda.Event | None = None
    """When the copy of these weights ends, where it runs beside the host."""


class Feeder:
    """The buffers of a streamed model, and which layer each holds.

    Its hooks keep two rules: an attribute is a view of a buffer only while that holds its layer, and a copy into a
    buffer waits for all that was computed before."""

    def __init__(self, model: Model, placement: Placement) -> None:
        device = placement.device
        self.order = placement.streamed
        self.link = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = [_Buffer(number) for number in range(placement.buffers)]
        memory = [torch.empty(placement.buffer_bytes, dtype=torch.uint8, device=device) for _ in self.buffers]
        if self.link is not None:
            for buffer in memory:
                buffer.record_stream(self.link)  # a copy may be under way when the model is dropped
        self.weights: dict[int, list[_StreamedWeight]] = {layer: [] for layer in self.order}
        ends = dict.fromkeys(self.order, 0)
        for name, owner, leaf in _places(model):
            if not placement.is_on_host(name):
                continue
            layer = int(name.split(".")[1])
            host, start = to_host(getattr(owner, leaf), device), ends[layer]
            ends[layer] = _end(start, host)
            if ends[layer] > placement.buffer_bytes:
                raise CapacityError(
                    f"{name} needs {ends[layer]} bytes of a buffer that was planned with {placement.buffer_bytes}; "
                    "plan with the sizes that the weights have once packed"
                )
            owner._parameters.pop(leaf, None)
            vars(owner)[leaf] = host
            self.weights[layer].append(
                _StreamedWeight(owner, leaf, host, [_view(host, buffer, start) for buffer in memory])
            )

    def before(self, block: nn.Module, inputs: Any) -> None:
        """The block's weights have arrived. They are under way, unless a pass broke off or this is the first."""
        layer = _index(block)
        buffer = self._holder(layer) or self._fill(layer, layer, [])
        _wait_for(buffer.arrival, self.link)
        for weight in self.weights[layer]:
            vars(weight.owner)[weight.leaf] = weight.views[buffer.number]

    def after(self, block: nn.Module, inputs: Any, output: Any) -> None:
        """The layers that come next are in the buffers or on their way, nearest first."""
        here = _index(block)
        at = self.order.index(here)
        coming = [self.order[(at + step) % len(self.order)] for step in range(1, len(self.buffers) + 1)]
        for layer in coming:
            if self._holder(layer) is None:
                self._fill(layer, here, coming)

    def _holder(self, layer: int) -> _Buffer | None:
        return next((one for one in self.buffers if one.layer == layer), None)

    def _fill(self, layer: int, here: int, kept: list[int]) -> _Buffer:
        """Begin to copy a layer's weights into the buffer whose own, seen from layer `here`, are needed last."""

        def distance(buffer: _Buffer) -> int:
            if buffer.layer is None:
                return len(self.order)
            return (self.order.index(buffer.layer) - self.order.index(here)) % len(self.order)

        buffer = max((one for one in self.buffers if one.layer not in kept), key=distance)
        for weight in [] if buffer.layer is None else self.weights[buffer.layer]:
            vars(weight.owner)[weight.leaf] = weight.host
        buffer.layer = None  # until the copy has begun: it may fail
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight in self.weights[layer]:
            pairs += zip(tensors_of(weight.views[buffer.number]), tensors_of(weight.host), strict=True)
        buffer.arrival = _begin(pairs, self.link)
        buffer.layer = layer
        return buffer


def _begin(pairs: list[tuple[Tensor, Tensor]], link: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Copy each second into its first, behind all that is computed by now; the event is when it has arrived."""
    if link is None:
        for view, host in pairs:
            view.copy_(host)
        return None
    link.wait_stream(torch.cuda.current_stream(link.device))
    with torch.cuda.stream(link):
        for view, host in pairs:
            view.copy_(host, non_blocking=True)
        event = torch.cuda.Event()
        event.record(link)
    return event


def _wait_for(arrival: torch.cuda.Event | None, link: torch.cuda.Stream | None) -> None:
    """What is computed from now on waits; the host does not."""
    if arrival is not None and link is not None:
        torch.cuda.current_stream(link.device).wait_event(arrival)


# ---- weights of every form ------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The (own name, module, attribute) of everything that has bytes: parameters, buffers, packed weights.

    Not the weights themselves, so that the memory of one that is moved is free at once."""
    places = []
    for path, module in model.named_modules():
        for leaf, value in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
            if isinstance(value, (Tensor, Weight)):
                places.append((f"{path}.{leaf}" if path else leaf, module, leaf))
    return places


def _each(value: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """The weight with each of its tensors changed."""
    return cast(Held, change(value) if isinstance(value, Tensor) else value.each(change))


def _set(owner: nn.Module, leaf: str, value: Matrix) -> None:
    old = owner._parameters.get(leaf)
    if old is not None and isinstance(value, Tensor):
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    elif leaf in owner._buffers and isinstance(value, Tensor):
        owner._buffers[leaf] = value
    else:
        vars(owner)[leaf] = value


def _end(start: int, value: Matrix) -> int:
    """Where a buffer goes on behind this weight."""
    return start + sum(-(-part.nbytes // _ALIGNED) * _ALIGNED for part in tensors_of(value))


def _view(value: Held, buffer: Tensor, start: int) -> Held:
    """This weight's twin in a buffer, from byte `start` on."""

    def take(part: Tensor) -> Tensor:
        nonlocal start
        twin = buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
        start = _end(start, part)
        return twin

    return _each(value, take)


def _index(block: nn.Module) -> int:
    index = block.index
    assert isinstance(index, int)
    return index


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:.0f} B"
