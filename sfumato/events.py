"""What comes out: the events of a run, and the results.

Everything a run does is an event on one iterator: the command line, the server, the page and the evaluations consume
the same stream. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sfumato.display.html import canvas_html
from sfumato.questions import AnswerKind, choice_confidence, score_confidence

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = 48


def _answer_repr(name: str, text: str, details: list[str]) -> str:
    """An answer in one line: `<Completion 'The sky is…', stop, 82 tokens in 5 steps, 0.12 s, seed 3>`."""
    return f"<{name} {', '.join([_QUOTE.repr(text), *details])}>"


@dataclass(frozen=True, repr=False)
class Draft:
    """The argmax canvas after one step; only with `Options(drafts=True)`."""

    row: int
    """The row of the batch, from 0."""
    canvas: int
    """The canvas of this row, from 0."""
    step: int
    """The step of this canvas, from 1."""
    tokens: list[int]
    """The likeliest token of each position."""
    entropies: list[float]
    """The entropy of each position, in nats."""
    accepted: list[bool]
    """Whether the step accepted each position."""
    text: str = ""
    """The text of the canvas up to its first end."""
    pieces: list[str] = field(default_factory=list)
    """The text of each position's token; "" for a control token."""
    end: int = 0
    """Positions before the first end of the text."""
    request: str = ""
    """The id of the request it belongs to."""

    def __repr__(self) -> str:
        accepted = f"{sum(self.accepted)}/{len(self.accepted)} accepted"
        mean = sum(self.entropies) / max(1, len(self.entropies))
        details = [f"canvas {self.canvas}", f"step {self.step}", accepted, f"entropy {mean:.3f}"]
        return _answer_repr("Draft", self.text, details)

    def _repr_html_(self) -> str:
        """The canvas as a notebook shows it: each token tinted by its entropy."""
        return canvas_html(self.pieces[: self.end], self.entropies, self.accepted)


@dataclass(frozen=True, repr=False)
class Commit:
    """Tokens that are final: one canvas (or one token in autoregressive mode), cut at eos, stop and max_tokens.

    `text`, and in a chat `thought` and `tool_calls`, are what they add to the answer's.
    """

    row: int
    canvas: int
    steps: int
    """Denoising steps that this canvas took."""
    tokens: list[int]
    logprobs: list[float] | None = None
    """With `Options(logprobs=True)`: the log-probability of each token, in nats."""
    text: str = ""
    thought: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Each with "name" and "arguments", a mapping."""
    pieces: list[str] | None = None
    """With log-probabilities: the text of each token."""
    top_logprobs: list[dict[str, float]] | None = None
    """With log-probabilities: for each token, the text of the likeliest ones -> log-probability in nats."""
    is_last: bool = False
    """The row ends with it."""
    request: str = ""
    """The id of the request it belongs to."""

    def __repr__(self) -> str:
        extras = [name for name in ("thought", "tool_calls", "logprobs") if getattr(self, name)]
        counts = [f"{len(self.tokens)} tokens"] if self.tokens else []
        return _answer_repr("Commit", self.text, [f"canvas {self.canvas}", f"{self.steps} steps", *counts, *extras])


@dataclass(frozen=True)
class Usage:
    """What an answer took. A pass is one run of the whole stack over a canvas, a prompt chunk or a token."""

    prompt_tokens: int = 0
    tokens: int = 0
    """Committed tokens."""
    canvases: int = 0
    steps: int = 0
    """Denoising steps, of all canvases together."""
    passes: int = 0
    seconds: float = 0.0
    """From the request's start to its end."""
    first_commit_seconds: float | None = None
    """From the request's start to its first tokens; None where there are none."""
    reused_tokens: int = 0
    """Tokens of the prompt that were encoded already."""
    thought_tokens: int = 0
    """Committed tokens of a chat's thoughts."""

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """What all of these took, one after the other."""
        each = [*usages]
        names = [one.name for one in dataclasses.fields(cls) if one.name != "first_commit_seconds"]
        return cls(**{name: sum(getattr(usage, name) for usage in each) for name in names})

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per pass of the stack, prompt encoding left out (as in the published comparisons)."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def summary(self) -> str:
        """Tokens, steps and seconds in a few words."""
        steps = f" in {self.steps} steps" if self.steps else ""
        return f"{self.tokens} tokens{steps}, {self.seconds:.2f} s"


@dataclass(frozen=True, repr=False)
class Done:
    """The end of one row, with its whole answer."""

    row: int
    finish_reason: Literal["stop", "length"]
    """At "stop" the turn has ended, or a stop string came; at "length" the budget or the context is used up."""
    tokens: list[int]
    usage: Usage
    seed: int = 0
    """The seed of the answer: the one of the options, or the one that was drawn."""
    text: str = ""
    stop: str | None = None
    """The stop string that ended the answer, if one did."""
    logprobs: list[float] | None = None
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    request: str = ""
    """The id of the request it belongs to."""

    def __repr__(self) -> str:
        return _ending_repr(self)


