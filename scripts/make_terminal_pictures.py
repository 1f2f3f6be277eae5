"""Draws docs/ui/chat-terminal-*.png: a chat in the terminal, on dark and on light, from what the program writes.

    .venv/bin/python scripts/make_terminal_pictures.py

The program runs behind a pty (tests/terminal.py) with a scripted model; rich draws its bytes as SVG in the colours of a
terminal's theme, and Debian's chromium makes the picture.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI, TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from scripted_chat import ANSWERING  # noqa: E402
from terminal import Terminal  # noqa: E402

OUT = ROOT / "docs" / "ui"
COLUMNS, ROWS = 76, 21
QUESTION = "How did Leonardo paint without lines?"
THEMES = {"dark": MONOKAI, "light": DEFAULT_TERMINAL_THEME}
"""White on near black, black on white."""


def screen() -> str:
    """What is on the screen after some commands and an answer that is stopped, in the middle of the next."""
    with tempfile.TemporaryDirectory() as state:
        environment = {"XDG_STATE_HOME": state, "COLORTERM": "truecolor", "TERM": "xterm-256color"}
        with Terminal(["scripted_chat.py", "readline"], COLUMNS, ROWS, environment) as terminal:
            terminal.until_ready()
            terminal.type(f"{QUESTION}\r")
            terminal.until_written("seed 3")
            terminal.until_ready()
            terminal.type("/regenrate\r")
            terminal.until_written("there is no command")
            terminal.until_ready()
            terminal.type("/set max_tokens=200\r")
            terminal.until_written("max_tokens = 200")
            terminal.until_ready()
            terminal.type(f"{QUESTION}\r")
            terminal.until_written(ANSWERING, 2)
            terminal.until("step 3")
            return terminal.screen.ansi


def picture(text: Text, theme: TerminalTheme) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text)
    return console.export_svg(title="sfumato chat", theme=theme)


def main() -> None:
    text = Text.from_ansi(screen())
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium")
        page = browser.new_page(viewport={"width": 1080, "height": 460})
        for name, theme in THEMES.items():
            page.set_content(f"<body style='margin:0'>{picture(text, theme)}</body>")
            path = OUT / f"chat-terminal-{name}.png"
            page.locator("svg").first.screenshot(path=path)
            with Image.open(path) as image:
                image.convert("RGB").quantize(128).save(path, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
