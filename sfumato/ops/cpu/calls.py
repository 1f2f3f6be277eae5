"""Calls of the compiled library: what each of its functions takes, in one line each, and the check of every call.

A pointer carries neither type nor size: what is wrong beyond this place is memory of somebody else. So a call names its
values in the order of `_TAKES`, which says how each must look; sizes are read from the tensors' shapes, and a size has
one value in a call. What is no number of elements (an expert's index, a row of the cache) the library looks at itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ctypes import addressof, c_float, c_int, c_long, c_void_p
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.cpu import build

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of inputs and outputs, as the library numbers them."""

_ATTENTION = "rows:i64[B] lengths:i64[B] counts:i64[B] X B encode:long canvas:long window:long R"
_TAKES = {
    "sf_linear": "x[N,I] N I count:long weights:array outputs:array to:array",
    "sf_feed_forward": "x[N,D] N D F <gate[F,D] up[F,D] down[D,F]> y[N,D]",
    "sf_experts": "x[N,D] N D J index:i64[N,J] weight:f32[N,J] E <gate_up[E,2F,D] down[E,D,F]> F y[N,D]",
    "sf_rms_norm": "x[N,D] N D weight?[D] eps:float y[N,D]",
    "sf_norm_rope": "x[B,T,H,K] N H K weight[K] eps:float cos[B,T,K] sin[B,T,K] y[B,T,H,K]",
    "sf_norm_add": "residual[N,D] x[N,D] N D weight[D] eps:float y[N,D]",
    "sf_join": "residual[N,D] dense[N,D] sparse[N,D] N D dense_norm[D] sparse_norm[D] norm[D] eps:float scale[S] S "
    "y[N,D]",
    "sf_route": "x[N,D] N D scale[D] proj[E,D] <beside?[E,D]> E per_expert[E] J eps:float index:i64[N,J] "
    "weight:f32[N,J]",
    "sf_attention": f"q[B,T,H,K] k[B,T,G,K] v[B,T,G,K] k_ring[X,R,G,K] v_ring[X,R,G,K] {_ATTENTION} H G K y[B,T,H,K]",
    "sf_block": "x[B,T,D] (input_norm[D] q_norm[K] k_norm[K] after_attention[D] before_dense[D] after_dense[D] "
    "router_scale[D] router[E,D] per_expert[E] before_experts[D] after_experts[D] after[D]) <q[Q,D] k[C,D] v?[C,D] "
    "o[D,Q] gate[F,D] up[F,D] down[D,F] gate_up[E,2I,D] expert_down[E,D,I] beside_router?[E,D]> {D H G K F E I J} "
    f"eps:float cos[B,T,K] sin[B,T,K] k_ring[X,R,G,K] v_ring[X,R,G,K] {_ATTENTION} scale[S] S y[B,T,D] "
    "k_new[B,T,G,K] v_new[B,T,G,K] lent:pointer lent_bytes:long",
    "sf_read_out": "hidden[N,D] N D embed[V,D] V softcap:float temperature:f32[N] where?:u8[N] banned?:i64[A] A "
    "uniform?:f32[N] logits[N,V] mass:f32[W,M] sample:i64[N] argmax:i64[N] entropy:f32[N] peak:f32[N]",
    "sf_soft_embedding": "logits[B,L,V] B L V embed[V,D] D peak:f32[N] mass?:f32[W,M] least:float scale:float y[N,D]",
    "sf_conclude": "(at:i64[B] sample:i64[B,L] argmax:i64[B,L] noise:i64[B,L] entropy:f32[B,L] hidden[B,L,D] "
    "soft[B,L,D] embed[V,D] scale[S] canvas:i64[X,L] pin:i64[X,L] last:i64[X,L] stood:i64[X,L] step:i64[X] "
    "settled:i64[X] stability:i64[X] most_steps:i64[X] room:i64[X] ends:i64[A] unsure:f32[X,L] bound:f32[X] "
    "confidence:f32[X] accepted:bool[X,L] is_done:bool[X] is_finite:bool[X] early:bool[X] seen[X,L,D]) "
    "{B L D X A V Pins Early}",
}
"""What each function takes, in C's order, between the number type of x and the thread count.

`name:dtype[sizes]` is a tensor, contiguous and on the CPU; without a dtype it is in x's, and `?` may be None. A name
that stands alone is a size. In () are tensors that go as an array of pointers, in <> weights, in {} an array of sizes.
"""
_DTYPES = {"i64": torch.int64, "f32": torch.float32, "u8": torch.uint8, "bool": torch.bool, "": None}
_OUTSIDE = {
    1: "the index of an expert is outside the stack of experts",
    2: "a row of the pass is outside the cache's rows, or has a length below 0 or a count outside its new tokens",
    3: "the heads of queries are no multiple of those of keys, or their size is odd, or the sizes of a pass do not add "
    "up",
    4: "a row of the pass is outside the state's rows, or a pinned token outside the vocabulary",
    5: "more experts are asked for than there are",
    6: "the lanes of a pass are those of another number of tokens, or a lane is outside the stack of factors",
}
"""What the library found wrong among numbers."""


