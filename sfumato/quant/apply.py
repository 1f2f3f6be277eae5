"""Quantisation as a pass over a finished model or a part of one.

A recipe says which weight gets which format; the pass puts each packed weight where the plain one stood. It lacks the
loading of a checkpoint weight by weight, which `checkpoints` does with the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.model.network import Model, products, replace_
from sfumato.ops.packed import Packed
from sfumato.quant.calibrate import fitted
from sfumato.quant.formats import pack
from sfumato.quant.recipes import Recipe, named


def quantize_(model: Model, recipe: str | Recipe, calibration: Mapping[str, Tensor] | None = None) -> Model:
    """Pack the weights that the recipe names, in place; before `Model.pack_`, which lays them out for the operations.

    `calibration` is statistics of their inputs by the weights' own names (`quant.calibrate`). A quantised model runs,
    and factors beside its weights can be trained; it cannot be saved as a checkpoint in full precision. InputError for
    a weight that the format cannot hold, or a model that is packed already."""
    recipe = named(recipe) if isinstance(recipe, str) else recipe
    quantize_part_(model, recipe, "", calibration)
    return model


def quantize_part_(
    part: nn.Module, recipe: Recipe, prefix: str, calibration: Mapping[str, Tensor] | None = None
) -> None:
    """`quantize_` for a part of a model whose names begin with `prefix`."""
    names = {module: name for name, module in part.named_modules()}
    for owner, leaf in list(products(part)):
        name = ".".join(filter(None, (prefix, names[owner], leaf)))
        weight, form = getattr(owner, leaf), recipe.format_of(name)
        if form is None:
            continue
        if not isinstance(weight, Tensor):
            raise InputError(f"{name} is packed already; load the checkpoint in full precision and quantise that")
        replace_(owner, leaf, fitted(weight.detach(), form, (calibration or {}).get(name)))


def samples(recipe: str | Recipe) -> list[Packed]:
    """A small weight of zeros in each format of a recipe: what `ops.load` is asked about before there is a model."""
    recipe = named(recipe) if isinstance(recipe, str) else recipe
    return [pack(torch.zeros(32, 128), form) for form in dict.fromkeys(form for _, form in recipe.rules)]
