"""templates/layout.py: which positions are pinned, warm or free, and what stands before and behind the canvas."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato import LLM, Options, Slot
from sfumato.templates.layout import EncodedTemplate, Sheet, lay_out
from sfumato.templates.slots import check_template


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def layout(llm: LLM, template: list[str | Slot], **more: Any) -> Sheet:
    return lay_out(EncodedTemplate.of(check_template(template), llm.tokenizer), llm.model.config, {}, **more)


def test_a_template_that_fits_stays_on_one_canvas_with_ends_behind_it(llm: LLM) -> None:
    sheet = layout(llm, ["12", Slot(length=2), "34"])
    digits = llm.tokenizer.encode("1234")
    assert [sheet.pins[n] for n in (0, 1, 4, 5)] == digits and sheet.length == 6 and not sheet.lead
    assert {sheet.pins[n] for n in range(6, 82)} == {llm.model.config.eos_ids[0]} and set(sheet.pins) == {
        *range(82)
    } - {2, 3}


def test_what_does_not_fit_before_the_slot_goes_into_the_cache(llm: LLM) -> None:
    sheet = layout(llm, ["1" * 100, Slot(length=2), "2" * 40])
    assert len(sheet.lead) == 60 and sheet.places[0].start == 40 and sheet.length == 82 and sheet.beyond == ""
    sheet = layout(llm, ["1" * 100, Slot(length=2), "2" * 100])
    assert len(sheet.lead) == 100 and sheet.places[0].start == 0 and sheet.beyond == "2" * 20


def test_a_short_canvas_has_ends_up_to_a_multiple_of_sixteen(llm: LLM) -> None:
    sheet = layout(llm, ["12", Slot(length=2), "34"], is_short=True)
    assert max(sheet.pins) == 15
    early = llm.fill(["12", Slot("x", length=2), "34"], options=Options(seed=1, short=True, max_steps=3))
    assert early.text.startswith("12") and early.text.endswith("34")


def test_strength_is_the_share_of_noise_and_follows_the_seed(llm: LLM) -> None:
    text = "5" * 60
    none, some, all_ = (layout(llm, [Slot(text=text, strength=s)], seed=3).warm for s in (1.0, 0.5, 0.0))
    assert not none and 15 < len(some) < 45 and len(all_) == 60
    assert some == layout(llm, [Slot(text=text, strength=0.5)], seed=3).warm
    assert some != layout(llm, [Slot(text=text, strength=0.5)], seed=4).warm
