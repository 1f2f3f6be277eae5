"""remote/, and the command line over it: the client for a server, against a small scripted one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripted_host import (
    DRAFT,
    KEY,
    TOOL,
    USAGE,
    USER,
    Scripted,
    as_json,
    delta,
    hello,
    refused,
    stream,
)

from sfumato import cli
from sfumato.cli.view import show
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft
from sfumato.model.prompt import Prompt
from sfumato.options import OPTIONS, Options
from sfumato.remote import Remote, bodies
from sfumato.remote.bodies import answer_body
from sfumato.templates.requests import Complete
from sfumato.templates.slots import Slot

# ---- a Sfumato server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_card_tells_what_the_host_is(ours: Scripted, ending: str) -> None:
    remote = Remote(ours.url + ending)
    assert (remote.name, remote.canvas_length, remote.max_position) == ("nano", 16, 512)
    assert remote.is_sfumato and remote.has_drafts and remote.url == ours.url
    assert [path for path, _, _ in ours.requests] == ["/v1/models"]


def test_a_stream_is_drafts_commits_and_done(ours: Scripted) -> None:
    ours.says(
        "/chat/completions",
        stream(
            delta(role="assistant", content=""),
            {"choices": [], "draft": DRAFT},
            delta(reasoning_content="hm"),
            delta(content="Grün "),
            delta(content="ja"),
            delta("stop") | {"seed": 11},
            {"choices": [], "usage": USAGE},
        ),
    )
    events = list(Remote(ours.url).stream(USER, options=Options(drafts=True, max_steps=8, stop=("END",))))
    assert [type(event) for event in events] == [Draft, Commit, Commit, Commit, Done]
    draft, thought, first, _, done = events
    assert isinstance(draft, Draft) and draft.text == "Grün" and draft.pieces == DRAFT["pieces"] and draft.end == 2
    assert (draft.step, draft.entropies, draft.accepted) == (2, DRAFT["entropies"], DRAFT["accepted"])
    assert isinstance(thought, Commit) and (thought.thought, thought.text) == ("hm", "")
    assert isinstance(first, Commit) and (first.text, first.steps) == ("Grün ", 2)
    assert isinstance(done, Done) and (done.text, done.thought, done.seed) == ("Grün ja", "hm", 11)
    assert (done.usage.tokens_per_pass, done.usage.reused_tokens, done.usage.first_commit_seconds) == (1.0, 3, 0.4)
    sent = ours.body
    assert sent.pop("messages") == USER and sent.pop("stream_options") == {"include_usage": True}
    assert sent == {"model": "nano", "stream": True, "drafts": True, "max_steps": 8, "stop": ["END"]}


def test_every_option_goes_out_under_its_own_name(ours: Scripted) -> None:
    ours.says("/chat/completions", hello())
    options = Options(max_tokens=9, seed=0, t_max=0.5, confidence=0.0, early=True, choices=("a", "b"), temperature=0.2)
    assert Remote(ours.url).chat(USER, options=options).text == "Hello"
    sent = {name: ours.body[name] for name in ("max_tokens", "seed", "t_max", "confidence", "early", "temperature")}
    assert sent == {"max_tokens": 9, "seed": 0, "t_max": 0.5, "confidence": 0.0, "early": True, "temperature": 0.2}
    assert ours.body["choices"] == ["a", "b"] and "top_p" not in ours.body and "drafts" not in ours.body


def test_plain_text_is_continued_with_logprobs(ours: Scripted) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -1], "top_logprobs": [{"a": -0.5}, {"b": -1}]}
    choice = {"index": 0, "text": "ab", "logprobs": logprobs, "finish_reason": "length"}
    ours.says("/completions", stream({"choices": [choice], "seed": 4}))
    options = Options(logprobs=True, top_logprobs=1)
    commit, done = Remote(ours.url).stream(Complete("once", options))
    assert isinstance(commit, Commit) and isinstance(done, Done)
    assert (commit.pieces, commit.logprobs, commit.top_logprobs) == (
        ["a", "b"],
        [-0.5, -1.0],
        [{"a": -0.5}, {"b": -1.0}],
    )
    assert (done.text, done.finish_reason, done.logprobs, done.seed) == ("ab", "length", [-0.5, -1.0], 4)
    assert ours.body["prompt"] == "once" and ours.body["logprobs"] == 1 and "top_logprobs" not in ours.body


def test_a_list_of_prompts_is_answered_in_its_order(ours: Scripted) -> None:
    is_second_here = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["prompt"] == "first":
            assert is_second_here.wait(20)  # so they are under way together
        else:
            is_second_here.set()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        choice = {"text": body["prompt"].upper(), "finish_reason": "stop"}
        handler.wfile.write(json.dumps({"choices": [choice]}).encode())

    ours.says("/completions", answer)
    remote = Remote(ours.url)
    assert [one.text for one in remote.complete(["first", "second"])] == ["FIRST", "SECOND"]
    assert remote.complete("alone").text == "ALONE"


@pytest.mark.parametrize("more", [{"blocks": ((0, 2),)}, {"embeddings": [[0.5]], "content": {1: b"cat"}}])
def test_a_prompt_with_more_than_tokens_is_not_sent(ours: Scripted, more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="embeddings or blocks cannot be sent to a server; give a text or token ids"):
        Remote(ours.url).run(Complete(Prompt((3, 4), **more)))


def test_token_ids_are_sent_as_they_are() -> None:
    sent = [answer_body(Complete(prompt), True, True)["prompt"] for prompt in ([3, 4], Prompt((3, 4)), "ab")]
    assert sent == [[3, 4], [3, 4], "ab"]


def test_tools_go_out_and_calls_come_back(ours: Scripted) -> None:
    call = {
        "index": 0,
        "id": "call_x",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"at": "Ulm"}'},
    }
    ours.says("/chat/completions", stream(delta(tool_calls=[call]), delta("tool_calls")))
    commit, done = Remote(ours.url).stream(USER, options=Options(must_call=True), tools=[TOOL])
    calls = [{"name": "weather", "arguments": {"at": "Ulm"}}]
    assert isinstance(commit, Commit) and isinstance(done, Done)
    assert commit.tool_calls == done.tool_calls == calls and done.finish_reason == "stop" and done.text == ""
    assert ours.body["tool_choice"] == "required" and ours.body["tools"][0]["function"]["strict"] is True
    assert "must_call" not in ours.body and "strict" not in TOOL["function"]

    ours.says("/chat/completions", hello())
    history: list[dict[str, Any]] = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": calls[0]}] * 2},
        {"role": "tool", "name": "weather", "content": "wet"},
        {"role": "tool", "name": "weather", "content": "dry"},
    ]
    Remote(ours.url).chat(history, tools=[TOOL])
    sent = ours.body["messages"][1]["tool_calls"]
    assert [one["function"]["arguments"] for one in sent] == ['{"at": "Ulm"}'] * 2
    assert [one["id"] for one in sent] == [one["tool_call_id"] for one in ours.body["messages"][2:]]
    assert sent[0]["id"] != sent[1]["id"] and "id" not in history[1]["tool_calls"][0]


def test_templates_are_asked_for_and_read(ours: Scripted) -> None:
    tail = {"seed": 3, "usage": USAGE}
    ours.says("/fill", as_json({"text": "A: x.", "values": {"who": "x"}, "lengths": {"who": 1}} | tail))
    ours.says("/infill", as_json({"text": "a b c", "middle": " b ", "length": 3} | tail))
    ours.says("/edit", as_json({"text": "new", "diff": ""} | tail))
    remote, options = Remote(ours.url), Options(seed=3, drafts=True)
    filled = remote.fill(["A: ", Slot("who"), "."], "p", options=options)
    assert (filled.text, filled.values, filled.lengths, filled.seed) == ("A: x.", {"who": "x"}, {"who": 1}, 3)
    assert ours.body == {"model": "nano", "template": ["A: ", {"name": "who"}, "."], "prompt": "p", "seed": 3}
    infilled = remote.infill("a", "c", at_most=5)
    assert (infilled.values, infilled.lengths, infilled.usage.steps) == ({"middle": " b "}, {"middle": 3}, 4)
    assert ours.body == {"model": "nano", "prefix": "a", "suffix": "c", "at_most": 5}
    edited = remote.edit("old", spans=[(0, 3)])
    assert (edited.text, edited.old) == ("new", "old") and "-old" in edited.diff()
    assert ours.body == {"model": "nano", "text": "old", "spans": [[0, 3]]}


def test_an_option_that_a_route_has_no_field_for_is_refused_before_anything_is_sent(ours: Scripted) -> None:
    remote, fields = Remote(ours.url), {"mood": ("bad", "good")}
    calls: list[tuple[str, str, Callable[[Options], object]]] = [
        ("/v1/infill", "short", lambda options: remote.infill("a", "b", options=options)),
        ("/v1/edit", "early", lambda options: remote.edit("a", "b", options=options)),
        ("/v1/fill", "min_tokens", lambda options: remote.fill(["a", Slot("b")], options=options)),
        ("/v1/fill", "max_tokens", lambda options: remote.fill(["a", Slot("b")], options=options)),
        ("/v1/systemone", "t_max", lambda options: remote.decide("a", fields, options=options)),
    ]
    for route, name, call in calls:
        with pytest.raises(InputError, match=rf"^{name} cannot be said with {route} to .*; leave it out$") as refused:
            call(Options.from_dict({name: True if name in ("short", "early") else 1, "seed": 3}))
        assert refused.value.option == name
    assert [path for path, *_ in ours.requests if path != "/v1/models"] == []


def test_the_options_of_templates_are_those_of_the_servers_routes() -> None:
    canvas = pytest.importorskip("sfumato.server.canvas.bodies", reason="needs pydantic")
    for body in (canvas.InfillRequest, canvas.EditRequest, canvas.FillRequest):
        names = {info.alias or name for name, info in body.model_fields.items()} & OPTIONS.keys()
        assert names - {"drafts"} == set(bodies.TEMPLATE_OPTIONS)


def test_closing_the_stream_ends_the_request(ours: Scripted) -> None:
    is_gone = threading.Event()

    def endless(handler: BaseHTTPRequestHandler, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"data: " + json.dumps(delta(content="x" * 1000)).encode() + b"\n\n")
        except OSError:
            is_gone.set()

    ours.says("/chat/completions", endless)
    events = Remote(ours.url).stream(USER)
    assert isinstance(next(events), Commit)
    events.close()  # type: ignore[attr-defined]
    assert is_gone.wait(20)


# ---- other hosts ----------------------------------------------------------------------------------------------------


def test_another_host_gets_standard_fields_alone(theirs: Scripted) -> None:
    theirs.says("/chat/completions", stream(delta(content="Hi"), delta("stop"), {"choices": [], "usage": {}}))
    remote = Remote(theirs.url, KEY)
    assert not remote.is_sfumato and not remote.has_drafts and remote.max_position == 4096
    options = Options(
        max_tokens=5, temperature=0.5, top_p=0.9, stop=("X",), seed=2, schema={"type": "object"}, drafts=True
    )
    messages = [{**USER[0]}, {"role": "assistant", "content": "Hm", "reasoning_content": "secret"}, *USER]
    events = list(remote.stream(messages, options=options))
    assert [type(event) for event in events] == [Commit, Done]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True}}
    assert theirs.body == {
        **{"model": "gemma", "stream": True, "stream_options": {"include_usage": True}, "response_format": form},
        **{"messages": [USER[0], {"role": "assistant", "content": "Hm"}, USER[0]]},
        **{"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop": ["X"], "seed": 2},
    }
    done = events[-1]
    assert isinstance(done, Done) and done.usage.passes == 0 and done.usage.seconds > 0
    assert theirs.requests[-1][1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(max_steps=4), "max_steps"),
        (Options(regex="a+"), "regex"),
        (Options(choices=("a",)), "choices"),
        (Options(thinking=True), "thinking"),
        (Options(mode="diffusion"), "mode"),
        (Options(schema=False), "schema"),
    ],
)
def test_what_cannot_be_said_to_another_host_is_refused_by_name(theirs: Scripted, options: Options, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} cannot be said"):
        Remote(theirs.url).chat(USER, options=options)
    assert len(theirs.requests) == 1


def test_another_host_has_no_templates(theirs: Scripted) -> None:
    remote = Remote(theirs.url)
    asks: list[Callable[[], object]] = [
        lambda: remote.fill(["a", Slot("b")]),
        lambda: remote.infill("a", "b"),
        lambda: remote.edit("a", "b"),
    ]
    for ask in asks:
        with pytest.raises(InputError, match="no Sfumato server"):
            ask()
    with pytest.raises(InputError, match="schema cannot be said with plain text"):
        remote.complete("a", options=Options(schema={}))
    with pytest.raises(InputError, match="chat only"):
        remote.complete("a")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_and_calls_in_fragments_are_put_together(theirs: Scripted, name: str) -> None:
    def part(index: int, **function: str) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, "function": function}])

    theirs.says(
        "/chat/completions",
        stream(
            delta(**{name: "let me "}),
            delta(**{name: "see"}, content=None),
            part(0, name="weather", arguments=""),
            part(0, arguments='{"at": '),
            part(0, arguments='"Ulm"}'),
            part(1, name="time"),
            delta("tool_calls"),
        ),
    )
    answer = Remote(theirs.url).chat(USER, tools=[TOOL])
    assert answer.thought == "let me see" and answer.text == ""
    assert answer.tool_calls == [{"name": "weather", "arguments": {"at": "Ulm"}}, {"name": "time", "arguments": {}}]


def test_a_host_that_does_not_stream_is_understood(theirs: Scripted) -> None:
    content = [{"token": "Hi", "logprob": -0.25, "top_logprobs": [{"token": "Hi", "logprob": -0.25}]}]
    message = {
        "message": {"role": "assistant", "content": "Hi"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    theirs.says("/chat/completions", as_json({"choices": [message], "usage": {"completion_tokens": 1}}))
    answer = Remote(theirs.url).chat(USER, options=Options(logprobs=True))
    assert (answer.text, answer.usage.tokens, answer.logprobs) == ("Hi", 1, [-0.25])


def test_a_host_without_a_list_of_models_needs_a_name(server: Scripted) -> None:
    with pytest.raises(InputError, match="has no /v1/models"):
        Remote(server.url)
    server.says("/chat/completions", hello())
    assert Remote(server.url, model="gemma").chat(USER).text == "Hello"


def test_a_host_with_many_models_needs_a_name(server: Scripted) -> None:
    server.says("/models", as_json({"data": [{"id": f"model-{n}"} for n in range(8)]}))
    with pytest.raises(InputError, match=r"offers 8 models; name one: model-0, .*model-4 and 3 more"):
        Remote(server.url)
    assert Remote(server.url, model="model-6").name == "model-6"


# ---- in the terminal ------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_live_view_draws_the_hosts_drafts_and_no_control_characters(ours: Scripted) -> None:
    draft = DRAFT | {"pieces": ["Gr", "\x1b[2J", "", "x"]}
    answer = stream({"choices": [], "draft": draft}, delta(content="Gr\x9b1m"), delta("stop"), {"usage": USAGE})
    ours.says("/chat/completions", answer)
    remote, screen = Remote(ours.url), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=40, color_system="truecolor")
    done = show(remote, remote.stream(USER, options=Options(drafts=True)), console, 0.0)
    drawn = screen.getvalue()
    assert "canvas 1 · step 2 · 2/4 accepted · entropy 1.125 nats" in drawn and "▪" in drawn
    assert "\x1b[2J[" not in drawn and "␛[2J" in drawn and "\x9b" not in drawn
    assert "5 tokens in 4 steps on 1 canvas, 0.50 s, 1.0 tokens per pass" in drawn and done.text == "Gr\x9b1m"


def test_a_host_that_counts_no_passes_gets_a_shorter_line_of_figures(theirs: Scripted) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    theirs.says("/chat/completions", stream(delta(content="Hi"), delta("length"), {"choices": [], "usage": usage}))
    remote, screen = Remote(theirs.url), io.StringIO()
    show(remote, remote.stream(USER), Console(file=screen, force_terminal=True, width=120), 0.0)
    assert "2 tokens, 0." in screen.getvalue() and "prompt 3 tokens" in screen.getvalue()
    assert "pass" not in screen.getvalue() and "seed" not in screen.getvalue() and "cut at" in screen.getvalue()


def test_chat_keeps_the_conversation_and_survives_errors(
    ours: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    thought = stream(delta(reasoning_content="hm"), delta(content="One"), delta("stop"))
    ours.says("/chat/completions", thought, refused("it ended", 500, "worker_error"), hello(), hello())
    lines = "first\nlost\n/seed 5\n/set warmth=1\nsecond\n/new\nthird\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = call(capsys, "chat", "--api", ours.url, "--system", "Be brief.")
    assert code == 0 and err == "" and "hm" not in out
    assert out.startswith("One\n") and "it ended" in out and "warmth" in out and out.count("Hello\n") == 2
    sent = [body for path, _, body in ours.requests if path.endswith("completions")]
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}
    answer, second = {"role": "assistant", "content": "One"}, {"role": "user", "content": "second"}
    assert sent[2]["messages"] == [system, first, answer, second] and sent[2]["seed"] == 5
    assert sent[3]["messages"] == [system, {"role": "user", "content": "third"}] and sent[3]["model"] == "nano"


def test_chat_refuses_an_option_that_the_host_cannot_be_told(
    theirs: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.says("/chat/completions", hello())
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set max_steps=3\nhi\n"))
    code, out, _ = call(capsys, "chat", "--api", theirs.url)
    assert code == 0 and "max_steps cannot be said" in out.replace("\n", " ") and out.endswith("Hello\n")
    code, _, err = call(capsys, "chat", "--api", theirs.url, "-s", "max_steps=3")
    assert code == 2 and "--max-steps" in err


def test_generate_over_the_wire(ours: Scripted, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ours.says("/chat/completions", hello(seed=8))
    (tmp_path / "key").write_text(KEY + "\n")
    arguments = ("generate", "Hi", "--api", ours.url, "--api-key-file", str(tmp_path / "key"), "--json")
    code, out, err = call(capsys, *arguments)
    record = json.loads(out)
    assert code == 0 and err == "" and record["text"] == "Hello" and record["seed"] == 8 and record["tokens"] is None
    assert record["tokens_per_pass"] == 1.0
    assert ours.requests[-1][1]["Authorization"] == f"Bearer {KEY}"
    ours.says("/completions", stream({"choices": [{"text": "more", "finish_reason": "stop"}]}))
    assert call(capsys, "generate", "Hi", "--raw", "--api", ours.url, "-m", "alias") == (0, "more\n", "")
    assert ours.body["prompt"] == "Hi" and ours.body["model"] == "alias"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api", "nowhere"], "http://HOST:PORT"),
        (["--api-key", KEY], "without --api"),
        (["--api", "http://localhost:1", "--ops", "cpu"], "--ops"),
        (["--api", "http://localhost:1", "--memory-limit", "3"], "--memory-limit"),
        (["--api", "http://localhost:1", "--api-key", KEY, "--api-key-file", "x"], "give one of them"),
        (["--api", "http://localhost:1", "--api-key-file", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_api_arguments_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = call(capsys, "generate", "Hi", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err and KEY not in err


def test_a_remote_chat_imports_no_torch(ours: Scripted) -> None:
    ours.says("/chat/completions", hello())
    code = (
        "import sys; from sfumato.cli import main; code = main(['chat', '--api', sys.argv[1]]);"
        "print(code, [name for name in ('torch', 'numpy', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    command = [sys.executable, "-W", "error", "-c", code, ours.url]
    process = subprocess.run(command, input="Hi\n", capture_output=True, text=True, timeout=60)
    assert (process.stdout, process.stderr) == ("Hello\n0 []\n", "")


def test_a_text_or_one_message_is_a_conversation(ours: Scripted) -> None:
    ours.says("/chat/completions", hello())
    for prompt in ("Hi", {"role": "user", "content": "Hi"}, [{"role": "user", "content": "Hi"}]):
        assert str(Remote(ours.url).chat(prompt)) == "Hello"
        assert ours.body["messages"] == [{"role": "user", "content": "Hi"}]
    assert [event.text for event in Remote(ours.url).stream("Hi")] == ["Hello", "Hello"]
    assert ours.body["messages"] == [{"role": "user", "content": "Hi"}]
