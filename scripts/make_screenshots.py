"""Draws docs/ui/*.png: the page as a person sees it, in Debian's chromium, over scripted answers.

    .venv/bin/python scripts/make_screenshots.py

The answers and their drafts are written here, not by a model: nano, the embedded one, knows nothing but Sudoku.
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from sfumato.questions import choice_confidence, score_confidence
from sfumato.tasks import sudoku

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from ui_server import FLAGS, PageServer, Refusal, Reply, chat, draft, drafts, usage  # noqa: E402

OUT = ROOT / "docs" / "ui"
QUESTION = "How did Leonardo paint without lines?"
ANSWER = """He let one tone pass into the next, like smoke. Sfumato he called it: “without lines or borders, in the \
manner of smoke, or beyond the plane of focus.”

Glaze lay upon glaze, each thinner than a hair, so that no edge was ever drawn. A corner of the mouth, an eyelid, the \
far hills: they are found by the eye rather than given to it. What is certain stands in the light; what is not yet \
decided stays in shadow until the whole picture has settled."""
MARKDOWN = """## How a canvas clears

A **canvas** of 256 places starts as noise. Each step *accepts* what is certain, within $H \\le 0.1$ nats:

1. read all places at once,
2. accept the surest,
   - [x] the rest is drawn anew.

| step | entropy | accepted |
|-----:|:-------:|----------|
| 1 | 2.41 | 12 of 256 |
| 12 | 0.03 | 250 of 256 |

```python
def accept(entropies, bound=0.1):  # lowest first
    return [h for h in sorted(entropies) if h < bound]
```

