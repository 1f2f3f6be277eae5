"""server/ui/: the page in a real browser over `ui_server`: chat, troubles, and the page's form."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ui_page
from ui_page import UI, Watch, expect, go, say
from ui_server import CUT, PageServer, Refusal, chat, drafts, usage

browser, server, page, pytestmark = ui_page.browser, ui_page.server, ui_page.page, ui_page.needs_chromium
TEXT = "Tones pass into one another like smoke, without lines or edges."


# ---- chat --------------------------------------------------------------------------------------------------------


def test_a_draft_is_shown_and_then_what_is_committed(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    server.scripts["/v1/chat/completions"] = [chat(TEXT, 6, hold, 3)]
    say(page, "What is sfumato?")
    canvas = page.locator(".answer .canvas")
    expect(page.locator(".where")).to_have_text(re.compile("Canvas 1, step 3, "))
    expected = drafts(TEXT, 6)[2]
    assert canvas.text_content() == "".join(expected["pieces"])
    accepted = canvas.locator(".accepted:not(.beyond)").all_text_contents()
    assert accepted == [p.strip() for p, a in zip(expected["pieces"], expected["accepted"], strict=True) if a and p]
    assert canvas.locator(".l0, .l1").count() and canvas.locator(".l4, .l5, .l6").count()
    expect(page.locator("#stop")).to_be_visible()
    hold.set()
    expect(page.locator(".committed")).to_have_text(TEXT)
    expect(canvas).to_be_hidden()
    expect(page.locator(".facts")).to_contain_text("Tokens per pass")
    expect(page.locator("#announce")).to_contain_text("The answer is complete")
    (body,) = server.bodies("/v1/chat/completions")
    assert body["model"] == "nano" and body["drafts"] is True and body["stream"] is True
    assert body["messages"] == [{"role": "user", "content": "What is sfumato?"}]
    assert page.watch.errors == []


def test_the_slider_replays_every_step(page: Any, server: PageServer) -> None:
    first, second = "Smoke rises. ", "Then it clears."
    script: list[Any] = [{"choices": [], "draft": one} for one in drafts(first, 3)]
    script += [{"choices": [{"index": 0, "delta": {"content": first}}]}]
    script += [{"choices": [], "draft": one} for one in drafts(second, 2, canvas=1)]
    script += [{"choices": [{"index": 0, "delta": {"content": second}}]}, {"choices": [], "usage": usage(9, 5)}]
    server.scripts["/v1/chat/completions"] = [script]
    say(page, "Hello")
    slider, canvas, committed = page.locator(".replay"), page.locator(".canvas"), page.locator(".committed")
    expect(committed).to_have_text(first + second)
    slider.press("Home")
    expect(page.locator(".where")).to_contain_text("Canvas 1, step 1,")
    assert canvas.text_content() == "".join(drafts(first, 3)[0]["pieces"]) and committed.text_content() == ""
    for _ in range(4):
        slider.press("ArrowRight")
    expect(page.locator(".where")).to_contain_text("Canvas 2, step 2,")
    assert canvas.text_content() == "".join(drafts(second, 2)[1]["pieces"])
    assert committed.text_content() == first.strip()
    assert slider.get_attribute("aria-valuetext").startswith("Canvas 2, step 2")
    slider.press("ArrowRight")
    expect(canvas).to_be_hidden()
    assert committed.text_content() == first + second


def test_thought_is_folded_and_code_stays_text(page: Any, server: PageServer) -> None:
    answer = "See <b>this</b>:\n```html\n<img src=x onerror=alert(1)>\n```\nDone."
    script = [{"choices": [{"index": 0, "delta": {"reasoning_content": "Let me see."}}]}, *chat(answer)]
    server.scripts["/v1/chat/completions"] = [script]
    say(page, "Show me")
    expect(page.locator(".committed pre")).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator(".committed b, .committed img").count() == 0
    expect(page.locator(".thought div")).to_be_hidden()
    page.locator(".thought summary").press("Enter")
    expect(page.locator(".thought div")).to_have_text("Let me see.")
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == answer


def test_a_tool_call_is_shown_and_its_result_sent(page: Any, server: PageServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Vinci"}'}}
    calling = [{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **call}]}}]}]
    server.scripts["/v1/chat/completions"] = [calling, chat("It is misty.")]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    go(page, "Settings")
    page.locator("#tools").fill("[")
    expect(page.locator("#tools-wrong")).to_be_visible()
    page.locator("#tools").fill(json.dumps([tool]))
    expect(page.locator("#tools-wrong")).to_be_hidden()
    go(page, "Chat")
    say(page, "The weather in Vinci?")
    expect(page.locator(".call")).to_contain_text('"city": "Vinci"')
    page.get_by_label("Result of weather").fill("mist")
    page.get_by_role("button", name="Send the result").click()
    expect(page.locator(".committed").last).to_have_text("It is misty.")
    first, second = server.bodies("/v1/chat/completions")
    assert first["tools"] == [tool]
    assert second["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "mist", "tool_call_id": "call_1"},
    ]


def test_stop_keeps_what_was_committed_and_regenerate_asks_anew(page: Any, server: PageServer) -> None:
    hold = threading.Event()
    half = [{"choices": [{"index": 0, "delta": {"content": "Half of it"}}]}, hold]
    server.scripts["/v1/chat/completions"] = [half, chat("All of it.")]
    say(page, "Write")
    expect(page.locator(".committed")).to_have_text("Half of it")
    page.locator("#stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    hold.set()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".committed")).to_have_text("All of it.")
    first, second = server.bodies("/v1/chat/completions")[:2]
    assert first["messages"] == second["messages"] == [{"role": "user", "content": "Write"}]


def test_chats_are_kept_continued_renamed_and_deleted(page: Any, server: PageServer) -> None:
    server.scripts["/v1/chat/completions"] = [chat("One."), chat("Two.")]
    say(page, "First question")
    expect(page.locator(".committed")).to_have_text("One.")
    page.locator("#message").fill("not yet sent")
    page.reload()
    expect(page.locator(".committed")).to_have_text("One.")
    expect(page.locator("#message")).to_have_value("not yet sent")
    say(page, "And then?")
    expect(page.locator(".committed").last).to_have_text("Two.")
    assert [m["content"] for m in server.bodies("/v1/chat/completions")[1]["messages"]] == [
        "First question",
        "One.",
        "And then?",
    ]
    page.get_by_role("button", name="Rename First question").click()
    page.get_by_label("New name").fill("Smoke")
    page.get_by_label("New name").press("Enter")
    expect(page.locator("#chats .title")).to_have_text("Smoke")
    page.locator("#new-chat").click()
    expect(page.locator(".empty")).to_be_visible()
    page.locator("#chats .title").click()
    expect(page.locator(".turn")).to_have_count(4)
    page.get_by_role("button", name="Delete Smoke").click()
    expect(page.locator("#chats li")).to_have_count(0)
    say(page, "Another")
    expect(page.locator("#chats li")).to_have_count(1)
    expect(page.locator(".committed")).to_have_text("Two.")
    page.locator(".files summary").click()
    page.locator("#delete-all").click()
    expect(page.locator("#chats li")).to_have_count(0)
    page.get_by_role("button", name="Dismiss").click()
    names = page.evaluate("Object.keys(localStorage)")
    assert [name for name in names if "message" in name or "head" in name] == []


def test_a_chat_by_keyboard_alone(page: Any, server: PageServer) -> None:
    server.scripts["/v1/chat/completions"] = [chat(TEXT)]
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".committed")).to_have_text(TEXT)
    reached = []
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        focused = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.className || e.tagName, s.outlineStyle, parseFloat(s.outlineWidth)]; }"
        )
        reached.append(focused[0])
        if "replay" in focused[0]:
            assert focused[1] == "solid" and focused[2] >= 2
            page.keyboard.press("Home")
            expect(page.locator(".canvas")).to_be_visible()
    assert any("regenerate" in name for name in reached) and "new-chat" in reached and "theme" in reached


# ---- troubles ----------------------------------------------------------------------------------------------------


def test_401_asks_for_the_key_and_goes_on(browser: Any, server: PageServer) -> None:
    server.key = "secret"
    server.scripts["/v1/chat/completions"] = [chat("Welcome.")]
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model-name")).to_have_text("key needed")
    say(page, "Hello")
    trouble = page.locator("#log .trouble")
    expect(trouble).to_contain_text("The server asks for an API key")
    trouble.get_by_label("API key").fill("wrong")
    trouble.get_by_role("button", name="Use the key and try again").click()
    expect(page.locator("#log .trouble")).to_have_count(1)
    page.locator("#log .trouble").get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator(".committed")).to_have_text("Welcome.")
    expect(page.locator(".said .plain")).to_have_text("Hello")
    expect(page.locator("#model-name")).to_have_text("nano")
    assert page.evaluate("[sessionStorage.getItem('sfumato.key'), localStorage.getItem('sfumato.key')]") == [
        '"secret"',
        None,
    ]
    context.close()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal(503, "overloaded_error", "256 requests wait.", {"Retry-After": "1"}), "The server is busy"),
        (Refusal(503, "worker_error", "The engine's worker ended (signal 9)."), "The engine was restarted"),
        (Refusal(500, "server_error", "Something broke."), "The server failed"),
        (Refusal(400, "invalid_request_error", "max_steps is 0.", param="max_steps"), "The request was refused"),
    ],
    ids=["busy", "worker", "failed", "refused"],
)
def test_a_refusal_is_told_and_can_be_tried_again(page: Any, server: PageServer, refusal: Refusal, words: str) -> None:
    server.scripts["/v1/chat/completions"] = [refusal, chat("Now it works.")]
    say(page, "Hello")
    trouble = page.locator("#log .trouble")
    expect(trouble).to_contain_text(words)
    expect(trouble).to_contain_text(refusal.message)
    expect(page.locator(".said .plain")).to_have_text("Hello")
    trouble.get_by_role("button", name="Try again").click()
    expect(page.locator(".committed")).to_have_text("Now it works.")
    expect(page.locator("#log .trouble")).to_have_count(0)


@pytest.mark.parametrize("ending", ["cut", "error"])
def test_a_stream_that_breaks_keeps_what_had_come(page: Any, server: PageServer, ending: str) -> None:
    error = {"error": {"message": "The worker ended.", "type": "worker_error", "param": None, "code": None}}
    script = [{"choices": [{"index": 0, "delta": {"content": "Half of"}}]}, CUT if ending == "cut" else error]
    server.scripts["/v1/chat/completions"] = [[*script, CUT], chat("Half of it, and the rest.")]
    say(page, "Hello")
    expect(page.locator(".committed")).to_have_text("Half of")
    expect(page.locator(".note")).to_have_text("Broke off here.")
    expect(page.locator("#log .trouble")).to_contain_text("broke off" if ending == "cut" else "was restarted")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".committed")).to_have_text("Half of it, and the rest.")


def test_no_server(page: Any, server: PageServer) -> None:
    server.close()
    say(page, "Hello")
    expect(page.locator("#log .trouble")).to_contain_text("The server does not answer")
    expect(page.locator(".said .plain")).to_have_text("Hello")
    assert "Hello" in page.evaluate("JSON.stringify(localStorage)")
    go(page, "Sudoku")
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("#sudoku-trouble")).to_contain_text("The server does not answer")
    go(page, "Editor")
    page.locator("#text").fill("Some text")
    page.locator("#infill").click()
    expect(page.locator("#editor-trouble")).to_contain_text("The server does not answer")
    expect(page.locator("#text")).to_have_value("Some text")


# ---- form --------------------------------------------------------------------------------------------------------


def test_nothing_is_wider_than_a_phone(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    long = "A word that never ends: " + "smoke" * 40 + "\n```\n" + "x" * 300 + "\n```"
    server.scripts["/v1/chat/completions"] = [chat(long)]
    say(page, "Hello " + "o" * 200)
    expect(page.locator(".committed pre")).to_be_visible()
    page.locator("#shelf-handle").click()
    expect(page.locator("#chats li")).to_have_count(1)
    for section in ("Chat", "Editor", "Decide", "Sudoku", "Settings"):
        go(page, section)
        if section == "Settings":
            expect(page.locator("#option-max_steps")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, section
        wide = page.locator("main *").evaluate_all(
            "all => all.filter(e => e.checkVisibility() && !e.closest('pre, .unseen')"
            " && e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == [], section


def test_every_field_has_a_name_and_no_style_or_script_stands_in_the_page(page: Any) -> None:
    for section in ("Chat", "Editor", "Decide", "Sudoku", "Settings"):
        go(page, section)
        if section == "Settings":
            expect(page.locator("#option-max_steps")).to_be_visible()
    nameless = page.locator("input, textarea, select, button").evaluate_all(
        "all => all.filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim())"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []
    assert sum(file.stat().st_size for file in UI.iterdir()) < 230_000  # bytes, as they are written
    html = (UI / "index.html").read_text()
    assert "<style" not in html and " style=" not in html and not re.search(r"<script(?![^>]*src=)|\son\w+=", html)
    text = "".join(file.read_text() for file in UI.glob("*.*")).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(", text.replace("url(#s)", ""))


# ---- over the real routes ------------------------------------------------------------------------------------------


@pytest.fixture
def routes() -> Iterator[str]:
    """The address of the real application, over a backend without a model."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn")
    from fake_backend import FakeBackend

    from sfumato.server import app
    from sfumato.server.settings import Settings

    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app.create(FakeBackend(), Settings()), log_level="critical", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_real_routes_take_what_the_page_sends(browser: Any, routes: str) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    watch = Watch(page, routes)
    answer = page.goto(routes)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    expect(page.locator("#model-name")).to_have_text("fake")
    go(page, "Settings")
    expect(page.locator("#option-max_steps")).to_have_attribute("placeholder", "24")
    page.locator("#option-max_steps").fill("12")
    page.locator("#option-thinking").check()
    go(page, "Chat")
    say(page, "Hello")
    expect(page.locator(".answer .actions")).to_be_visible()
    assert page.locator(".committed").text_content()
    expect(page.locator(".thought")).to_contain_text("Let me think.")
    expect(page.locator(".replay")).to_be_visible()
    go(page, "Editor")
    page.locator("#text").fill("some text")
    page.locator("#infill").click()
    page.locator("#accept").click()
    expect(page.locator("#text")).to_have_value("some text middle ")
    page.locator("#instruction").fill("louder")
    page.locator("#rewrite").click()
    page.locator("#accept").click()
    expect(page.locator("#text")).to_have_value("SOME TEXT MIDDLE ")
    go(page, "Sudoku")
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("#verdict")).to_contain_text("olved in")
    go(page, "Decide")
    page.locator("#decide-example").select_option("An e-mail to route")
    expect(page.locator("#decide-status")).to_contain_text("4 answers in")
    expect(page.locator(".question .wrong:visible, #decide-trouble > *")).to_have_count(0)
    assert watch.errors == [] and watch.strangers == []
    context.close()
