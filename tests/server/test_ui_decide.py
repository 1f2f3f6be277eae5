"""server/ui/decide.js: the tab for decisions in a real browser, over `ui_server`."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ui_page
from ui_page import expect, go
from ui_server import PageServer, Reply

from sfumato import Choice, Noul, Score, Span
from sfumato.questions import question_of, record_of

browser, server, page, pytestmark = ui_page.browser, ui_page.server, ui_page.page, ui_page.needs_chromium
PASSAGE = "Give it back, 😀 please."
STATE = f"I was charged <b>twice</b>.\n{PASSAGE}\nThe lamp is fine."
QUESTIONS: dict[str, Any] = {
    "refund": {"type": "noul", "instructions": "Is a refund asked for?"},
    "team": {"type": "choice", "criteria": {"10": "Payments", "9": None, "<i>other</i>": None}},
    "anger": {"type": "score", "criteria": ["calm", "angry", "furious"]},
    "quote": {"type": "x_span", "instructions": "Where?", "unit": "line", "x_depends_on": {"refund": True}},
}


def answer_of(record: dict[str, Any], state: Any) -> dict[str, Any]:
    """A valid answer that follows from the question: its last option is the likeliest."""
    if record["type"] == "noul":
        return {"type": "noul", "noul": 0.9, "x_confidence": 0.8}
    if record["type"] == "x_span":
        start = state.index(PASSAGE)
        place = {"passage": PASSAGE, "start": start, "end": start + len(PASSAGE)}
        return {
            "type": "x_span",
            **place,
            "probabilities": {PASSAGE: 0.75, "The lamp is fine.": 0.25},
            "confidence": 0.5,
        }
    options = (
        [*record["criteria"]] if record["type"] == "choice" else [str(at) for at in range(len(record["criteria"]))]
    )
    whole = sum(range(1, len(options) + 1))
    shares = {option: at / whole for at, option in enumerate(options, 1)}
    shared = {"type": record["type"], "probabilities": shares, "confidence": 0.25}
    if record["type"] == "choice":
        return {**shared, "choice": options[-1]}
    score = sum(int(level) * share for level, share in shares.items())
    return {**shared, "score": score, "legend": dict(zip(options, record["criteria"], strict=True))}


def answered(body: dict[str, Any]) -> Reply:
    answers = {id: answer_of(record, body["state"]) for id, record in body["questions"].items()}
    return Reply({"model": "nano", "answers": answers, "usage": {"input_tokens": 40, "output_tokens": len(answers)}})


def faults(*places: list[Any]) -> Reply:
    return Reply(
        {"detail": [{"loc": ["body", *place], "msg": "this is too long", "type": "too_long"} for place in places]}, 422
    )


@pytest.fixture
def bodies(page: Any, server: PageServer) -> Callable[[], list[dict[str, Any]]]:
    """The tab is open; what was sent so far."""
    server.scripts["/v1/systemone"] = [answered]
    go(page, "Decide")
    return lambda: server.bodies("/v1/systemone")


class StandIn:
    """For the two Python clients: keeps what it is asked."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.answers: dict[str, Any] = {}

    def __call__(self, **more: Any) -> StandIn:
        return self

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None: ...

    def connect(self, url: str, **more: Any) -> StandIn:
        return self

    def decide(self, state: Any, questions: Any, **options: Any) -> dict[str, Any]:
        self.calls.append((state, questions, options))
        return self.answers

    def system_one(self, state: Any, questions: Any) -> StandIn:
        self.calls.append((state, questions, {}))
        return self


def drop(page: Any, request: Any, name: str = "request.json") -> None:
    """Let a file fall on the tab."""
    page.locator("#decide").evaluate(
        "(place, [text, name]) => { const data = new DataTransfer(); data.items.add(new File([text], name));"
        "place.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })); }",
        [request if isinstance(request, str) else json.dumps(request), name],
    )


def card(page: Any, id: str) -> Any:
    return page.get_by_role("article", name=f"Question {id}", exact=True)