$$\\sum_{i=1}^{n} H_i \\leq \\frac{\\beta}{2}$$
"""
NOTE = "The valley lay quiet. {}By noon the hills had come back, one after another, each a little bluer than the last."
MIDDLE = "Mist had filled it to the brim in the night, and nothing stood out but the bell tower. "


def board(body: dict[str, Any], hold: threading.Event) -> list[Any]:
    """A solved board in six steps; waits after the third."""
    puzzle = body["messages"][0]["content"].split("\n")[1]
    solution = sudoku.solve(puzzle)
    assert solution is not None
    draws = random.Random(3)
    settles = [0.0 if clue != "0" else draws.uniform(0.5, 6) for clue in puzzle]
    script: list[Any] = []
    for step in range(1, 7):
        left = [max(0.0, at - step) for at in settles]
        pieces = [c if far < 1 else draws.choice("123456789") for c, far in zip(solution, left, strict=True)]
        one = draft(pieces, [min(2.2, 0.75 * far) for far in left], step, padding=1)
        script.append({"object": "fill", "draft": one})
        if step == 3:
            script.append(hold)
    return [*script, {"object": "fill", "text": solution, "usage": usage(81, 6, 0.21)}]


def infill(body: dict[str, Any]) -> list[Any]:
    whole = body["prefix"] + MIDDLE + body["suffix"]
    some = [{"object": "infill", "draft": one} for one in drafts(whole, 7)]
    return [*some, {"object": "infill", "text": whole, "middle": MIDDLE, "usage": usage(19, 7, 0.62)}]


SHARES: dict[str, list[float]] = {"team": [0.93, 0.04, 0.01, 0.02], "anger": [0.06, 0.55, 0.34, 0.05]}
PASSAGES = {
    "Please give the second payment back by Friday, or I shall ask my bank to.": 0.88,
    "Subject: Charged twice": 0.09,
}


def decide(body: dict[str, Any]) -> Reply:
    """The answers to the first example of the tab."""
    answers: dict[str, Any] = {}
    for id, record in body["questions"].items():
        if record["type"] == "noul":
            answers[id] = {"noul": 0.984, "x_confidence": choice_confidence([0.984, 0.016])}
        elif record["type"] == "x_span":
            first = next(iter(PASSAGES))
            start = body["state"].index(first)
            place = {"passage": first, "start": start, "end": start + len(first)}
            answers[id] = {**place, "probabilities": PASSAGES, "confidence": choice_confidence([*PASSAGES.values()])}
        elif record["type"] == "choice":
            shares = dict(zip(record["criteria"], SHARES[id], strict=True))
            likeliest = max(shares, key=shares.__getitem__)
            answers[id] = {"choice": likeliest, "probabilities": shares, "confidence": choice_confidence(SHARES[id])}
        else:
            levels = {str(level): share for level, share in enumerate(SHARES[id])}
            score = sum(level * share for level, share in enumerate(SHARES[id]))
            legend = dict(zip(levels, record["criteria"], strict=True))
            confidence = score_confidence(SHARES[id])
            answers[id] = {"score": score, "legend": legend, "probabilities": levels, "confidence": confidence}
        answers[id]["type"] = record["type"]
    return Reply({"model": "nano", "answers": answers, "usage": {"input_tokens": 541, "output_tokens": 4}})


def shoot(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.screenshot(path=OUT / f"{name}.png", animations="disabled")
    with Image.open(OUT / f"{name}.png") as picture:
        picture.convert("RGB").quantize(160).save(OUT / f"{name}.png", optimize=True)


def say(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


class Screen:
    """A browser on a server whose answers are written here; `hold` keeps an answer at a draft until it is set."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.server, self.hold = browser, PageServer(), threading.Event()
        self.server.scripts = {
            "/v1/chat/completions": [chat(ANSWER, 12, self.hold, 5)],
            "/v1/infill": [infill],
            "/v1/fill": [lambda body: board(body, self.hold)],
            "/v1/systemone": [decide],
        }

    def open_page(self, width: int, height: int, scheme: Any, is_phone: bool = False) -> Page:
        self.hold.clear()
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            device_scale_factor=1.5 if is_phone else 1,
            is_mobile=is_phone,
            has_touch=is_phone,
            reduced_motion="reduce",
        )
        page = context.new_page()
        page.goto(self.server.url)
        page.wait_for_selector("[data-state=ready]")
        return page

    def chat_pictures(self) -> None:
        """A draft, its replay in the dark, and a server that is busy."""
        page = self.open_page(1200, 720, "light")
        say(page, QUESTION)
        page.get_by_text("Canvas 1, step 5,").wait_for()
        shoot(page, "chat")
        self.hold.set()
        page.get_by_role("button", name="Regenerate").wait_for()
        page.emulate_media(color_scheme="dark")
        page.locator(".replay").press("Home")
        for _ in range(6):
            page.locator(".replay").press("ArrowRight")
        shoot(page, "replay-dark")
        self.server.scripts["/v1/chat/completions"] = [
            Refusal(503, "overloaded_error", "256 requests wait, as many as the queue holds.", {"Retry-After": "1"})
        ]
        page.locator(".replay").press("End")
        say(page, "And the far hills?")
        page.locator("#log .trouble").wait_for()
        shoot(page, "busy-dark")

    def markdown_picture(self) -> None:
        self.server.scripts["/v1/chat/completions"] = [chat(MARKDOWN)]
        page = self.open_page(1200, 860, "light")
        say(page, "How does a canvas clear? Answer in Markdown.")
        page.get_by_role("button", name="Regenerate").wait_for()
        page.evaluate("scrollTo(0, 0)")
        shoot(page, "markdown")

    def stopped_picture(self) -> None:
        """A draft that was stopped, in the dark, on a phone."""
        self.server.scripts["/v1/chat/completions"] = [chat(ANSWER, 12, self.hold, 6)]
        page = self.open_page(390, 660, "dark", is_phone=True)
        say(page, QUESTION)
        page.get_by_text("Canvas 1, step 6,").wait_for()
        page.locator("#stop").click()
        self.hold.set()
        page.get_by_role("button", name="Use the draft").scroll_into_view_if_needed()
        page.locator("#message").blur()
        page.evaluate("scrollTo(0, 150)")
        shoot(page, "stopped-dark")

    def tabs_picture(self) -> None:
        """Two tabs of one chat, side by side: a question of the first, its other version of the second."""
        scripts = [chat("One tone passes into the next, like smoke."), chat("He glazed, layer upon layer.")]
        self.server.scripts["/v1/chat/completions"] = list(scripts)
        first = self.open_page(620, 620, "light")
        say(first, QUESTION)
        first.get_by_role("button", name="Regenerate").wait_for()
        second = first.context.new_page()
        second.set_viewport_size({"width": 620, "height": 620})
        second.goto(self.server.url)
        second.get_by_role("button", name="Edit").click()
        second.get_by_label("Edit the message").fill("How did Leonardo paint smoke?")
        second.get_by_label("Edit the message").press("Enter")
        second.locator(".committed", has_text="He glazed").wait_for()
        first.reload()
        first.locator(".said .branches").get_by_label("Previous version").click()
        for name, page in (("first", first), ("second", second)):
            page.evaluate("scrollTo(0, 0)")
            page.locator("#message").blur()
            page.screenshot(path=OUT / f"{name}.png", animations="disabled")
        with Image.new("RGB", (1250, 620), "#888") as both:
            for at, name in enumerate(("first", "second")):
                with Image.open(OUT / f"{name}.png") as one:
                    both.paste(one, (630 * at, 0))
                (OUT / f"{name}.png").unlink()
            both.quantize(160).save(OUT / "tabs.png", optimize=True)

    def editor_picture(self) -> None:
        page = self.open_page(1200, 900, "light")
        page.get_by_role("link", name="Editor").click()
        text = page.locator("#text")
        text.fill(NOTE.format(""))
        text.evaluate("(field, at) => { field.focus(); field.setSelectionRange(at, at); }", NOTE.index("{"))
        page.locator("#infill").click()
        page.locator("#accept").wait_for()
        page.evaluate("scrollTo(0, 0)")
        shoot(page, "editor")

    def decide_pictures(self) -> None:
        """An e-mail and four questions, in the light; two of them on a phone, in the dark."""
        page = self.open_page(1200, 1080, "light")
        self.load_example(page)
        shoot(page, "decide")
        page = self.open_page(390, 660, "dark", is_phone=True)
        self.load_example(page)
        page.get_by_role("article", name="Question anger").evaluate("card => card.scrollIntoView()")
        shoot(page, "decide-dark")

    def load_example(self, page: Page) -> None:
        page.get_by_role("link", name="Decide").click()
        page.locator("#decide-example").select_option("An e-mail to route")
        page.locator("#decide-status", has_text="4 answers").wait_for()
        page.evaluate("scrollTo(0, 0)")

    def sudoku_picture(self) -> None:
        page = self.open_page(1200, 880, "dark")
        page.get_by_role("link", name="Sudoku").click()
        page.locator("#sample").select_option("3")
        page.locator("#solve").click()
        page.get_by_text("Canvas 1, step 3,").wait_for()
        shoot(page, "sudoku-dark")
        self.hold.set()

    def settings_picture(self) -> None:
        page = self.open_page(1200, 1040, "light")
        page.get_by_role("link", name="Settings").click()
        page.locator("#option-max_steps").fill("24")
        page.evaluate("scrollTo(0, 0)")
        shoot(page, "settings")

    def phone_picture(self) -> None:
        self.server.scripts["/v1/chat/completions"] = [chat(ANSWER, 12, self.hold, 6)]
        page = self.open_page(390, 660, "light", is_phone=True)
        say(page, QUESTION)
        page.get_by_text("Canvas 1, step 6,").wait_for()
        page.evaluate("scrollTo(0, 0)")
        shoot(page, "phone")
        self.hold.set()


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        screen = Screen(browser)
        screen.chat_pictures()
        screen.markdown_picture()
        screen.stopped_picture()
        screen.tabs_picture()
        screen.editor_picture()
        screen.decide_pictures()
        screen.sudoku_picture()
        screen.settings_picture()
        screen.phone_picture()
        browser.close()
    screen.server.close()


if __name__ == "__main__":
    main()
