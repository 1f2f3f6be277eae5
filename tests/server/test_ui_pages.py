"""server/ui/: the page in a real browser over `ui_server`: the editor, the Sudoku board, the settings."""

from __future__ import annotations

import re
import threading
from typing import Any

import ui_page
from ui_page import UI, expect, go, say
from ui_server import PageServer, Refusal, chat, draft, drafts, usage

browser, server, page, pytestmark = ui_page.browser, ui_page.server, ui_page.page, ui_page.needs_chromium


# ---- editor ------------------------------------------------------------------------------------------------------


def test_fill_the_middle_is_proposed_accepted_and_undone(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    prefix, middle, suffix = "The sky ", "was grey and ", "still."
    whole = prefix + middle + suffix
    some = [{"object": "infill", "draft": one} for one in drafts(whole, 4)]
    result = {"object": "infill", "text": whole, "middle": middle, "usage": usage(4, 4)}
    server.scripts["/v1/infill"] = [[*some, hold, result]]
    go(page, "Editor")
    text = page.locator("#text")
    text.fill(prefix + suffix)
    text.evaluate("(field, at) => { field.focus(); field.setSelectionRange(at, at); }", len(prefix))
    page.locator("#at-most").fill("12")
    page.locator("#infill").click()
    expect(page.locator("#proposal .canvas")).to_have_text(whole)
    hold.set()
    expect(page.locator("#proposal ins")).to_have_text(middle)
    (body,) = server.bodies("/v1/infill")
    assert (body["prefix"], body["suffix"], body["at_most"]) == (prefix, suffix, 12)
    page.keyboard.press("Enter")
    expect(text).to_have_value(whole)
    assert text.evaluate("field => field.value.slice(field.selectionStart, field.selectionEnd)") == middle
    page.locator("#undo").click()
    expect(text).to_have_value(prefix + suffix)


def test_the_selection_is_rewritten_in_place_and_can_be_rejected(page: Any, server: PageServer) -> None:
    old, new = "😀 A cold grey morning came.", "😀 A warm grey evening came."
    server.scripts["/v1/edit"] = [[{"object": "edit", "text": new, "diff": "", "usage": usage(5, 4)}]]
    go(page, "Editor")
    text = page.locator("#text")
    text.fill(old)
    start, stop = old.index("cold"), old.index(" came")
    # JavaScript counts the first character as two.
    text.evaluate("(field, [a, b]) => { field.focus(); field.setSelectionRange(a, b); }", [start + 1, stop + 1])
    page.locator("#instruction").fill("Make it warm")
    page.locator("#rewrite").click()
    expect(page.locator("#proposal ins")).to_have_text(["warm", "evening"])
    expect(page.locator("#proposal del")).to_have_text(["cold", "morning"])
    (body,) = server.bodies("/v1/edit")
    assert body["text"] == old and body["spans"] == [[start, stop]] and body["instruction"] == "Make it warm"
    page.keyboard.press("Escape")
    expect(text).to_have_value(old)
    text.press("Control+a")
    text.press("ArrowRight")
    page.locator("#rewrite").click()
    page.locator("#accept").click()
    expect(text).to_have_value(new)
    assert "spans" not in server.bodies("/v1/edit")[1]


def test_an_edit_that_fails_leaves_the_text(page: Any, server: PageServer) -> None:
    refusal = Refusal(400, "invalid_request_error", "t_max is 900; give at most 100", param="t_max")
    result = {"object": "infill", "text": "ab", "middle": "b", "usage": usage(1, 1)}
    server.scripts["/v1/infill"] = [refusal, [result]]
    go(page, "Editor")
    page.locator("#text").fill("a")
    page.locator("#text").press("Control+Enter")
    trouble = page.locator("#editor-trouble .trouble")
    expect(trouble).to_contain_text("t_max is 900")
    expect(trouble.get_by_role("link", name="Open the settings")).to_be_visible()
    expect(page.locator("#text")).to_have_value("a")
    trouble.get_by_role("button", name="Try again").click()
    page.locator("#accept").click()
    expect(page.locator("#text")).to_have_value("ab")


# ---- Sudoku ------------------------------------------------------------------------------------------------------

SOLVED = "253614879418973652679528143596741238731289564842356791984167325365892417127435986"
PUZZLE = "".join("0" if at % 3 == 1 else cell for at, cell in enumerate(SOLVED))


def board_script(solution: str, hold: threading.Event | None = None) -> list[Any]:
    first = [c if clue != "0" else "1" for c, clue in zip(solution, PUZZLE, strict=True)]
    some = [draft(first, [0.0 if c != "0" else 1.5 for c in PUZZLE], 1, padding=1)]
    some += [draft(list(solution), [0.0 if c != "0" else 0.2 for c in PUZZLE], 2, padding=1)]
    events = [{"object": "fill", "draft": one} for one in some]
    result = {"object": "fill", "text": solution, "values": {}, "lengths": {}, "usage": usage(27, 2, 0.31)}
    return [events[0], *([hold] if hold else []), events[1], result]


def test_the_board_is_filled_live_and_judged(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    server.scripts["/v1/fill"] = [board_script(SOLVED, hold)]
    go(page, "Sudoku")
    page.locator("#puzzle-text").fill(PUZZLE.replace("0", "."))
    expect(page.locator("#puzzle-note")).to_have_text("54 clues.")
    page.get_by_role("button", name="Solve").click()
    cell = page.get_by_label("Row 1, column 2", exact=True)
    expect(cell).to_have_class("l5")
    expect(cell).to_have_value("1")
    hold.set()
    expect(page.locator("#verdict")).to_have_text("Solved in 2 steps, 0.31 s. Every row, column and box holds.")
    cells = page.locator("#board input").evaluate_all("fields => fields.map(field => field.value).join('')")
    assert cells == SOLVED
    (body,) = server.bodies("/v1/fill")
    assert body["messages"] == [{"role": "user", "content": "Solve this Sudoku:\n" + PUZZLE}]
    slots = [piece for piece in body["template"] if isinstance(piece, dict)]
    assert len(slots) == 27 and slots[0] == {"name": "c1", "length": 1}
    assert "".join("0" if isinstance(piece, dict) else piece for piece in body["template"]) == PUZZLE
    page.locator("#sudoku .replay").press("Home")
    expect(cell).to_have_class("l5")
    page.locator("#sudoku .replay").press("End")
    expect(cell).to_have_value(SOLVED[1])


def test_a_wrong_board_is_called_wrong(page: Any, server: PageServer) -> None:
    wrong = SOLVED[0] + SOLVED[0] + SOLVED[2:]
    server.scripts["/v1/fill"] = [board_script(wrong)]
    go(page, "Sudoku")
    page.locator("#puzzle-text").fill(PUZZLE)
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("#verdict")).to_contain_text(
        f"Not solved in 2 steps, 0.31 s: digit {SOLVED[0]} stands twice in row 1."
    )
    expect(page.locator("#board .conflict").first).to_have_value(SOLVED[0])
    page.locator("#clear-answer").click()
    expect(page.get_by_label("Row 1, column 2", exact=True)).to_have_value("")


def test_the_board_by_keyboard_and_paste(page: Any, server: PageServer) -> None:
    go(page, "Sudoku")
    page.locator("#clear-board").click()
    first = page.get_by_label("Row 1, column 1", exact=True)
    first.focus()
    page.keyboard.type("5")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.type("5")
    expect(first).to_have_class("clue conflict")
    expect(page.get_by_label("Row 2, column 2", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("Digit 5 stands twice in box 1")
    assert server.requests == []
    page.keyboard.press("Backspace")
    expect(first).to_have_class("clue")
    page.evaluate("text => navigator.clipboard.writeText(text)", "\n".join(re.findall(".{9}", PUZZLE)))
    page.keyboard.press("Control+v")
    expect(page.locator("#puzzle-note")).to_have_text("54 clues.")
    page.evaluate("() => navigator.clipboard.writeText('12x')")
    page.keyboard.press("Control+v")
    expect(page.locator("#puzzle-note")).to_contain_text("“x” is no cell")
    for _ in range(3):
        page.locator("#random").click()
        text = "".join(page.locator("#puzzle-text").input_value().split())
        assert len(text) == 81 and 30 <= sum(c != "." for c in text) <= 45
        assert page.locator("#board .conflict").count() == 0


def test_the_built_in_puzzles_have_one_solution_each() -> None:
    from sfumato.tasks import sudoku

    samples = re.findall(r'^  "(\d{81})",$', (UI / "sudoku.js").read_text(), re.MULTILINE)
    assert len(samples) >= 4
    for sample in samples:
        assert sudoku.count_solutions(sudoku.parse(sample)) == 1
        assert 30 <= sum(c != "0" for c in sample) <= 45


def test_escape_stops_and_the_focus_stays_near(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    server.scripts["/v1/infill"] = [[{"object": "infill", "draft": drafts("ab", 2)[0]}, hold]]
    server.scripts["/v1/fill"] = [board_script(SOLVED, hold)]
    go(page, "Editor")
    page.locator("#text").fill("a")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#proposal .canvas")).to_be_visible()
    expect(page.locator("#proposal")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#text")).to_have_value("a")
    go(page, "Sudoku")
    page.locator("#solve").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#sudoku-stop")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#verdict")).to_have_text("Stopped.")
    expect(page.locator("#solve")).to_be_focused()
    hold.set()


# ---- settings ----------------------------------------------------------------------------------------------------


def test_a_changed_setting_is_sent_and_a_default_is_not(page: Any, server: PageServer) -> None:
    server.scripts["/v1/chat/completions"] = [chat("Well.")]
    server.scripts["/v1/fill"] = [board_script(SOLVED)]
    go(page, "Settings")
    page.locator("#option-max_steps").fill("12")
    expect(page.locator("label[for=option-max_steps]")).to_contain_text("Most steps for a canvas")
    page.get_by_text("For those who know the sampler").click()
    page.locator("#option-t_max").fill("0.8")
    page.locator("#option-thinking").check()
    page.locator("#option-mode").select_option("diffusion")
    page.locator("#option-stop").fill("END\nFIN")
    page.locator("#option-schema").fill('{"type": ')
    expect(page.locator("#option-schema-wrong")).to_contain_text("not JSON")
    page.locator("#option-seed").fill("-4")
    expect(page.locator("#option-seed-wrong")).to_contain_text("At least 0.")
    page.reload()
    expect(page.locator("#option-max_steps")).to_have_value("12")
    go(page, "Chat")
    say(page, "Hello")
    expect(page.locator(".committed")).to_have_text("Well.")
    (body,) = server.bodies("/v1/chat/completions")
    own = {"model", "messages", "stream", "stream_options", "drafts"}
    changed = {"max_steps": 12, "thinking": True, "mode": "diffusion", "stop": ["END", "FIN"]}
    assert {name: value for name, value in body.items() if name not in own} == changed
    go(page, "Sudoku")
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("#verdict")).to_contain_text("olved in")
    assert server.bodies("/v1/fill")[0]["max_steps"] == 12 and "stop" not in server.bodies("/v1/fill")[0]
    go(page, "Settings")
    page.get_by_role("button", name="Set max_steps to its default").click()
    page.locator("#drafts").uncheck()
    page.locator("#system").fill("Be brief.")
    go(page, "Chat")
    say(page, "Again")
    expect(page.locator(".committed")).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    last = server.bodies("/v1/chat/completions")[-1]
    assert "max_steps" not in last and "drafts" not in last
    assert last["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_theme_is_switched_and_kept(page: Any) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="dark")
    dark = paper()
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Theme: light")
    assert paper() != dark
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: dark")
    assert paper() == dark
