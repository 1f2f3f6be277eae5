"""quant/apply.py: a sample of every format of a recipe; and who names recipes names those that there are."""

from __future__ import annotations

import re
from pathlib import Path

from sfumato import LLM
from sfumato.cli.info_report import KINDS
from sfumato.options import LOAD_OPTIONS
from sfumato.quant.apply import samples
from sfumato.quant.recipes import RECIPES


def test_a_sample_of_every_format_of_a_recipe() -> None:
    packed = samples("int4")
    assert [(one.kind, one.group, one.shape) for one in packed] == [("int4", 64, (32, 128)), ("int8", 128, (32, 128))]
    assert [one.kind for one in samples("nvfp4")] == ["nvfp4", "fp8"]
    assert [(one.kind, one.group) for one in samples("int4-small")] == [("int4", 128), ("int4", 64), ("int8", 128)]
    assert all(not one.dense().any() for one in packed)


def test_sentences_that_list_the_recipes_list_them_all() -> None:
    """They lie below `quant`, or are not code, and cannot ask it."""
    listed = [
        re.search(r"Pack weights while loading: (.*)\.", LOAD_OPTIONS["quantize"].about.sentence),
        re.search(r"by a recipe: (.*?);", " ".join((LLM.load.__doc__ or "").split())),
        re.search(r'quantize="int4"\)  # (.*): docs', (Path(__file__).parents[2] / "README.md").read_text()),
    ]
    for match in listed:
        assert match is not None and re.findall(r"[\w-]+", match[1].replace(" or ", " ")) == list(RECIPES)


def test_operations_are_reported_for_recipes() -> None:
    assert KINDS[0] == "bf16" and set(KINDS[1:]) <= RECIPES.keys()
