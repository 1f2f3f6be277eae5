"""What a CUDA graph would hold of a function, and what it would refuse, found without a GPU.

The function runs under two modes of torch, on meta tensors that stand for those of a GPU or on ordinary ones. Each
operation on the device and each kernel is a node. Refused is what fails in a capture, or gives a wrong graph in
silence: numbers that come from the host, numbers that go there, shapes that hang on values, random generators, memory
that is not of the graph's pool. Refusals name the line.

    watched = watch(lambda: step_(...))
    assert not watched.refusals

`meta_step` makes a whole recorded step of any size, with weights in any recipe, of which nothing exists but shapes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, adaptable, products, replace_
from sfumato.ops.contract import Ops
from sfumato.ops.lowrank import LowRank
from sfumato.ops.packed import Packed
from sfumato.options import Options
from sfumato.quant.formats import Format
from sfumato.quant.recipes import named
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import Recorded, RecordedShape, Replay
from sfumato.sampling.rules import Rules

MAKES = frozenset("empty empty_like new_empty empty_strided new_empty_strided".split())
HOST = frozenset("item tolist cpu numpy __bool__ __int__ __float__ __index__ pin_memory".split())
"""Methods that wait for the device, or for the host."""
FROM_HOST = frozenset("tensor as_tensor from_numpy frombuffer asarray".split())
SHAPED = frozenset(
    "nonzero _local_scalar_dense is_nonzero equal masked_select unique _unique2 unique_consecutive unique_dim bincount "
    "repeat_interleave nonzero_numpy argwhere".split()
)
"""Operations whose result has a shape that only the device knows, or that read a number from it."""
RANDOM = frozenset(
    "rand randn randint randperm normal normal_ uniform_ random_ bernoulli bernoulli_ exponential_ multinomial "
    "rand_like randn_like randint_like native_dropout cauchy_ geometric_ log_normal_".split()
)


@dataclass(frozen=True)
class Node:
    """One node of a graph: an operation of torch, or a kernel with its grid and sizes."""

    name: str
    is_kernel: bool = False
    grid: tuple[int, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    standing: int = 0
    """Bytes of the tensors it takes that were there before: weights, the cache, the state."""
    passing: int = 0
    """Bytes of those that the graph itself makes."""
    launch: Any = field(default=None, repr=False)


@dataclass
class Watched:
    """What a graph of a function would hold, and what a capture would refuse."""

    nodes: list[Node] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    outside: dict[int, StorageWeakRef] = field(default_factory=dict)
    """Memory that is read or written and was there before: a graph is right for as long as all of it lives."""

    def refuse(self, what: str) -> None:
        """Note a refusal, with the line of the package that it comes from."""
        frames = [f for f in traceback.extract_stack() if "/sfumato/" in f.filename and "/measure/" not in f.filename]
        where = f"{frames[-1].filename.split('/sfumato/')[-1]}:{frames[-1].lineno}" if frames else "outside sfumato"
        self.refusals.append(f"{what} ({where})")


def watch(run: Callable[[], object], device: str = "meta") -> Watched:
    """Run this once under the modes, on tensors of this device.

    What is refused is noted, not raised; an error of torch's own is a refusal too."""
    watched = Watched()
    dispatch = _Dispatch(watched, device)
    with ExitStack() as stack:
        try:
            from sfumato.ops.triton.launches import noted
        except ImportError:
            pass
        else:
            stack.enter_context(noted(dispatch.launch))
        stack.enter_context(_Calls(watched))
        stack.enter_context(dispatch)
        try:
            run()
        except (RuntimeError, NotImplementedError) as error:
            watched.refuse(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return watched


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dictionaries, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


class _Dispatch(TorchDispatchMode):
    """What reaches the device."""

    def __init__(self, watched: Watched, device: str) -> None:
        TorchDispatchMode.__init__(self)
        self.watched, self.device = watched, device
        self._own: set[int] = set()
        self._held: list[Tensor] = []  # while this runs no address is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, before = func._schema.name.split("::")[1], [*tensors(args), *tensors(kwargs)]
        watched = self.watched
        if name in SHAPED or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            watched.refuse(f"{name} reads numbers from the device, or has a shape that hangs on them")
        if name in RANDOM:
            watched.refuse(f"{name} draws from a generator, which a graph repeats")
        if name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in tensors(args[1])):
            watched.refuse(f"{name} with a mask has a shape that hangs on values")
        if kwargs.get("pin_memory"):
            watched.refuse(f"{name} takes pinned memory of the host")
        out = func(*args, **kwargs)
        after = list(tensors(out))
        if len({x.device.type for x in (*before, *after)}) > 1:
            watched.refuse(f"{name} has tensors of the host and of the device")
        elif any(x.device.type != self.device for x in after):
            watched.refuse(f"{name} makes memory that is not of the device")
        known = {_address(x) for x in before}
        is_view = not func._schema.is_mutable and all(_address(x) in known for x in after)
        if after and name not in MAKES and not is_view:
            watched.nodes.append(Node(name))
        self._account(before, after)
        return out

    def launch(self, launch: Any) -> None:
        arguments = list(tensors(launch.arguments))
        self._account(arguments, [])
        each = {_address(x): x.nbytes for x in arguments}
        own = sum(size for address, size in each.items() if address in self._own)
        node = Node(launch.name, True, launch.grid, launch.sizes, sum(each.values()) - own, own, launch)
        self.watched.nodes.append(node)

    def _account(self, before: list[Tensor], after: list[Tensor]) -> None:
        known = {_address(x) for x in before}
        for x in before:
            if _address(x) not in self._own:
                self.watched.outside.setdefault(_address(x), StorageWeakRef(x.untyped_storage()))
        for x in after:
            if _address(x) not in known and _address(x) not in self.watched.outside:
                self._own.add(_address(x))
                self._held.append(x)