def rulings(page: Any) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(".ruling").all_text_contents()]


STATUS = "#decide-status"


def test_questions_are_answered_live_and_only_those_that_changed_anew(page: Any, bodies: Any) -> None:
    drop(page, {"model": "jev-latest", "state": STATE, "questions": QUESTIONS})
    expect(page.locator(STATUS)).to_contain_text("4 answers in")
    (body,) = bodies()
    assert body == {"model": "nano", "state": STATE, "questions": QUESTIONS, "x_seed": 0}
    assert rulings(page) == [
        "Yes 90.0 %, confidence 0.80",
        "<i>other</i> 50.0 %, confidence 0.25",
        "2: furious 50.0 %, expected 1.33 of 2, confidence 0.25",
        f"{PASSAGE} 75.0 %, confidence 0.50",
    ]
    expect(page.locator("#state-marks mark")).to_have_text(PASSAGE)
    widths = card(page, "refund").locator(".bar").evaluate_all("all => all.map(bar => bar.style.inlineSize)")
    assert widths == ["90%", "10%"]
    assert page.locator("#decide :is(b, i)").count() == 0
    card(page, "team").get_by_label("Instructions").fill("Who answers?")
    expect(page.locator(STATUS)).to_contain_text("One answer in")
    assert [*bodies()[1]["questions"]] == ["team"]
    card(page, "refund").get_by_label("Id of the question").fill("money")  # what it is called changes no answer
    page.keyboard.press("Control+Enter")
    expect(page.locator(STATUS)).to_contain_text("is answered")
    assert len(bodies()) == 2
    page.locator("#state").press("Control+End")
    page.keyboard.type("!")
    expect(page.locator(STATUS)).to_contain_text("4 answers in")
    last = bodies()[2]
    assert len(bodies()) == 3 and last["state"] == STATE + "!"
    assert last["questions"]["quote"]["x_depends_on"] == {"money": True}
    card(page, "quote").get_by_role("button", name=PASSAGE).click()
    selected = page.locator("#state").evaluate("field => field.value.slice(field.selectionStart, field.selectionEnd)")
    assert selected == PASSAGE
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.locator("#decide *").evaluate_all(
        "all => all.filter(e => e.checkVisibility() && !e.closest('.unseen, #state-marks')"
        " && e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80))"
    )
    nameless = page.locator("#decide :is(input, textarea, select, button)").evaluate_all(
        "all => all.filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim())"
        ".map(e => e.outerHTML)"
    )
    assert (wide, nameless) == ([], [])


def test_the_latest_wins_and_escape_stops(page: Any, server: PageServer, bodies: Any) -> None:
    hold = threading.Event()

    def late(body: dict[str, Any]) -> Reply:
        if body["state"] != "Another text.":
            hold.wait(10)
        return answered(body)

    server.scripts["/v1/systemone"] = [late]
    drop(page, {"state": STATE, "questions": {"refund": QUESTIONS["refund"]}})
    expect(page.locator(STATUS)).to_contain_text("Reading one question")
    page.locator("#state").fill("Another text.")
    expect(page.locator(STATUS)).to_contain_text("One answer in")
    assert [body["state"] for body in bodies()] == [STATE, "Another text."]
    page.locator("#state").fill("And another.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#decide-stop")).to_be_visible()
    expect(page.locator(".reading")).to_have_class("reading stale")
    page.keyboard.press("Escape")
    expect(page.locator(STATUS)).to_have_text("Stopped.")
    hold.set()
    page.locator("#ask").click()
    expect(page.locator(STATUS)).to_contain_text("One answer in")
    expect(page.locator(".reading")).to_have_class("reading")


