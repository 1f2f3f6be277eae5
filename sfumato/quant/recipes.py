"""Recipes: which weight gets which format, by name.

An ordered list of (pattern, format); the first pattern that fits a weight's name decides, and what none fits stays as
it is. In every recipe that is the router, the norms and scales, and the embedding: published experience, and
docs/quantisation.md, say that low bits there cost steps. What each recipe costs in quality is measured by
`benchmarks/quantised.py`. The names of recipes come without torch: help and the shell's completion show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.quant.formats import Format

_EXPERTS = "layers.*.experts.*"
_DENSE = ("layers.*.self_attn.*_proj.weight", "layers.*.mlp.*_proj.weight")
_CONDITIONING = "self_conditioning.*_proj.weight"


@dataclass(frozen=True)
class Recipe:
    """`rules` are (pattern, format name); patterns are those of a shell, over the names of `Model.state_dict()`."""

    name: str
    rules: tuple[tuple[str, str], ...]
    summary: str = ""

    def format_of(self, own: str) -> Format | None:
        """The format of the weight with this name; None: it stays as it is."""
        from sfumato.quant.formats import Format

        for pattern, form in self.rules:
            if fnmatchcase(own, pattern):
                return Format.named(form)
        return None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of codes in its formats."""
        from sfumato.quant.formats import Format

        return frozenset(Format.named(form).kind for _, form in self.rules)


def _recipe(name: str, experts: str, dense: str, conditioning: str, summary: str) -> Recipe:
    rules = [(_EXPERTS, experts), *((pattern, dense) for pattern in _DENSE), (_CONDITIONING, conditioning)]
    return Recipe(name, tuple(rules), summary)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("int8", "int8", "int8", "int8", "8 bits, a scale an output"),
        _recipe("fp8", "fp8", "fp8", "fp8", "e4m3 on both sides of a product"),
        _recipe("int4", "int4", "int8", "int8", "experts in 4 bits, groups of 64; the rest in 8"),
        _recipe("int4-fp8", "int4", "fp8", "fp8", "experts in 4 bits by 64; the rest in fp8"),
        _recipe("nvfp4", "nvfp4", "fp8", "fp8", "experts in 4-bit floats by 16; the rest in fp8"),
        _recipe("int4-small", "int4-g128", "int4", "int8", "experts, attention and dense layers in 4 bits"),
    )
}
"""The recipes there are, by name."""


def named(name: str) -> Recipe:
    """InputError for a name that there is not."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
