"""A chat with a model whose answers are written here, as a program: what tests put behind a terminal.

    python scripted_chat.py readline|prompt_toolkit|plain [arguments of `sfumato chat`]

A message of the form "N: TEXT" is answered with TEXT in N canvases of eight steps; any other with itself. A TEXT
between quotes is JSON. "slow" makes a step take a second, "stuck" never ends, "broken" breaks off behind the first
canvas. The terminal gets ANSWERING, which it does not show, when an answer begins.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sfumato import cli
from sfumato.cli import loading
from sfumato.errors import SfumatoError
from sfumato.events import Commit, Completion, Done, Draft, Event, Usage
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel
from sfumato.templates.requests import AnswerQuery, Chat, QueryFor

STEPS = 8
ANSWERS = {
    "How did Leonardo paint without lines?": "1: He let one tone pass into the next, like smoke. Sfumato he called it: "
    "“without lines or borders, in the manner of smoke, or beyond the plane of focus.” Glaze lay upon glaze, each "
    "thinner than a hair, so that no edge was ever drawn.",
}
"""For a picture."""
ANSWERING = "\x1b]0;answering\x07"
"""A title for the terminal's window."""


class ScriptedModel(LanguageModel):
    name, has_drafts, has_token_ids, is_remote, purpose = "scripted", True, True, False, None

    def __init__(self) -> None:
        self.prompts: list[Any] = []

    def check(self, options: Options, is_chat: bool = True) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...

    def run(self, query: QueryFor[Any]) -> Any:
        raise NotImplementedError

    def _answers(self, queries: Sequence[AnswerQuery]) -> list[Completion]:
        raise NotImplementedError

    def _begin(self, query: QueryFor[Any], listener: Callable[[Any], None]) -> Callable[[], None]:
        raise NotImplementedError

    def _stream(self, query: AnswerQuery) -> Iterator[Event]:
        assert isinstance(query, Chat) and isinstance(query.messages, list)
        self.prompts.append(query.messages)
        if sys.stdout.isatty():
            print(end=ANSWERING, flush=True)
        question = str(query.messages[-1]["content"])
        number, colon, text = ANSWERS.get(question, question).partition(": ")
        canvases, text = (int(number), text) if colon and number.isdecimal() else (1, ANSWERS.get(question, question))
        text = json.loads(text) if text.startswith('"') else text
        words = [word + " " for word in text.split(" ")]
        each = -(-len(words) // canvases)
        for canvas in range(canvases):
            own = words[canvas * each : (canvas + 1) * each]
            if query.options.drafts:
                for step in range(1, STEPS + 1):
                    time.sleep(1.0 if question == "slow" else 0.01)
                    yield _draft(canvas, step, own)
            while question == "stuck":
                time.sleep(0.05)
            yield Commit(0, canvas, STEPS, [1] * len(own), text="".join(own))
            if question == "broken":
                raise SfumatoError("the line broke")
        usage = Usage(10, len(words), canvases, STEPS * canvases, STEPS * canvases + 1, 0.5)
        yield Done(0, "stop", [1] * len(words), usage, seed=3, text="".join(words))


def _draft(canvas: int, step: int, words: list[str]) -> Draft:
    entropies = [3.0 * (1 - step / STEPS) * (at % 4) / 3 for at in range(len(words) + 4)]
    pieces = [*words, "", "", "", ""]
    accepted = [entropy < 0.8 for entropy in entropies]
    return Draft(0, canvas, step, [0] * len(pieces), entropies, accepted, "".join(words), pieces, len(words))


def main() -> int:
    reader, *arguments = sys.argv[1:]
    hidden = ("prompt_toolkit", "readline")[: 1 if reader == "readline" else 2 if reader == "plain" else 0]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    model = ScriptedModel()
    vars(loading)["connect_or_load"] = lambda api, load: model
    return cli.main(["chat", *arguments])


if __name__ == "__main__":
    sys.exit(main())