def test_a_fault_stands_where_it_is_and_a_broken_answer_is_told(page: Any, server: PageServer, bodies: Any) -> None:
    fault = faults(["questions", "team", "choice", "criteria", "9"])
    server.scripts["/v1/systemone"] = [fault, answered, faults(["state"]), faults(["x_samples"]), answered]
    drop(page, {"state": STATE, "questions": QUESTIONS})
    expect(page.locator(STATUS)).to_contain_text("3 answers in")
    team = card(page, "team")
    expect(team.locator(".wrong")).to_have_text("this is too long")
    expect(team.locator("[aria-invalid=true]")).to_have_value("9")
    assert [*bodies()[1]["questions"]] == ["refund", "anger", "quote"]
    page.locator("#live").uncheck()
    team.get_by_label("Option 2", exact=True).fill("nine")
    expect(team.locator(".wrong")).to_be_hidden()
    for place in ("#state-wrong", "#decide-trouble"):
        page.locator("#ask").click()
        expect(page.locator(place)).to_contain_text("this is too long")
    expect(page.locator("#decide-samples")).to_have_attribute("aria-invalid", "true")
    page.locator("#decide-trouble").get_by_role("button", name="Try again").click()
    expect(page.locator(STATUS)).to_contain_text("One answer in")
    expect(page.locator("#decide-trouble")).to_be_empty()

    def without_quote(body: dict[str, Any]) -> Reply:
        reply = answered(body)
        del reply.body["answers"]["quote"]
        return reply

    broken = Reply({"answers": {"refund": {"type": "noul", "noul": "<b>"}}})
    server.scripts["/v1/systemone"] = [without_quote, broken]
    drop(page, {"state": STATE, "questions": {"refund": QUESTIONS["refund"], "quote": QUESTIONS["quote"]}})
    page.locator("#ask").click()
    expect(card(page, "quote").locator(".ruling")).to_have_text("Not asked, as refund has another answer.")
    page.locator("#state").fill("x")
    page.locator("#ask").click()
    expect(page.locator("#decide-trouble")).to_contain_text("is none to a question of this kind")


def test_questions_are_built_by_hand_with_255_options(page: Any, bodies: Any) -> None:
    page.locator("#live").uncheck()  # else a slow machine asks before the keys are pressed, too
    page.locator("#state").fill("Pick one.")
    page.locator("#add-choice").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".question textarea").first).to_be_focused()
    page.keyboard.type("Which?")
    expect(page.locator(".question > .hint")).to_have_text("Name its options.")
    lines = "\n".join(f"{255 - at}: the {at}th" for at in range(255))
    page.evaluate("text => navigator.clipboard.writeText(text)", lines)
    page.get_by_label("Option 1", exact=True).focus()
    page.keyboard.press("Control+v")
    page.keyboard.press("Control+Enter")
    expect(page.locator(STATUS)).to_contain_text("One answer in")
    expect(page.locator(".option")).to_have_count(255)
    (body,) = bodies()
    assert [*body["questions"]["q1"]["criteria"].items()] == [(str(255 - at), f"the {at}th") for at in range(255)]
    names = page.locator(".bars .name").all_text_contents()
    assert names == [str(at) for at in range(1, 256)]  # the likeliest first
    box = page.locator(".bars")
    assert box.evaluate("list => [list.tabIndex, list.scrollHeight > 4 * list.clientHeight]") == [0, True]
    page.get_by_label("Option 255", exact=True).fill("2")
    expect(page.locator(".question > .hint")).to_have_text("The option “2” stands there twice.")
    page.get_by_role("button", name="Remove the option 255").click()
    page.get_by_label("Option 254", exact=True).press("Enter")
    expect(page.get_by_label("Option 255", exact=True)).to_be_focused()
    page.get_by_role("button", name="Remove the question q1").click()
    expect(page.locator(".question")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".question")).to_have_count(1)


