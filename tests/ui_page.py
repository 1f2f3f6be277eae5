"""What the page's tests share: a browser, a page that is watched, and the ways about it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ui_server import FLAGS, PageServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # ms: five seconds, the default, are little on a busy machine
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; none is on the path")
UI = Path(__file__).parents[1] / "sfumato" / "server" / "ui"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.close()


class Watch:
    """What the page must not do: log an error, raise one, ask another host."""

    def __init__(self, page: Any, url: str) -> None:
        self.url = url
        self.errors: list[str] = []
        self.strangers: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.strangers.append(request.url)


@pytest.fixture
def page(browser: Any, server: PageServer) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.watch = Watch(page, server.url)
    page.goto(server.url)
    expect(page.locator("#model-name")).to_have_text("nano")
    yield page
    # A refused request is logged by the browser itself, whatever the page does about it.
    assert [error for error in page.watch.errors if not error.startswith("Failed to load resource")] == []
    assert page.watch.strangers == []
    context.close()


def say(page: Any, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def go(page: Any, section: str) -> None:
    page.locator(".sections").get_by_role("link", name=section).click()
