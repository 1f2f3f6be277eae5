"""Adapters: low-rank factors for some weights of a model, trained beside it, served beside others, or merged into it.

An `Adapter` is a value: factors by the model's own names. What is done with one are passes over a finished model:
`Adapters` puts several beside its weights, each on a lane of its own, so that rows of one batch may differ; `merge_`
adds one to plain weights, and what it returns takes it back out; `trainable_`, in a file of its own, makes one
trainable. The network reads weights as before. Files are `checkpoints.adapters`'.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.model.config import ModelConfig
from sfumato.model.loaded import AdapterList, AdapterSize, LoadedAdapter, check_adapter_name
from sfumato.model.network import Model, adaptable, replace_
from sfumato.model.offload import is_streamed
from sfumato.ops.contract import Matrix, tensors_of
from sfumato.ops.lowrank import LanePair, LowRank

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(f"self_attn.{side}_proj.weight" for side in "qkvo"),
    "dense": tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router.proj.weight",),
    "self_conditioning": (
        "self_conditioning.gate_proj.weight", "self_conditioning.up_proj.weight", "self_conditioning.down_proj.weight",
    ),
}  # fmt: skip
"""Kinds of weights that an adapter may have factors for, by the ends of their names."""
USUAL = ("attention", "dense")


class Factors(NamedTuple):
    """The low-rank part of one weight: scale x bᵀ a, or that of each expert."""

    a: Tensor
    """[R, I], or [E, R, I] of a stack."""
    b: Tensor
    """[R, O] or [E, R, O]: outputs innermost."""
    scale: float
    """alpha / R, or alpha / sqrt(R)."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-2]

    def delta(self) -> Tensor:
        """What it adds to the weight, float32, [.., O, I]."""
        return (self.b.float().mT @ self.a.float()).mul_(self.scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors by the names of the model's weights, as `targeted` has them."""

    factors: Mapping[str, Factors]
    """Of encode, and of denoise where that has none of its own."""
    denoise: Mapping[str, Factors] | None = None
    """Of denoise alone; None: it shares those of encode."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights that it replaces as a whole (peft's `modules_to_save`), by the model's names."""
    source: str = "the adapter"
    """What messages call it."""
    notices: tuple[str, ...] = ()
    """One sentence for each thing that its files have and that was left aside, or was not plain."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """How sure decisions with it are, by kind of question."""

    @property
    def parts(self) -> list[Mapping[str, Factors]]:
        """The factors of each lane that it takes: one, or those of encode and those of denoise."""
        return [self.factors] if self.denoise is None else [self.factors, self.denoise]

    @property
    def names(self) -> set[str]:
        """Of all weights that it has factors for."""
        return {name for part in self.parts for name in part}

    def size(self, name: str, dtype: torch.dtype) -> AdapterSize:
        """What it is under this name, its factors in this dtype."""
        count = sum(factors.a.numel() + factors.b.numel() for part in self.parts for factors in part.values())
        return AdapterSize(name, self.rank, count * dtype.itemsize)

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max((factors.rank for part in self.parts for factors in part.values()), default=0)

    def check(self, model: Model) -> None:
        """InputError where a name or a shape is not this model's."""
        places = targeted(model)
        for name, factors in [*self.factors.items(), *(self.denoise or {}).items()]:
            if name not in places:
                raise InputError(
                    f"{self.source} changes {name}, which this model does not have; it is for another model"
                )
            owner, leaf = places[name]
            *stack, outputs, inputs = getattr(owner, leaf).shape
            own_a, own_b = [*stack, factors.rank, inputs], [*stack, factors.rank, outputs]
            if (list(factors.a.shape), list(factors.b.shape)) != (own_a, own_b):
                raise InputError(
                    f"{self.source} has factors {list(factors.a.shape)} and {list(factors.b.shape)} for {name}, where "
                    f"this model needs {own_a} and {own_b}; it is for another model"
                )
        self._check_whole(model)

    def _check_whole(self, model: Model) -> None:
        """A head is none of the names where it is tied to the embedding; `merge_` says what to do then."""
        for name, tensor in self.whole.items():
            if name in self.factors or name in (self.denoise or {}):
                raise InputError(f"{self.source} has factors for {name} and replaces it too; one of both must go")
            parent, _, leaf = name.rpartition(".")
            try:
                shape = tuple(getattr(model.get_submodule(parent), leaf).shape)
            except AttributeError:
                if name != "lm_head.weight":
                    raise InputError(
                        f"{self.source} replaces {name}, which this model does not have; it is for another model"
                    ) from None
                shape = tuple(model.embed_tokens.weight.shape)
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{self.source} replaces {name} by {list(tensor.shape)}, where this model has {list(shape)}; it is "
                    "for another model"
                )


