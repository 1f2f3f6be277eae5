"""README.md, CONTRIBUTING.md, docs/: what they show is run, with nano, in a folder of its own.

A fenced block is `python`, `sh`, `json` or `text`. Python blocks of a page run in order, in one module. Of the lines of
an `sh` block, those that call sfumato run; those that call another program (git, make, pip, podman, …) are checked: the
target, extra or file exists. A comment before a block, `<!-- not run: REASON -->`, is for what needs a GPU, the hub or
hours: then its commands are checked against the command line, every flag of them, and its Python is compiled. Commands
within a sentence are checked in the same way. docs/server.md and docs/decisions.md are run against a server that their
own command starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato import cli
from sfumato.options import Options
from sfumato.tasks import sorting
from sfumato.templates.slots import read_template

pytest.importorskip("llguidance")
ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "docs/tour.md", "docs/sampler.md", "docs/server.md", "docs/canvas.md"),
    *("docs/quantisation.md", "docs/files.md", "docs/deploy.md", "docs/commands.md", "docs/python.md"),
    *("docs/clients.md", "docs/adapters.md", "docs/data.md", "docs/training.md", "docs/decisions.md"),
    "docs/evals.md",
    "docs/tasks.md",
)

SERVED = ("docs/server.md", "docs/decisions.md")
"""Pages whose blocks run beside their server, each in a test of its own."""

NOT_OURS = (
    *("config.json", "adapter_config.json", "tokenizer.json", "decisions.json"),
    *("person.json", "TEMPLATE.json", "questions.json", "scores.json", "fast.json"),
)
"""Files of a checkpoint, or of the reader."""

BLOCK = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"^(?:\.venv/bin/)?sfumato$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    reason: str
    """Why it is not run; "" where it is."""

    def commands(self) -> list[str]:
        """The command lines of an `sh` block, each with its continuation lines."""
        return [line.strip() for line in joined(self.text).splitlines() if line.strip() and line.strip()[0] != "#"]


def joined(text: str) -> str:
    """Lines put together that end in a backslash, or within a quotation."""
    lines: list[str] = []
    for line in text.splitlines():
        is_open = bool(lines) and (lines[-1].endswith("\\") or lines[-1].count("'") % 2 == 1)
        if is_open:
            lines[-1] = lines[-1].removesuffix("\\") + line if lines[-1].endswith("\\") else f"{lines[-1]} {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    return [Block(language, text, reason or "") for reason, language, text in BLOCK.findall(text_of(page))]


def words_of(command: str) -> list[list[str]]:
    """The words of each program of a command line; pipes and && stand between programs, comments are left out."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&><;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    programs: list[list[str]] = [[]]
    for word in lexer:
        if word in ("|", "&&", ";"):
            programs.append([])
        else:
            programs[-1].append(word)
    return programs


def check_command(words: list[str]) -> None:
    """A command of ours: it exists, and so does each of its flags."""
    name, *rest = words[1:] or ["--help"]
    if name.startswith("-"):
        return
    assert name in cli.COMMANDS, words
    command = cli.application([name]).commands[name]
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", word.partition("=")[0]):
            assert word.partition("=")[0] in flags, f"sfumato {name} has no {word}"