class Operand(NamedTuple):
    """A weight as an argument: `Operand` of packing.h as bytes, and the weight's shape."""

    shape: tuple[int, ...]
    raw: bytes
    runs: Any = None
    """Memory that the bytes point to and that nobody else may keep."""

    @classmethod
    def of(cls, shape: tuple[int, ...], pointers: Sequence[int | None], numbers: Sequence[int]) -> Operand:
        """Of where data, scale, bias, factor and table lie, and of kind, group, store and spread."""
        return cls(shape, _OPERAND.pack(*(place or 0 for place in pointers), *numbers) + _NO_FACTORS)

    def beside(self, factors: FactorPlaces, runs: Any, count: int, tokens: int) -> Operand:
        """This with low-rank factors, for a pass of so many tokens, whose `count` runs lie in the array `runs`."""
        low = _FACTORS.pack(
            factors.a, factors.b, addressof(runs), count, tokens, 0, factors.lanes, factors.rank, factors.scale
        )
        return Operand(self.shape, self.raw[: _OPERAND.size] + low, runs)


class FactorPlaces(NamedTuple):
    """Low-rank factors: where they lie, how many lanes of which rank, and what scales their product."""

    a: int
    b: int
    lanes: int
    rank: int
    scale: float


_OPERAND, _FACTORS = Struct("5P4l"), Struct("3P5ld")
_NO_FACTORS = bytes(_FACTORS.size)
NOTHING = bytes(_OPERAND.size) + _NO_FACTORS


_PLAIN = {"float": c_float, "long": c_long}


class _Part(NamedTuple):
    """A value that a call names."""

    name: str
    kind: str
    """"tensor", "weight", or what a plain value is."""
    dtype: torch.dtype | None
    """None: that of x."""
    sizes: tuple[tuple[int, str], ...]
    """Each times its factor."""
    is_optional: bool