def targeted(model: nn.Module, targets: tuple[str, ...] | None = None) -> dict[str, tuple[nn.Module, str]]:
    """The weights of these kinds (None: of all) by name: their module and their name there.

    A target is a key of `TARGETS`, or the last parts of names, such as "q_proj". InputError for one that names none."""
    names = {module: name for name, module in model.named_modules()}
    every = {f"{names[owner]}.{leaf}": (owner, leaf) for owner, leaf in adaptable(model)}
    if targets is None:
        return every
    kept: set[str] = set()
    for target in targets:
        ends = TARGETS.get(target) or (target, f"{target}.weight")
        own = {name for name in every if any(name == end or name.endswith(f".{end}") for end in ends)}
        if not own:
            raise InputError(
                f"there is no weight {target!r} to adapt; targets are {', '.join(TARGETS)}, or names such as q_proj"
            )
        kept |= own
    return {name: place for name, place in every.items() if name in kept}


def check_rank(rank: int, config: ModelConfig) -> None:
    """InputError for a rank below 1, or above the model's width: the factors would be larger than the weights."""
    if not 1 <= rank <= config.hidden_size:
        raise InputError(f"the rank is {rank}; give one from 1 to the model's width, {config.hidden_size}")


def new_adapter(
    model: Model, rank: int, alpha: float, targets: tuple[str, ...] = USUAL, is_rs: bool = False, seed: int = 0
) -> Adapter:
    """An adapter that changes nothing yet: a is uniform as in peft, b is zeros. float32, on the CPU.

    `is_rs`: scaled by the root of the rank (arXiv 2312.03732). InputError for an unknown target, and for a rank that
    `check_rank` refuses."""
    check_rank(rank, model.config)
    generator = torch.Generator().manual_seed(seed)
    scale = alpha / (math.sqrt(rank) if is_rs else rank)
    factors: dict[str, Factors] = {}
    for name, (owner, leaf) in targeted(model, targets).items():
        *stack, outputs, inputs = getattr(owner, leaf).shape
        a = (torch.rand(*stack, rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
        factors[name] = Factors(a, torch.zeros(*stack, rank, outputs), scale)
    return Adapter(factors)


# ---- several beside a model, one a lane ------------------------------------------------------------------------------


class Adapters:
    """The adapters that lie beside a model's weights, by name. Between passes alone they are loaded and unloaded.

    Rows of an adapter that was unloaded keep its lanes: those are free once nobody holds its `LoadedAdapter`."""

    def __init__(self, model: Model) -> None:
        self._model: Model | None = model
        self._loaded: dict[str, LoadedAdapter] = {}
        self._sizes: dict[str, AdapterSize] = {}
        self._free: list[int] = []
        self._released: deque[LanePair] = deque()
        """Lanes that nobody holds any more; filled from any thread."""
        self._count = 0
        """Lanes that the stacks have room for."""
        self._rank = 0
        self._lanes: dict[int, tuple[int, frozenset[str]]] = {}
        """Of lanes that are taken: the rank, and the weights with factors."""
        self.version = 0
        """Grows with every change of what is loaded."""

    @property
    def model(self) -> Model:
        """The model; InputError after `close`."""
        if self._model is None:
            raise InputError("the model is closed, and its adapters with it; load it again")
        return self._model

    def close(self) -> None:
        """Let go of the model and of what is loaded."""
        self._model = None
        self._loaded.clear()

    @property
    def names(self) -> list[str]:
        """Of all that are loaded, sorted."""
        return sorted(self._loaded)

    def listed(self) -> AdapterList:
        """What is loaded, by name."""
        return AdapterList(tuple(self._sizes[name] for name in self.names), self.bytes)

    def holds(self, loaded: LoadedAdapter) -> bool:
        """Whether this very adapter is still to be had by its name."""
        return self._loaded.get(loaded.name) is loaded

    @property
    def bytes(self) -> int:
        """What all factors beside the weights take, lanes without an adapter included."""
        weights = (getattr(owner, leaf) for owner, leaf in adaptable(self.model))
        return sum(w.a.nbytes + w.b.nbytes for w in weights if isinstance(w, LowRank))

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of this name, which keeps its lanes as long as it is held. InputError where none is loaded."""
        if (loaded := self._loaded.get(name)) is None:
            known = ", ".join(self.names) or "none is loaded"
            raise InputError(f"there is no adapter {name!r}; loaded are: {known}", option="adapter")
        return loaded

    def lane(self, name: str) -> LanePair:
        """The lanes of a row that asks for this one. InputError for a name that is not loaded."""
        return self.get(name).lanes

    def check_name(self, name: str) -> None:
        """InputError for a name that is taken, or that no client could ask for."""
        check_adapter_name(name)
        if name in self._loaded:
            raise InputError(
                f"an adapter {name!r} is loaded already; unload it first, or give another name", option="adapter"
            )

    def check(self, name: str, adapter: Adapter) -> None:
        """InputError for a name that is taken or none, or an adapter that does not fit; `load` checks it as well."""
        self.check_name(name)
        if adapter.whole:
            some = next(iter(adapter.whole))
            raise InputError(
                f"{adapter.source} replaces whole weights ({some}), which rows of one batch must share; merge it: "
                "sfumato convert MODEL --adapter DIR"
            )
        if is_streamed(self.model):
            raise InputError("adapters cannot lie beside weights that are streamed; leave memory_limit out, or merge")
        adapter.check(self.model)

    def growth(self, adapter: Adapter) -> int:
        """Bytes that the factors beside the weights grow by when this one is loaded."""
        self._collect()
        count, rank = self._room_for(adapter)
        names, item, total = adapter.names, self.model.dtype.itemsize, 0
        for name, (owner, leaf) in targeted(self.model).items():
            weight = getattr(owner, leaf)
            if isinstance(weight, LowRank) or name in names:
                *stack, outputs, inputs = weight.shape
                total += count * rank * math.prod(stack) * (outputs + inputs) * item
        return max(0, total - self.bytes)

    def load(self, name: str, adapter: Adapter) -> LanePair:
        """Put an adapter beside the weights. InputError for a name that is taken, or an adapter that does not fit."""
        self.check(name, adapter)
        self._collect()
        parts = adapter.parts
        with torch.inference_mode(False), torch.no_grad():
            self._make_room(adapter)
            lanes = [self._free.pop(0) for _ in parts]
            for lane, part in zip(lanes, parts, strict=True):
                self._put(lane, part)
                rank = max((factors.rank for factors in part.values()), default=0)
                self._lanes[lane] = rank, frozenset(part)
        loaded = LoadedAdapter(name, LanePair(lanes[0], lanes[-1]), adapter.temperatures)
        finalize(loaded, self._released.append, loaded.lanes).atexit = False
        self.version += 1
        self._loaded[name], self._sizes[name] = loaded, adapter.size(name, self.model.dtype)
        return loaded.lanes

    def unload(self, name: str) -> None:
        """Forget an adapter, whose lanes the next one may take as soon as no row has them.

        InputError for a name that is not loaded."""
        self.get(name)
        self.version += 1
        del self._loaded[name], self._sizes[name]
        self.settle()

    def settle(self) -> None:
        """Take back the lanes of adapters that are unloaded and unused, and their memory where it is much.

        Stacks of twice the rank that the others need shrink, and of four times the lanes; without any adapter the
        weights are as before."""
        self._collect()
        rank = max((rank for rank, _ in self._lanes.values()), default=0)
        count = max(self._lanes, default=-1) + 1
        count = self._count if 4 * count > self._count else count
        rank = self._rank if 2 * rank > self._rank else rank
        names = {name for _, own in self._lanes.values() for name in own}
        is_smaller = (count, rank) != (self._count, self._rank)
        self._free = [lane for lane in self._free if lane < count]
        self._count, self._rank = count, rank
        with torch.inference_mode(False), torch.no_grad():
            for name, (owner, leaf) in targeted(self.model).items():
                if isinstance(weight := getattr(owner, leaf), LowRank):
                    if name not in names:
                        replace_(owner, leaf, weight.base)
                    elif is_smaller:
                        self._replace(owner, leaf, self._beside(weight.base, weight))

    @property
    def is_settled(self) -> bool:
        """Whether `settle` has nothing to do."""
        return not self._released

    def _collect(self) -> None:
        while self._released:
            lanes = self._released.popleft()
            self._free = sorted({*self._free, *lanes})
            for lane in set(lanes):
                self._lanes.pop(lane, None)

    def _room_for(self, adapter: Adapter) -> tuple[int, int]:
        """The lanes and the rank that the stacks need with one adapter more."""
        count = self._count
        while len(self._free) + count - self._count < len(adapter.parts):
            count = max(1, 2 * count)
        return count, max(adapter.rank, self._rank)

    def _make_room(self, adapter: Adapter) -> None:
        """Free lanes, room for its rank, and factors beside all weights that it changes."""
        count, rank = self._room_for(adapter)
        self._free += range(self._count, count)
        self._count, self._rank, names = count, rank, adapter.names
        for name, (owner, leaf) in targeted(self.model).items():
            weight = getattr(owner, leaf)
            if isinstance(weight, LowRank):  # each is asked: an earlier try may have ended between two of them
                if len(weight.a) < count or weight.a.shape[-2] < rank:
                    self._replace(owner, leaf, self._beside(weight.base, weight))
            elif name in names:
                self._replace(owner, leaf, self._beside(weight.detach() if isinstance(weight, Tensor) else weight))

    def _replace(self, owner: nn.Module, leaf: str, weight: LowRank) -> None:
        """Put it where the operations read it, as they take it; routers are not packed."""
        is_plain = isinstance(weight.base, Tensor)
        replace_(owner, leaf, weight if is_plain else self.model.ops.pack(weight))

    def _beside(self, base: Matrix, before: LowRank | None = None) -> LowRank:
        """A weight with stacks of zeros beside it, and what lay there before."""
        *stack, outputs, inputs = base.shape
        place: dict[str, Any] = {"dtype": self.model.dtype, "device": tensors_of(base)[0].device}
        a = torch.zeros(self._count, *stack, self._rank, inputs, **place)
        b = torch.zeros(self._count, *stack, self._rank, outputs, **place)
        if before is not None:
            for whole, old in ((a, before.a), (b, before.b)):
                lanes, rank = min(len(whole), len(old)), min(self._rank, old.shape[-2])
                whole[:lanes, ..., :rank, :] = old[:lanes, ..., :rank, :]
        return LowRank(base, a, b, self.model.lane_switch)

    def _put(self, lane: int, part: Mapping[str, Factors]) -> None:
        """Fill a lane: with zeros where the adapter has no factors."""
        for name, (owner, leaf) in targeted(self.model).items():
            weight = getattr(owner, leaf)
            if not isinstance(weight, LowRank):
                continue
            weight.a[lane].zero_()
            weight.b[lane].zero_()
            if (own := part.get(name)) is not None:
                weight.a[lane][..., : own.rank, :].copy_(own.a)
                weight.b[lane][..., : own.rank, :].copy_(own.b.float() * own.scale)


# ---- one, merged -----------------------------------------------------------------------------------------------------


def check_mergeable(adapter: Adapter) -> None:
    """InputError for an adapter that is not the same in encode and denoise: both read one weight."""
    if adapter.denoise is not None:
        raise InputError(
            f"{adapter.source} changes encode and denoise differently, which one weight cannot hold; serve it beside "
            "the model: sfumato serve -m MODEL --adapter NAME=DIR"
        )


def merge_(model: Model, adapter: Adapter) -> Callable[[], None]:
    """Add an adapter to the plain weights of a model; what is returned takes it out again, to the last bit.

    The weights of before stay in memory meanwhile. InputError for weights in fewer bits, which would be rounded twice,
    and for an adapter that does not fit, or that is not the same in encode and denoise."""
    adapter.check(model)
    check_mergeable(adapter)
    places = targeted(model)
    for name in adapter.whole:
        parent, _, leaf = name.rpartition(".")
        if parent == "lm_head" and model.lm_head is None:
            raise InputError(
                f"{adapter.source} brings lm_head, a matrix of its own for logits, into a model that has none; write a "
                "merged one: sfumato convert MODEL --adapter DIR"
            )
        places[name] = model.get_submodule(parent), leaf
    for name in (*adapter.factors, *adapter.whole):
        owner, leaf = places[name]
        if not isinstance(getattr(owner, leaf), Tensor):
            raise InputError(
                f"{name} is not plain numbers, into which {adapter.source} could be merged; load the model with "
                "ops='fused' in full, or write a merged one: sfumato convert MODEL --adapter DIR"
            )
    before: list[tuple[nn.Module, str, Tensor]] = []
    for name in (*adapter.factors, *adapter.whole):
        owner, leaf = places[name]
        weight: Tensor = getattr(owner, leaf)
        before.append((owner, leaf, weight))
        if name in adapter.whole:
            merged = adapter.whole[name].to(weight, copy=True)
        else:
            merged = (weight.detach().float() + adapter.factors[name].delta().to(weight.device)).to(weight.dtype)
        _put_back(owner, leaf, nn.Parameter(merged, False) if isinstance(weight, nn.Parameter) else merged)

    def unmerge() -> None:
        for owner, leaf, weight in reversed(before):
            _put_back(owner, leaf, weight)

    return unmerge


def _put_back(owner: nn.Module, leaf: str, weight: Tensor) -> None:
    """Put a weight where another one of its kind is: a parameter, a buffer, or what operations have in its place."""
    places: list[dict[str, Any]] = [owner._parameters, owner._buffers, vars(owner)]
    next(place for place in places if leaf in place)[leaf] = weight