@dataclass(frozen=True, repr=False)
class Completion:
    """A finished answer. `thought` and `tool_calls` are filled by `LLM.chat`; `text` is the rest."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    seed: int = 0
    logprobs: list[float] | None = None
    stop: str | None = None
    """The stop string that ended the answer, if one did."""
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, done: Done) -> Completion:
        """What the last event of an answer says."""
        return cls(**{field.name: getattr(done, field.name) for field in dataclasses.fields(cls)})

    def __repr__(self) -> str:
        return _ending_repr(self)

    def __str__(self) -> str:
        return self.text


def _ending_repr(ending: Done | Completion) -> str:
    calls = ", ".join(str(call.get("name")) for call in ending.tool_calls[:3])
    extras = [f"calls {_QUOTE.repr(calls)}"] if calls else []
    details = [ending.finish_reason, *extras, ending.usage.summary, f"seed {ending.seed}"]
    return _answer_repr(type(ending).__name__, ending.text, details)


@dataclass(frozen=True, repr=False)
class Filled:
    """A filled template."""

    text: str
    """The whole: the texts of the template and of its slots, joined."""
    values: dict[str, str]
    """The text of each slot by its name."""
    usage: Usage
    seed: int
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of each slot, padding not counted."""

    def __repr__(self) -> str:
        slots = f"{len(self.values)} slot{'s' if len(self.values) != 1 else ''}"
        return _answer_repr("Filled", self.text, [slots, self.usage.summary, f"seed {self.seed}"])

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Edited:
    """An edited text beside the old one."""

    text: str
    old: str
    """The text before."""
    usage: Usage
    seed: int

    def __repr__(self) -> str:
        change = "changed" if self.text != self.old else "unchanged"
        return _answer_repr("Edited", self.text, [change, self.usage.summary, f"seed {self.seed}"])

    def __str__(self) -> str:
        return self.text

    def diff(self, name: str = "text") -> str:
        """Unified, as `diff -u` prints it; "" where nothing changed."""
        lines = difflib.unified_diff(_lines(self.old), _lines(self.text), f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


@dataclass(frozen=True, repr=False)
class Decision:
    """The answer to one question of `decide`."""

    choice: str
    """The likeliest option: its name, "true" or "false", a level's number, or a passage of the text."""
    probabilities: dict[str, float]
    """The probability of each option; they add up to 1. Of passages that are alike, of all of them."""
    kind: AnswerKind = "choice"
    legend: dict[str, Any] | None = None
    """Of a score: what each level is."""
    place: tuple[int, int] | None = None
    """Of a span: where in the text it stands, from character, to character. The text of a conversation is that of its
    messages, with empty lines between them."""
    thought: str | None = None
    """What the model thought before it was read again; None: it was read at once."""

    @property
    def probability(self) -> float:
        """The probability of `choice`; of a noul, of "true"."""
        return self.probabilities["true" if self.kind == "noul" else self.choice]

    @property
    def score(self) -> float:
        """The expectation of the level's number, from 0. ValueError where the question was no score."""
        if self.kind != "score":
            raise ValueError(f"a {self.kind} has no score")
        return sum(int(level) * p for level, p in self.probabilities.items())

    @property
    def confidence(self) -> float:
        """How sure it is, from 0 to 1, by System One's formula: see `questions.choice_confidence`."""
        confidence = score_confidence if self.kind == "score" else choice_confidence
        return confidence([*self.probabilities.values()])

    def __repr__(self) -> str:
        share = f"{self.probabilities.get(self.choice, 0.0):.1%} of {len(self.probabilities)} choices"
        return _answer_repr("Decision", self.choice, [share])

    def __str__(self) -> str:
        return self.choice


@dataclass(frozen=True, repr=False)
class Decisions(Mapping[str, Decision]):
    """The answers of `decide` by their questions' ids, as a record that cannot be changed."""

    answers: dict[str, Decision]
    usage: Usage
    seed: int
    skipped: tuple[str, ...] = ()
    """Questions that were not asked, as what they depend on does not hold."""

    def __getitem__(self, id: str) -> Decision:
        return self.answers[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        answers = ", ".join(f"{id}={one.choice}" for id, one in self.answers.items())
        return _answer_repr("Decisions", answers, [f"{self.usage.seconds:.2f} s", f"seed {self.seed}"])


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text, and what the model says of it from what stands before."""

    token: int
    """Its id; from a host that sends texts alone, -1."""
    piece: str
    """Its text."""
    offset: int
    """Where in the text of all the tokens it begins, in characters."""
    logprob: float | None = None
    """In nats; None for the first token of a text, which nothing stands before."""
    top: dict[str, float] = field(default_factory=dict)
    """The texts of the likeliest tokens in its place -> their log-probabilities."""

    @property
    def is_likeliest(self) -> bool:
        """Whether no other token was likelier in its place."""
        return self.logprob is not None and self.logprob >= max(self.top.values(), default=self.logprob)


@dataclass(frozen=True, repr=False)
class Scored:
    """A text's log-probabilities, token by token: those of an encode pass, so of one token after another."""

    tokens: list[ScoredToken]
    """The tokens of the continuation; without one, of the whole text."""
    text: str
    """Their text, without control tokens."""
    following: ScoredToken
    """The token that the model would write behind them."""
    answer: str
    """The text of that token; "" for a control token."""
    usage: Usage
    seed: int = 0
    """The seed of `following`."""

    @property
    def logprob(self) -> float:
        """Of all tokens together, in nats; a first one, which nothing stands before, does not count."""
        return sum(one.logprob for one in self.tokens if one.logprob is not None)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest in its place, so that greedy sampling would write the same."""
        return all(one.is_likeliest for one in self.tokens if one.logprob is not None)

    def __repr__(self) -> str:
        return _answer_repr("Scored", self.text, [f"{len(self.tokens)} tokens", f"logprob {self.logprob:.3f}"])


@dataclass(frozen=True)
class TokenCount:
    """The size of a prompt."""

    prompt_tokens: int
    """Tokens, those that the chat template writes included."""


Event = Draft | Commit | Done
"""What a run yields, in order."""


def _lines(text: str) -> list[str]:
    """At line feeds alone, which stay: a carriage return is a change like any other."""
    return [line + "\n" for line in text.split("\n")[:-1]] + ([last] if (last := text.split("\n")[-1]) else [])