def _address(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


class _Calls(TorchFunctionMode):
    """What Python asks, which a dispatch mode does not see."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in HOST:
            self.watched.refuse(f"{name} waits for the device")
        elif name in FROM_HOST:
            self.watched.refuse(f"{name} brings numbers from the host")
        elif name in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                self.watched.refuse(f"{name} with a list brings numbers from the host")
        return func(*args, **(kwargs or {}))


# ---- a step of which nothing exists but shapes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Which step: how many rows, and what was decided for the recording."""

    recipe: str = ""
    """Empty: plain bfloat16."""
    rows: int = 1
    is_encoding: bool = False
    bans: int = 0
    has_pins: bool = False
    has_early: bool = False
    has_further_rules: bool = False
    context: int = 1024
    """Tokens that the cache has room for."""
    dtype: torch.dtype = torch.bfloat16
    rank: int = 0
    """Of the adapters beside every weight that may have some; 0: there are none."""
    lanes: int = 2


def meta_model(config: ModelConfig, ops: Ops, recipe: str, dtype: torch.dtype = torch.bfloat16) -> Model:
    """A model on the meta device, its products' weights in the forms of this recipe, as these operations take them."""
    with torch.device("meta"):
        model = Model(config, ops).to(dtype).requires_grad_(False).eval()
    if recipe:
        chosen, names = named(recipe), {module: name for name, module in model.named_modules()}
        for owner, leaf in list(products(model)):
            form = chosen.format_of(".".join(filter(None, (names[owner], leaf))))
            if form is not None:
                replace_(owner, leaf, ops.pack(_packed(form, tuple(getattr(owner, leaf).shape))))
    return model


def _packed(form: Format, shape: tuple[int, ...]) -> Packed:
    parts = {name: torch.empty(size, dtype=kind, device="meta") for name, (kind, size) in form.parts(shape).items()}
    group = form.group_of(shape[-1])
    return Packed(form.kind, shape, parts["data"], parts["scale"], group, parts.get("bias"), parts.get("factor"))


def _adapted_(model: Model, lanes: int, rank: int) -> None:
    """Put factors beside every weight that may have some."""
    for owner, leaf in list(adaptable(model)):
        base = getattr(owner, leaf)
        *stack, outputs, inputs = base.shape
        a, b = (torch.empty(lanes, *stack, rank, n, dtype=model.dtype, device="meta") for n in (inputs, outputs))
        replace_(owner, leaf, LowRank(base, a, b, model.lane_switch))


@torch.inference_mode()
def meta_step(config: ModelConfig, ops: Ops, variant: Variant) -> tuple[Watched, Watched]:
    """What a recording of this variant holds and refuses: the step, and what is made anew once a canvas."""
    model = meta_model(config, ops, variant.recipe, variant.dtype)
    if variant.rank:
        _adapted_(model, variant.lanes, variant.rank)
    count, length = variant.rows, config.canvas_length
    cache = KVCache.allocate(config, count, min(variant.context, config.max_position), "meta", variant.dtype)
    rules, early = [Rules.of(Options(repeats=2 * variant.has_further_rules))] * count, [variant.has_early] * count
    state = Canvases.allocate(model, rules, [0] * count, [0] * count, length, early, variant.has_pins)
    watched: list[Watched] = []

    def capture(run: Callable[[], Tensor | None]) -> tuple[Replay, Tensor | None]:
        run()  # as before a capture: what is made once exists then
        watched.append(watch(run))
        return run, None

    with _quiet():
        encode = length if variant.is_encoding else 0
        Recorded(model, cache, state, RecordedShape(count, encode, variant.bans, variant.rank > 0), capture)
    refreshed, stepped = watched
    return stepped, refreshed


def _quiet() -> Any:
    """Kernels are not launched on meta tensors."""
    try:
        from sfumato.ops.triton.launches import noted
    except ImportError:
        return nullcontext()
    return noted(lambda launch: None)