def check_program(words: list[str]) -> None:
    """A command of another program: what it names of this repository exists."""
    words = [word for word in words if not re.fullmatch(r"\w+=\S*", word)]  # variables before a command
    program = Path(words[0]).name if words else ""
    if OURS.match("/".join(words[:1])):
        check_command(words)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
        assert all(word in targets or "=" in word for word in words[1:]), words
    elif program in ("python", "python3"):
        check_script(words[1:])
    elif program in ("ruff", "mypy", "pytest"):
        pass
    elif "pip" in program or "pip" in words:
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        known = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
        assert all(extra in known for names in extras for extra in names.split(",")), words
    for word in words:
        if re.match(r"^(deploy|scripts|benchmarks|tests|docs|examples)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"


def check_script(words: list[str]) -> None:
    """A Python program of this repository: it exists, and its source knows each flag."""
    if words[:1] == ["-m"]:
        name = words[1].replace(".", "/")
        if words[1].split(".")[0] != "sfumato":
            return
        path = next(path for path in (ROOT / f"{name}.py", ROOT / name / "__init__.py") if path.exists())
    else:
        path = ROOT / words[0]
    source = path.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in source, f"{path.name} has no {word}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' commands find where they run: nano under the names that stand in them."""
    folder = tmp_path_factory.mktemp("docs")
    assert cli.main(["convert", "nano", "--to", "gguf-q8_0", "-o", str(folder / "model-Q4_K_M.gguf")]) == 0
    shutil.copytree(ROOT / "sfumato" / "nano", folder / "my-model")
    (folder / "samples.jsonl").write_text('{"text": "One two."}\n{"text": "Three four."}\n')
    lists = [sorting.generate(np.random.default_rng(seed), 4) for seed in range(40)]
    lines = [{"prompt": sorting.prompt(one), "response": sorting.answer_text(one)} for one in lists]
    (folder / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [block.text for block in blocks_of("docs/evals.md") if block.language == "json"]  # the page's own items
    (folder / "items.jsonl").write_text("".join(own))
    noul = {"type": "noul", "instructions": "Is a refund requested?"}
    (folder / "request.json").write_text(json.dumps({"state": "It came broken.", "questions": {"refund": noul}}))
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line with one of our commands in it, in this process; what stands before a pipe runs in a shell."""
    before, _, ours = command.rpartition(" | ")
    (words,) = words_of(ours)
    if before:
        text = subprocess.run(["bash", "-c", before], capture_output=True, check=True).stdout
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    code = cli.main(words[1:])
    # A random puzzle may stay unsolved, which is 1.
    assert code in ((0, 1) if "--random" in words else (0,)), command


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_run_or_checked(page: str) -> None:
    text = text_of(page)
    assert {block.language for block in blocks_of(page)} <= {"python", "sh", "json", "text"}
    assert text.count("```") == 2 * len(blocks_of(page)), (
        "a fence that is not closed, or not at the beginning of a line"
    )
    assert len(re.findall("<!-- not run", text)) == sum(bool(block.reason) for block in blocks_of(page))
    outside = BLOCK.sub("", text)
    assert not re.search(r"\n\n    \S", outside), "code without a fence"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page: str) -> None:
    """A file may be named from the repository, from sfumato/, or by the last parts of its path."""
    text = text_of(page)
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [f"/{name}" for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    for name in re.findall(r"`([\w/.-]+\.(?:py|h|cpp|md|json|service))`", text):
        is_ours = name.split("/")[0] not in ("models", "runs") and name not in NOT_OURS
        assert not is_ours or any(path.endswith(f"/{name}") for path in names), f"{page} names {name}"
    for link in re.findall(r"\]\(([^)#:]+)\)", BLOCK.sub("", text)):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_flags_exist(page: str) -> None:
    """Those of all blocks, and those within sentences."""
    for block in blocks_of(page):
        if block.language == "sh":
            for command in block.commands():
                for words in words_of(command):
                    check_program(words)
    for line in re.findall(
        r"`((?:\.venv/bin/)?(?:sfumato|make|python|scripts/\w+) [^`]+)`", BLOCK.sub("", text_of(page))
    ):
        (words, *_) = words_of(" ".join(line.split()).replace("'", ""))
        check_program(words)


def names_of(page: str) -> dict[str, Any]:
    """What the Python of a page defines when it has run, block by block in one module."""
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            code = compile(block.text, page, "exec")
            if not block.reason:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*SERVED, "docs/canvas.md")])
def test_python_runs_as_it_stands(page: str, here: Path) -> None:
    names_of(page)


def test_the_page_of_templates_runs_as_it_stands(here: Path) -> None:
    names = names_of("docs/canvas.md")
    (as_json,) = [block.text for block in blocks_of("docs/canvas.md") if block.language == "json"]
    assert read_template(as_json) == names["template"]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text_of("docs/canvas.md"))
    assert pictures and all((ROOT / "docs" / name).stat().st_size < 100_000 for name in pictures)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*SERVED, "docs/training.md")])
def test_commands_run_as_they_stand(page: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks_of(page):
        if block.language == "sh" and not block.reason:
            for command in block.commands():
                if any(OURS.match(words[0]) for words in words_of(command) if words):
                    run(command, monkeypatch)


@contextlib.contextmanager
def served(command: str, here: Path) -> Iterator[int]:
    """The port of a server that a page's own command starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    words = [
        sys.executable,
        "-c",
        "import sys; from sfumato.cli import main; sys.exit(main())",
        *shlex.split(command, comments=True)[1:],
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (here / "server.log").open("w") as log:
        server = subprocess.Popen([*words, "--port", str(port)], env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/ready", server)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def server_command(page: str) -> str:
    """The first command of a page that starts a server."""
    return next(line for block in blocks_of(page) for line in block.commands() if line.startswith("sfumato serve"))


@pytest.fixture
def port(here: Path) -> Iterator[int]:
    """The port of the server that the page of the server starts."""
    with served(server_command("docs/server.md"), here) as port:
        yield port


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.mark.usefixtures("untidy")
def test_the_page_of_training_ends_in_a_server(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of examples to an adapter that a request chooses, in the page's five commands."""
    (first, *_) = [block for block in blocks_of("docs/training.md") if block.language == "sh"]
    for command in first.commands():
        run(command, monkeypatch)
    with served(server_command("docs/training.md"), here) as port:
        host = f"http://127.0.0.1:{port}/v1"
        with urllib.request.urlopen(f"{host}/models", timeout=60) as answer:
            assert {"nano", "lists"} <= {model["id"] for model in json.load(answer)["data"]}
        body = {
            "model": "lists",
            "messages": [{"role": "user", "content": "Sort these digits:\n3194"}],
            "max_tokens": 8,
        }
        request = urllib.request.Request(f"{host}/chat/completions", json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["model"] == "lists"


@pytest.mark.usefixtures("untidy")
def test_the_servers_page_runs_against_a_server(port: int) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of("docs/server.md"):
        text = block.text.replace(":8000", f":{port}")
        if block.reason:
            continue
        if block.language == "python":
            exec(compile(text, "docs/server.md", "exec"), names)
        for command in Block("sh", text, "").commands() if block.language == "sh" else []:
            if command.startswith("curl"):
                answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
                assert answer and '"error"' not in answer
                if "/v1/fill" in command:
                    assert '"values":{"seats":"' in answer and '"draft"' in answer
    assert names["answer"].choices[0].message.content
    assert names["llm"].complete("1", options=Options(max_tokens=8)).text


@pytest.mark.usefixtures("untidy")
def test_the_page_of_decisions_runs_beside_its_server(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    with served(server_command("docs/decisions.md"), here) as port:
        for block in blocks_of("docs/decisions.md"):
            text = block.text.replace(":8000", f":{port}")
            if block.language == "python":
                code = compile(text, "docs/decisions.md", "exec")
                if not block.reason:
                    exec(code, names)
            for command in Block("sh", text, "").commands() if block.language == "sh" and not block.reason else []:
                if command.startswith("curl"):
                    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
                    assert json.loads(answer)["answers"]["refund"]["noul"] > 0
                elif not command.startswith("sfumato serve"):
                    run(command, monkeypatch)
    assert 0 < names["response"].nouls["refund"].noul < 1


def test_what_is_not_run_says_why() -> None:
    reasons = {block.reason for page in PAGES for block in blocks_of(page) if block.reason}
    assert all(re.match(r"(needs|takes|the tests) \w", reason) for reason in reasons)


@pytest.mark.parametrize(
    "command", ["sfumato nothing", "sfumato serve --nothing 3", "make nothing", "pip install 'sfumato[nothing]'"]
)
def test_a_wrong_command_is_seen(command: str) -> None:
    with pytest.raises(AssertionError):
        check_program(words_of(command)[0])
