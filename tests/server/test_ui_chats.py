"""server/ui/: what is kept of chats, in a browser over `ui_server`: drafts, versions, tabs, undo, search, files."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import ui_page
from ui_page import expect, go, say
from ui_server import PageServer, Refusal, chat, draft, drafts

browser, server, page, pytestmark = ui_page.browser, ui_page.server, ui_page.page, ui_page.needs_chromium
CHAT = "/v1/chat/completions"


def contents(body: dict[str, Any]) -> list[Any]:
    return [message["content"] for message in body["messages"]]


def until_stored(page: Any, text: str) -> None:
    """Wait until this tab's copy of the storage holds a text: what another process writes arrives a little later."""
    page.wait_for_function("text => Object.values(localStorage).some((value) => value.includes(text))", arg=text)


def test_stop_keeps_the_draft_as_one(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    text = "Tones pass into one another like smoke."
    server.scripts[CHAT] = [chat(text, 6, hold, 3), chat("Well.")]
    say(page, "Draw")
    expect(page.locator(".where")).to_contain_text("step 3,")
    drawn = "".join(drafts(text, 6)[2]["pieces"])
    page.keyboard.press("Escape")
    hold.set()
    for _ in range(2):  # as it is stopped, and after a reload
        expect(page.locator(".note")).to_contain_text("Stopped. Above stands the draft")
        expect(page.locator(".canvas.stopped")).to_be_visible()
        assert page.locator(".canvas").text_content() == drawn
        assert page.locator(".canvas .l4, .canvas .l5, .canvas .l6").count()
        page.reload()
    say(page, "And?")
    expect(page.locator(".committed").last).to_have_text("Well.")
    assert contents(server.bodies(CHAT)[-1]) == ["Draw", "And?"]  # a draft is no answer,
    page.get_by_role("button", name="Use the draft").click()
    expect(page.locator(".committed").first).to_have_text(drawn.strip())
    say(page, "More")  # unless it is taken as one
    expect(page.locator(".committed").nth(2)).to_have_text("Well.")
    assert contents(server.bodies(CHAT)[-1]) == ["Draw", drawn, "And?", "Well.", "More"]


def test_an_answer_is_kept_when_its_page_is_closed(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    half = [{"choices": [{"index": 0, "delta": {"content": "Half"}}]}, hold]
    server.scripts[CHAT] = [half]
    say(page, "Draw")
    expect(page.locator(".committed")).to_have_text("Half")
    page.reload()
    expect(page.locator(".committed")).to_have_text("Half")
    expect(page.locator(".note")).to_have_text("Stopped: the page was closed.")
    hold.set()


def test_a_message_and_an_answer_have_versions(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One."), chat("Two."), chat("Three."), chat("Four.")]
    say(page, "First")
    expect(page.locator(".committed")).to_have_text("One.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".committed")).to_have_text("Two.")
    expect(page.locator(".answer .branches")).to_contain_text("2/2")
    page.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    field.fill("x")
    field.press("Escape")
    expect(page.locator(".said .plain")).to_have_text("First")
    page.get_by_role("button", name="Edit").press("Enter")
    field.fill("First, again")
    field.press("Enter")
    expect(page.locator(".committed")).to_have_text("Three.")
    assert contents(server.bodies(CHAT)[-1]) == ["First, again"]
    expect(page.locator(".said .branches")).to_contain_text("2/2")
    page.reload()
    page.locator(".said").get_by_role("button", name="Previous version").click()
    expect(page.locator(".said .plain")).to_have_text("First")
    expect(page.locator(".committed")).to_have_text("Two.")
    expect(page.locator(".said").get_by_role("button", name="Next version")).to_be_focused()
    page.locator(".answer").get_by_role("button", name="Previous version").click()
    expect(page.locator(".committed")).to_have_text("One.")
    say(page, "Second")
    expect(page.locator(".committed").last).to_have_text("Four.")
    assert contents(server.bodies(CHAT)[-1]) == ["First", "One.", "Second"]


def test_a_version_that_fails_leaves_the_one_before(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One."), Refusal(503, "overloaded_error", "256 requests wait."), chat("Two.")]
    say(page, "First")
    expect(page.locator(".committed")).to_have_text("One.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#log .trouble")).to_contain_text("The server is busy")
    expect(page.locator(".committed")).to_have_text("One.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".committed")).to_have_text("Two.")
    expect(page.locator(".answer .branches")).to_contain_text("2/2")


def test_two_tabs_lose_no_message(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    server.scripts[CHAT] = [chat("One."), chat("From the first.", 6, hold, 3), chat("From the second.", 6, hold, 3)]
    say(page, "Start")
    expect(page.locator(".committed")).to_have_text("One.")
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.locator(".committed")).to_have_text("One.")
    say(page, "First tab")
    expect(page.locator(".where").last).to_contain_text("step 3,")
    expect(other.locator(".said .plain").last).to_have_text("First tab")
    other.locator("#new-chat").click()
    other.locator("#chats .title").click()
    other.locator(".said").last.get_by_role("button", name="Edit").click()
    other.get_by_label("Edit the message").fill("Second tab")
    other.get_by_label("Edit the message").press("Enter")
    expect(other.locator(".where").last).to_contain_text("step 3,")
    hold.set()
    expect(page.locator(".committed").last).to_have_text("From the first.")
    expect(other.locator(".committed").last).to_have_text("From the second.")
    for one in (page, other):
        one.reload()
        expect(one.locator(".said .branches")).to_contain_text("/2")
    for text in ("Start", "One.", "First tab", "From the first.", "Second tab", "From the second."):
        until_stored(page, text)
    page.locator("#message").fill("typed in the first")
    other.locator("#message").fill("typed in the second")
    page.reload()
    expect(page.locator("#message")).to_have_value("typed in the first")
    other.get_by_role("button", name="Delete Start").click()
    expect(page.locator("#toasts")).to_contain_text("deleted in another tab")
    expect(page.locator("#chats li")).to_have_count(0)
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    expect(page.locator(".said")).to_have_count(2)
    expect(other.locator("#chats li")).to_have_count(1)
    other.close()


def test_many_writes_of_two_tabs_at_once_are_all_kept(page: Any, server: PageServer) -> None:
    """The modules themselves, as fast as two tabs can, in two processes or one."""
    other = page.context.new_page()
    other.goto(server.url)
    write = """async ([name, id]) => {
      const [history, tree] = await Promise.all([import("/ui/history.js"), import("/ui/tree.js")]);
      for (let at = 0; at < 40; at++) {
        const chat = history.find(id) ?? { ...tree.freshChat(), id };
        history.keep(chat, tree.add(chat, { role: "user", content: `${name} ${at}` }));
        if (at % 4 === 0) await new Promise((done) => setTimeout(done));
      }
    }"""
    for one, name in ((page, "a"), (other, "b")):
        one.evaluate(f"([write, name]) => {{ window.done = ({write})([name, 'shared']); }}", [write, name])
    for one in (page, other):
        one.evaluate("() => window.done")
    kept = (
        "async () => [...(await import('/ui/history.js')).find('shared').messages.values()].map((one) => one.content)"
    )
    for one in (page, other):  # another process's last writes arrive a little after it has made them
        one.wait_for_function(f"async () => (await ({kept})()).length >= 80")
        assert sorted(one.evaluate(kept)) == sorted(f"{name} {at}" for name in "ab" for at in range(40))
    other.close()


def test_deleting_can_be_undone_until_it_is_final(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One.")]
    for text in ("Alpha", "Beta"):
        page.locator("#new-chat").click()
        say(page, text)
        expect(page.locator(".committed")).to_have_text("One.")
    page.get_by_role("button", name="Delete Beta").click()
    expect(page.locator(".empty")).to_be_visible()
    expect(page.locator("#toasts").get_by_role("button", name="Undo")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".said .plain")).to_have_text("Beta")
    page.locator(".files summary").click()
    page.locator("#delete-all").click()
    expect(page.locator("#toasts")).to_contain_text("2 chats are deleted.")
    expect(page.locator("#chats li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#chats .title")).to_have_count(2)
    page.get_by_role("button", name="Delete Alpha").click()
    page.get_by_role("button", name="Dismiss").click()
    assert "Alpha" not in page.evaluate("JSON.stringify(localStorage)")


def test_search_leads_to_the_message(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("Under the bridge."), chat("Nothing."), chat("Over it.")]
    say(page, "Where is the Troll?")
    expect(page.locator(".committed")).to_have_text("Under the bridge.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".committed")).to_have_text("Nothing.")
    page.locator("#new-chat").click()
    say(page, "Another")
    expect(page.locator(".committed")).to_have_text("Over it.")
    page.locator("#search").fill("BRIDGE")
    expect(page.locator("#chats .title")).to_have_count(1)
    expect(page.locator("#chats mark")).to_have_text("bridge")
    page.locator("#chats .title").click()
    expect(page.locator(".committed")).to_have_text("Under the bridge.")  # the version that holds it
    page.locator("#search").fill("giraffe")
    expect(page.locator("#none")).to_be_visible()
    page.locator("#search").fill("")
    expect(page.locator("#chats .title")).to_have_count(2)


def test_chats_leave_as_files_and_come_back(page: Any, server: PageServer, tmp_path: Path) -> None:
    server.scripts[CHAT] = [chat("One, **bold**."), chat("Two.")]
    say(page, "First question")
    expect(page.locator(".committed")).to_have_text("One, bold.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".committed")).to_have_text("Two.")
    page.locator(".files summary").click()
    with page.expect_download() as markdown:
        page.locator("#export-markdown").click()
    assert markdown.value.suggested_filename == "First-question.md"
    assert (
        Path(markdown.value.path()).read_text() == "# First question\n\n## You\n\nFirst question\n\n## Answer\n\nTwo.\n"
    )
    with page.expect_download() as everything:
        page.locator("#export-all").click()
    file = tmp_path / "chats.json"
    file.write_bytes(Path(everything.value.path()).read_bytes())
    page.locator("#import").set_input_files(file)
    expect(page.locator("#import-note")).to_have_text("1 taken.")
    expect(page.locator("#chats .title")).to_have_count(1)  # the same chat is not doubled
    page.locator("#delete-all").click()
    page.get_by_role("button", name="Dismiss").click()
    page.locator("#import").set_input_files(file)
    expect(page.locator("#chats .title")).to_have_text("First question")
    page.locator("#chats .title").click()
    expect(page.locator(".committed")).to_have_text("Two.")
    expect(page.locator(".branches")).to_contain_text("2/2")
    file.write_text('{"a": 1}')
    page.locator("#import").set_input_files(file)
    expect(page.locator("#import-note")).to_contain_text("holds no chats of this page")


def test_a_chat_has_a_system_prompt_of_its_own(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One.")]
    go(page, "Settings")
    page.locator("#system").fill("Be brief.")
    go(page, "Chat")
    page.locator(".system summary").click()
    expect(page.locator("#chat-system")).to_have_value("Be brief.")
    page.locator("#chat-system").fill("Speak Latin.")
    say(page, "Hello")
    expect(page.locator(".committed")).to_have_text("One.")
    assert contents(server.bodies(CHAT)[-1]) == ["Speak Latin.", "Hello"]
    page.locator("#new-chat").click()
    expect(page.locator("#chat-system")).to_have_value("Be brief.")
    page.locator("#chats .title").click()
    expect(page.locator("#chat-system")).to_have_value("Speak Latin.")
    page.locator("#system-back").click()
    say(page, "Again")
    expect(page.locator(".committed").nth(1)).to_have_text("One.")
    assert contents(server.bodies(CHAT)[-1]) == ["Be brief.", "Hello", "One.", "Again"]


def test_what_limits_answers_is_said_and_can_be_ended(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One.")]
    expect(page.locator("#limits")).to_be_hidden()
    go(page, "Settings")
    page.locator("#option-max_tokens").fill("20")
    page.locator("#option-seed").fill("3")
    page.locator("#option-max_steps").fill("12")
    go(page, "Chat")
    chips = page.locator("#limits .chip")
    expect(chips).to_have_text(["Longest answer, in tokens: 20 ×", "Seed: 3 ×"])
    expect(page.locator("#limits a")).to_have_text("1 setting changed")
    chips.first.click()
    expect(chips).to_have_count(1)
    expect(chips.first).to_be_focused()
    say(page, "Hello")
    expect(page.locator(".committed")).to_have_text("One.")
    (body,) = server.bodies(CHAT)
    assert "max_tokens" not in body and body["seed"] == 3 and body["max_steps"] == 12
    go(page, "Settings")
    expect(page.locator("#option-max_tokens")).to_have_value("")


def test_the_gauge_folds_and_stays_so(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("One.")]
    say(page, "Hello")
    expect(page.locator(".facts")).to_be_visible()
    page.locator(".gauge summary").click()
    expect(page.locator(".facts")).to_be_hidden()
    expect(page.locator(".gauge summary")).to_contain_text("6, ")
    page.reload()
    expect(page.locator(".gauge summary")).to_be_visible()
    expect(page.locator(".facts")).to_be_hidden()


def test_a_full_browser_says_so_and_loses_nothing(page: Any, server: PageServer) -> None:
    server.scripts[CHAT] = [chat("The answer that found no room.")]
    page.evaluate(
        "() => { for (let size = 1 << 22; size; size >>= 1)"
        " try { localStorage[`x${size}`] = 'x'.repeat(size); } catch {} }"
    )
    say(page, "Hello there")
    expect(page.locator(".committed")).to_have_text("The answer that found no room.")
    expect(page.locator("#full")).to_be_visible()
    with page.expect_download() as everything:
        page.locator("#full-export").click()
    assert "found no room" in Path(everything.value.path()).read_text()
    page.locator("#new-chat").click()
    page.locator("#chats .title").click()
    expect(page.locator(".committed")).to_have_text("The answer that found no room.")
    page.evaluate(
        "() => { for (const name of Object.keys(localStorage)) if (name.startsWith('x')) delete localStorage[name]; }"
    )
    page.locator(".gauge summary").click()
    say(page, "Again")
    expect(page.locator(".committed")).to_have_count(2)
    expect(page.locator("#full")).to_be_hidden()
    page.reload()
    expect(page.locator(".committed")).to_have_count(2)


def test_the_purpose_of_a_model_is_said_until_it_is_dismissed(page: Any, server: PageServer) -> None:
    expect(page.locator("#purpose")).to_be_hidden()
    server.purpose = {"purpose": "nano solves Sudoku and nothing else", "prompt": "Solve this Sudoku:"}
    server.scripts[CHAT] = [chat("4"), chat("5")]
    page.reload()
    remedy = "For anything else start the server with another model: sfumato serve owner/name"
    expect(page.locator("#purpose p")).to_have_text(f"nano solves Sudoku and nothing else. {remedy}")
    page.get_by_role("button", name="Dismiss the note").click()
    page.reload()
    expect(page.locator("#model-name")).to_have_text("nano")
    expect(page.locator("#purpose")).to_be_hidden()
    say(page, "Who are you?")
    expect(page.locator(".said .note")).to_have_text("nano solves Sudoku and nothing else.")
    expect(page.locator(".committed")).to_have_text("4")
    say(page, "Solve this Sudoku:\n1")
    expect(page.locator(".committed")).to_have_count(2)
    expect(page.locator(".said .note")).to_have_count(1)


def test_markdown_is_elements_and_code_is_copied(page: Any, server: PageServer) -> None:
    text = "# Title\n\n- a\n- **b**\n\n| x | y |\n|--|--|\n| 1 | 2 |\n"
    text += "\n```py\nx = 'a'  # b\n```\n\n$a_1$ [go](https://x.y) שלום"
    server.scripts[CHAT] = [chat(text)]
    say(page, "Show me")
    answer = page.locator(".committed")
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("li strong")).to_have_text("b")
    expect(answer.locator("td")).to_have_text(["1", "2"])
    expect(answer.locator(".math sub")).to_have_text("1")
    link = answer.locator("a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    answer.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 'a'  # b"
    assert answer.locator("pre").get_attribute("tabindex") == "0"


CONTRASTS = """places => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const blend = (...colors) => {
    for (const color of colors) {
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (...colors) => blend(...colors).map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const grounds = (node) => (node ? [...grounds(node.parentElement), getComputedStyle(node).backgroundColor] : []);
  const textOf = (node) => (node.tagName === "INPUT" ? node.value : node.textContent.slice(0, 20));
  const isRead = (node) => node.checkVisibility()
    && (node.tagName === "INPUT" || [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return [...document.querySelectorAll(places)].filter(isRead).map((node) => {
    const below = grounds(node);
    const [one, other] = [light(...below, getComputedStyle(node).color), light(...below)];
    return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), textOf(node)];
  });
}"""
"""For everything that can be read in some places: its contrast (WCAG 2), and what it is."""


def test_text_is_readable_in_light_and_in_dark(page: Any, server: PageServer) -> None:
    """4.5 to 1 for what stays, 3 to 1 for a draft that passes (WCAG 2, AA)."""
    text = "# T\n\nText `code` and **1234567890**\n\n> quoted\n"
    text += "\n```py\ndef f(): return 'a' + 12  # note\n```\n\n| a |\n|--|\n| 7 |"
    hold = threading.Event()
    board = [2.5 if at % 4 else 0.9 for at in range(81)]
    puzzle = [{"object": "fill", "draft": draft(list("123456789" * 9), board, 1)}, hold]
    server.scripts = {CHAT: [chat(text), chat(text, 6, hold, 1)], "/v1/fill": [puzzle]}
    say(page, "Show me")
    expect(page.locator(".committed td")).to_be_visible()
    say(page, "And stop")
    expect(page.locator(".where").last).to_contain_text("step 1,")
    page.keyboard.press("Escape")
    expect(page.locator(".canvas.stopped")).to_be_visible()
    page.locator(".replay").first.press("Home")
    expect(page.locator(".canvas").first).to_be_visible()
    go(page, "Sudoku")
    page.locator("#clear-board").click()
    page.locator("#solve").click()
    expect(page.locator("#board .l6").first).to_have_value("2")
    stays = ".said *, .facts *, .shelf *, .actions *, .gauge summary, .canvas.stopped *"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(250)
        digits = page.evaluate(CONTRASTS, "#board input")
        assert len(digits) == 81 and min(digits)[0] > 4.5, (scheme, sorted(digits)[:3])
        go(page, "Chat")
        expect(page.locator(".canvas:not(.stopped) .t").first).to_be_visible()
        passing = page.evaluate(CONTRASTS, ".canvas:not(.stopped) .t > span, .canvas:not(.stopped) .t")
        assert len(passing) > 15 and min(passing)[0] > 3, (scheme, sorted(passing)[:3])
        page.locator(".replay").first.press("End")
        expect(page.locator(".committed td")).to_be_visible()
        pairs = page.evaluate(CONTRASTS, f"{stays}, .committed *")
        assert len(pairs) > 30 and min(pairs)[0] > 4.5, (scheme, sorted(pairs)[:3])
        page.locator(".replay").first.press("Home")
        go(page, "Sudoku")
        expect(page.locator("#board")).to_be_visible()
    hold.set()


def test_a_phone_holds_all_of_it(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    wide = "| " + " | ".join(f"column{at}" for at in range(12)) + " |\n" + "|--" * 12 + "|\n"
    text = f"{wide}\n```js\n{'y' * 300}\n```\n\n$${'x+' * 200}$$\n\n{'smoke' * 60}\n\nhttps://x.y/{'z' * 200}"
    server.scripts[CHAT] = [chat(text)]
    say(page, "مرحبا " + "o" * 200)
    expect(page.locator(".committed table")).to_be_visible()
    page.locator("#shelf-handle").click()
    page.locator(".files summary").click()
    page.locator(".system summary").click()
    page.get_by_role("button", name="Edit").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide_ones = page.locator("main *").evaluate_all(
        "all => all.filter(e => e.checkVisibility() && !e.closest('pre, .scroll, .unseen')"
        " && e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide_ones == []
    small = page.locator("button").evaluate_all(
        "all => all.filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 24)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert small == []  # WCAG 2.2: a target has 24 pixels at least


def test_the_earlier_pages_chats_are_opened(page: Any, server: PageServer) -> None:
    old = [
        {
            "id": "old1",
            "title": "Kept",
            "updated": 5,
            "messages": [{"role": "user", "content": "Then"}, {"role": "assistant", "content": "Now", "thought": ""}],
        }
    ]
    page.evaluate(
        "text => { localStorage['sfumato.chats'] = text; localStorage['sfumato.chat'] = '\"old1\"';"
        " sessionStorage.clear(); }",
        json.dumps(old),
    )
    page.reload()
    expect(page.locator(".said .plain")).to_have_text("Then")
    expect(page.locator(".committed")).to_have_text("Now")
    expect(page.locator("#chats .title")).to_have_text("Kept")
    names = page.evaluate("Object.keys(localStorage)")
    assert (
        "sfumato.chats" not in names
        and len([name for name in names if re.match(r"sfumato\.message\.old1\.", name)]) == 2
    )


def test_results_that_two_tabs_gave_can_both_be_reached(page: Any, server: PageServer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = [{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **call}]}}]}]
    server.scripts[CHAT] = [calling, chat("First.")]
    say(page, "Call")
    expect(page.get_by_label("Result of f")).to_be_visible()
    other = page.context.new_page()
    other.goto(server.url)
    page.get_by_label("Result of f").fill("one")
    page.get_by_role("button", name="Send the result").click()
    expect(page.locator(".committed").last).to_have_text("First.")
    until_stored(other, "First.")
    other.evaluate(
        """async () => {
      const [history, tree] = await Promise.all([import("/ui/history.js"), import("/ui/tree.js")]);
      const chat = history.find(history.list()[0].id);
      const call = tree.pathTo(chat).find((one) => one.tool_calls);
      const message = { role: "tool", tool_call_id: "c", name: "f", content: "two" };
      history.keep(chat, tree.add(chat, message, call.id));
    }"""
    )
    until_stored(page, '"two"')
    page.reload()
    expect(page.locator(".result pre")).to_have_text("two")
    page.locator(".result").get_by_role("button", name="Previous version").click()
    expect(page.locator(".result pre")).to_have_text("one")
    expect(page.locator(".committed").last).to_have_text("First.")
    other.close()


def test_a_hostile_answer_is_drawn(page: Any, server: PageServer) -> None:
    """Texts whose elements are many or deep: no stack runs over, and the page goes on."""
    units = ("*a* ", "a_b^c ", "- a\n", "{", "\\frac", "^", "*a **b ", "> ", "/*'\"# ", "|a")
    texts = [unit * (300_000 // len(unit)) for unit in units]
    texts = [text[:300_000] for text in [*texts[:3], *texts[6:8]]] + [
        *(f"$$\n{(unit * 50_000)[:100_000]}\n$$" for unit in units[1:6]),
        *(f"```py\n{(unit * 50_000)[:39_000]}\n```" for unit in units[8:]),
    ]
    milliseconds = page.evaluate(
        """async (texts) => {
      const { showMarkdown } = await import("/ui/prose.js");
      return texts.map((text) => {
        const box = document.createElement("div");
        const start = performance.now();
        showMarkdown(box, text);
        if (box.textContent.length * 20 < text.length && !text.startsWith("> ")) throw new Error(text.slice(0, 9));
        return performance.now() - start;
      });
    }""",
        texts,
    )
    assert len(milliseconds) == 12 and max(milliseconds) < 20_000
