"""server/openai/, server/anthropic/, server/ollama/: Node's clients over a real socket, Codex and Claude Code.

They are read from tests/clients/node_modules, which `npm install --ignore-scripts --prefix tests/clients` makes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, serving

from sfumato.server.app import Settings, create
from sfumato.templates.requests import AnswerQuery, Chat
from sfumato.text.replies import Reply

FOLDER = Path(__file__).parents[1] / "clients"
KEY = "test-key"
REASON = "needs node, and npm install --ignore-scripts --prefix tests/clients"
pytestmark = [
    pytest.mark.clients,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("node") or not (FOLDER / "node_modules").exists(), reason=REASON),
]


def script(query: AnswerQuery) -> Reply | None:
    """An agent is told to write a file, and then that it is there; others get what the fake backend says."""
    if isinstance(query, Chat) and "Bash" in {tool["function"]["name"] for tool in query.tools or []}:
        results = [message for message in query.conversation if message["role"] == "tool"]
        call = {"name": "Bash", "arguments": {"command": "echo painted > canvas.txt", "description": "Paint"}}
        return Reply("It is written.") if results else Reply("", "I shall write it.", [call])
    if not isinstance(query, Chat) or "Codex" not in str(query.conversation[0].get("content")):
        return None
    if query.conversation[-1]["role"] == "tool":
        return Reply(f"It is written: {query.conversation[-1]['content']}", None, [])
    call = {"name": "exec_command", "arguments": {"cmd": "echo painted > canvas.txt && cat canvas.txt"}}
    return Reply("", "I shall write it.", [call])


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(script=script)


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with serving(create(backend, Settings(keys=(KEY,)))) as one:
        yield f"{one.url}/v1"


def run(*command: str, folder: Path, **variables: str) -> str:
    """What a command writes; it has an environment of its own, and must end well."""
    environment = {"PATH": f"{Path(shutil.which('node') or '').parent}:/usr/bin:/bin", "HOME": str(folder)}
    environment |= {"DO_NOT_TRACK": "1"} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_openai_and_the_ai_sdk(url: str, tmp_path: Path) -> None:
    results: dict[str, Any] = json.loads(run("node", str(FOLDER / "openai.mjs"), url, KEY, folder=tmp_path))
    says, good = "The tool says rain", {"n": 7, "is_good": True}
    assert len(results) == 21
    for name in ("chat", "responses", "compatible"):
        assert results[f"{name}: tools"] == says
        stream = results[f"{name}: stream of tools and thoughts"]
        assert stream["text"] == says and {"tool-call", "tool-result", "text-delta"} <= set(stream["kinds"]), stream
        assert stream["thought"] == (None if name == "chat" else "Let me think.")  # it reads none of that route
        for one in ("object", "stream of an object", "object behind a tool"):
            assert results[f"{name}: {one}"] == good
        assert results[f"{name}: preset"].startswith("You said: Hi")
    assert results["openai: stream"] == "You said: Hi (seed 1)." and results["openai: runTools"] == says
    kept = {"thought": "Let me think.", "isKept": True, "input": "More"}
    assert results["openai: responses"] == kept


def test_codex_writes_a_file(backend: FakeBackend, url: str, tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    provider = {"name": "sfumato", "base_url": url, "wire_api": "responses", "env_key": "SFUMATO_KEY"}
    lines = ['model = "fake"', 'model_provider = "sfumato"', "check_for_update_on_startup = false"]
    lines += ["[analytics]", "enabled = false", "[model_providers.sfumato]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in provider.items()]
    (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    codex = str(FOLDER / "node_modules" / ".bin" / "codex")
    flags = ["--skip-git-repo-check", "--sandbox", "danger-full-access", "--json"]
    out = run(codex, "exec", *flags, "Paint.", folder=work, CODEX_HOME=str(home), SFUMATO_KEY=KEY)
    assert (work / "canvas.txt").read_text(encoding="utf-8") == "painted\n"
    items = [one["item"] for one in map(json.loads, out.splitlines()) if one["type"] == "item.completed"]
    messages = [item["text"] for item in items if item["type"] == "agent_message"]
    assert messages and messages[-1].startswith("It is written") and "painted" in messages[-1]
    results = [
        query for query in backend.queries if isinstance(query, Chat) and query.conversation[-1]["role"] == "tool"
    ]
    assert results[-1].conversation[-2]["reasoning_content"] == "I shall write it."


def test_anthropics_and_ollamas(url: str, tmp_path: Path) -> None:
    host = url.removesuffix("/v1")
    results: dict[str, Any] = json.loads(run("node", str(FOLDER / "dialects.mjs"), host, KEY, folder=tmp_path))
    says = "The tool says rain"
    loop = {"kinds": ["thinking", "tool_use"], "input": {"place": "text"}, "text": says}
    assert results.pop("anthropic: error").startswith("404 req_")
    assert results.pop("ai: stream")["thought"] == "Let me think."
    assert results == {
        "anthropic: loop": loop,
        "anthropic: count": True,
        "ai: tools": says,
        "ai: object": {"n": 7, "is_good": True},
        "ollama: loop": says,
        "ollama: stream": {"text": "You said: Hi (seed 1).", "thought": "Let me think.", "reason": "stop"},
        "ollama: infill": " middle ",
        "ollama: models": ["fake:latest"],
    }


def test_claude_code_writes_a_file(backend: FakeBackend, url: str, tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    variables = {
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": url.removesuffix("/v1"),
        "ANTHROPIC_AUTH_TOKEN": KEY,
        **dict.fromkeys(("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL"), "fake"),
        **dict.fromkeys(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY"), "1"),
        **dict.fromkeys(("DISABLE_ERROR_REPORTING", "DISABLE_AUTOUPDATER"), "1"),
    }
    claude = str(FOLDER / "node_modules" / ".bin" / "claude")
    flags = ["--allowedTools", "Bash", "--output-format", "json"]
    answer = json.loads(run(claude, "-p", "Paint.", *flags, folder=work, **variables))
    assert (work / "canvas.txt").read_text(encoding="utf-8") == "painted\n"
    assert answer["result"] == "It is written." and answer["num_turns"] == 2 and not answer["is_error"]
    last = backend.queries[-1]
    assert isinstance(last, Chat)
    spoken = [message for message in last.conversation if message["role"] == "assistant"]
    assert spoken[-1]["tool_calls"] and last.options.thinking