def test_what_is_copied_asks_the_same(page: Any, bodies: Any) -> None:
    quote = {**QUESTIONS["quote"], "instructions": {"It's": "“$HOME”?", "2": 1.0, "1": []}}
    page.locator("#live").uncheck()
    drop(
        page,
        {
            "state": {"2": "It's <b>5</b>\n", "1": 12345678901234567890, "yes": [True, None]},
            "questions": {**QUESTIONS, "quote": quote},
        },
    )
    expect(page.locator("#state-json")).to_be_checked()
    page.locator("#decide-samples").fill("4")
    page.locator("#decide-think").select_option("auto")
    page.locator("#decide-code summary").click()

    def code(form: str) -> str:
        page.locator("#code-form").select_option(form)
        return str(page.locator("#code").text_content())

    body = json.loads(code("JSON request"))
    assert [*body["state"].items()] == [("2", "It's <b>5</b>\n"), ("1", 12345678901234567890), ("yes", [True, None])]
    assert [*body["questions"]["team"]["criteria"]] == ["10", "9", "<i>other</i>"]
    assert body["questions"]["quote"]["instructions"] == json.dumps(quote["instructions"], ensure_ascii=False)
    assert {name: body[name] for name in body if name.startswith("x_")} == {
        "x_samples": 4,
        "x_think": "auto",
        "x_threshold": 0.5,
        "x_seed": 0,
    }
    page.locator("#decide-example").select_option("Nothing")
    page.locator("#decide-samples").fill("1")
    drop(page, body)
    expect(page.locator("#decide-samples")).to_have_value("4")
    assert json.loads(code("JSON request")) == body
    shell = 'curl() { printf "%s\\n" "$@"; cat; }\n' + code("curl")
    sent = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert sent.startswith(f"{page.url.split('#')[0]}v1/systemone\n") and json.loads(sent[sent.index("\n{") :]) == body

    calls: list[Any] = []
    for form in ("Python, sfumato", "Python, typesafe-sdk"):
        lines = [line for line in code(form).splitlines() if not line.startswith("from ")]
        names = {
            "LLM": StandIn(calls),
            "TypeSafeClient": StandIn(calls),
            "Noul": Noul,
            "Choice": Choice,
            "Score": Score,
            "Span": Span,
        }
        exec("\n".join(lines), names)
    (state_1, own, options), (state_2, others, _) = calls
    assert state_1 == state_2 == body["state"]
    assert options == {"samples": 4, "think": "auto", "threshold": 0.5, "seed": 0}
    assert {id: record_of(one) for id, one in own.items()} == {
        id: record_of(question_of(one)) for id, one in body["questions"].items()
    }
    assert [*others] == ["refund", "team", "anger"]


def test_work_is_kept_and_what_is_not_ours_is_not_believed(page: Any, bodies: Any) -> None:
    page.locator("#live").uncheck()
    page.locator("#decide-example").select_option("An e-mail to route")
    page.locator("#decide-steps").fill("2")
    page.reload()
    expect(page.locator(".question")).to_have_count(4)
    expect(page.locator("#decide-steps")).to_have_value("2")
    expect(page.locator("#live")).not_to_be_checked()
    expect(card(page, "request").get_by_label("Answer it must have")).to_have_value("true")
    circle = [
        {"key": "a", "id": "a", "kind": "noul", "parent": "b"},
        {"key": "b", "id": "b", "kind": "noul", "parent": "a"},
    ]
    strange = {
        "state": 5,
        "questions": [None, 3, {"kind": "x"}, {"kind": "choice", "options": [None, {"name": []}]}, *circle],
        "values": [],
    }
    page.evaluate(
        "value => { for (const s of [localStorage, sessionStorage]) s.setItem('sfumato.decide', value); }",
        json.dumps(strange),
    )
    page.reload()
    expect(page.locator(".question")).to_have_count(3)
    expect(page.locator("#state")).to_have_value("")
    answers = page.evaluate(
        "async levels => { const { answersOf } = await import('/ui/questions.js');"
        " return answersOf({ kind: 'score', levels }); }",
        ["", "calm", " ", "angry"],
    )
    assert answers == [["0", "0: calm"], ["1", "1: angry"]]  # empty levels are not sent
    drop(page, "\ud800 no request", "note.txt")
    expect(page.locator("#state")).to_have_value("\ufffd no request")
    drop(page, {"state": "", "questions": {"x": {"type": "box"}}})
    expect(page.locator("#state-wrong")).to_contain_text("“x” is of no kind that this page knows")
    assert bodies() == []