class _LibraryFunction:
    """A function of the library, and what it takes."""

    def __init__(self, name: str, takes: str) -> None:
        self.name, self.parts = name, list[_Part]()
        self.layout = list[tuple[str, Any, Any]]()
        """C's arguments: ("value", index of a part, None), ("size", name, None), ("sizes", names, their Struct),
        ("pointers", the slice of parts, its Struct), ("weights", the slice of parts, None)."""
        types: list[Any] = [c_int]
        for piece in re.findall(r"\([^)]*\)|<[^>]*>|\{[^}]*\}|[^ ]+", takes):
            inner, at = piece[1:-1].split(), len(self.parts)
            types.append(c_void_p)
            if piece[0] == "(":
                self.parts += [_part(one, "tensor") for one in inner]
                self.layout.append(("pointers", slice(at, len(self.parts)), Struct(f"{len(inner)}P")))
            elif piece[0] == "<":
                self.parts += [_part(one, "weight") for one in inner]
                self.layout.append(("weights", slice(at, len(self.parts)), None))
            elif piece[0] == "{":
                self.layout.append(("sizes", inner, Struct(f"{len(inner)}l")))
            elif piece.isalnum():
                types[-1] = c_long
                self.layout.append(("size", piece, None))
            else:
                self.parts.append(_part(piece, "tensor"))
                types[-1] = _PLAIN.get(self.parts[-1].kind, c_void_p)
                self.layout.append(("value", at, None))
        self.x = next(at for at, part in enumerate(self.parts) if part.sizes and part.dtype is None)
        """The part that says the number type."""
        self.known: dict[Any, dict[str, int]] = {}
        """The sizes of shapes that fit each other, by these shapes."""
        self.function: Any = getattr(build.library(), name)
        self.function.argtypes, self.function.restype = [*types, c_int], c_int

    def __call__(self, values: tuple[Any, ...], sizes: dict[str, int]) -> None:
        dtype: Any = getattr(values[self.x], "dtype", None)
        number = NUMBER_TYPES.get(dtype)
        if number is None:
            raise InputError(f"the cpu operations take float32 and bfloat16, not {dtype}; choose ops='fused'")
        ready: list[Any] = []
        shapes: list[Any] = [*sizes.values()]
        for part, value in zip(self.parts, values, strict=True):
            kind = part.kind
            if kind == "tensor":
                if value is None:
                    ready.append(0)
                    shapes.append(None)
                    continue
                if value.dtype is not (part.dtype or dtype) or not value.is_contiguous() or not value.is_cpu:
                    raise self.refusal(part, value, dtype, sizes)
                ready.append(value.data_ptr())
                shapes.append(value.shape)
            elif kind == "weight":
                ready.append(NOTHING if value is None else value.raw)
                shapes.append(None if value is None else value.shape)
            else:
                ready.append(value)
        key = tuple(shapes)
        all_sizes = self.known.get(key)
        if all_sizes is None:
            all_sizes = self.fitted(values, dtype, sizes)
            if len(self.known) > _MANY:
                self.known.clear()
            self.known[key] = all_sizes
        arguments: list[Any] = []
        for how, what, struct in self.layout:
            if how == "value":
                arguments.append(ready[what])
            elif how == "size":
                arguments.append(all_sizes[what])
            elif how == "sizes":
                arguments.append(struct.pack(*[all_sizes[name] for name in what]))
            elif how == "pointers":
                arguments.append(struct.pack(*ready[what]))
            else:
                arguments.append(b"".join(ready[what]))
        refusal = self.function(number, *arguments, torch.get_num_threads())
        if refusal:
            raise InputError(f"the cpu operations cannot run {self.name}: {_OUTSIDE[refusal]}")

    def fitted(self, values: tuple[Any, ...], dtype: torch.dtype, sizes: dict[str, int]) -> dict[str, int]:
        """Every size by its name; InputError where a shape has another one, or where what must be there is not."""
        fitting = dict(sizes)
        for part, value in zip(self.parts, values, strict=True):
            if not part.sizes or (value is None and part.is_optional):
                continue
            if value is None or len(value.shape) != len(part.sizes):
                raise self.refusal(part, value, dtype, fitting)
            for size, (factor, name) in zip(value.shape, part.sizes, strict=True):
                if fitting.setdefault(name, size // factor) * factor != size:
                    raise self.refusal(part, value, dtype, fitting)
        return fitting

    def refusal(self, part: _Part, value: Any, dtype: torch.dtype, sizes: dict[str, int]) -> InputError:
        """What `part` must be, and what it is."""
        names = [f"{factor if factor > 1 else ''}{name}" for factor, name in part.sizes]
        fixed = {f"{name} = {sizes[name]}" for _, name in part.sizes if name in sizes}
        must = f"[{', '.join(names)}]" + (f" with {', '.join(sorted(fixed))}" if fixed else "")
        if part.kind == "tensor":
            must = f"a contiguous {_short(part.dtype or dtype)} tensor {must} on the CPU"
        return InputError(f"{part.name} in {self.name} must be {must}, not {_described(value)}; convert it first")


_MANY = 256
"""Shapes of one function that are kept in mind at most."""
_ENTRIES: dict[str, _LibraryFunction] = {}


def call(name: str, *values: Any, **sizes: int) -> None:
    """Call a function of the library with its values in order, and the sizes that no tensor's shape says.

    InputError where a value is not what the function takes."""
    entry = _ENTRIES.get(name)
    if entry is None:
        entry = _ENTRIES[name] = _LibraryFunction(name, _TAKES[name])
    entry(values, sizes)


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor lies; None is C's null."""
    return None if x is None else x.data_ptr()


def _part(piece: str, kind: str) -> _Part:
    match = re.fullmatch(r"(\w+)(\??)(?::(\w+))?(?:\[([^]]*)\])?", piece)
    assert match is not None, piece
    name, optional, dtype, shape = match.groups(default="")
    if not shape:
        return _Part(name, dtype, None, (), False)
    sizes = [re.fullmatch(r"(\d*)(\w+)", size) for size in shape.split(",")]
    return _Part(name, kind, _DTYPES[dtype], tuple((int(one[1] or 1), one[2]) for one in sizes if one), bool(optional))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else str(list(value.shape))
    gaps = "" if value.is_contiguous() else ", with gaps"
    return f"{_short(value.dtype)} {list(value.shape)}{gaps} on {value.device}"
