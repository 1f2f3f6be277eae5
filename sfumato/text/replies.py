"""A model's answer, parsed while it comes: thought, text and tool calls.

The marks of an answer are control tokens: `<|channel>` opens a thought, `<|tool_call>` a call (`calls`). Only real
control tokens count, so a call that the model merely quotes stays text. An answer is never an error: what no call can
be made of stays text. Control tokens themselves reach neither text nor thoughts nor arguments.

Each token is taken once, and what is given away once stays. What the tokens so far do not decide waits for those that
follow: a call that is still open, say, or a thought that holds one, until it turns out whether the thought is closed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sfumato.text.calls import read_block
from sfumato.text.declared import Declared
from sfumato.text.notation import IN_NAME, LONGEST_NAME, MARK, plain
from sfumato.text.tokenizer import Detokeniser, Tokenizer


@dataclass(frozen=True)
class Reply:
    """A parsed answer. A tool call is {"name": …, "arguments": {…}}; `thought` is None where there was none."""

    text: str
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


ENDS = {"<turn|>", "<eos>", "<|tool_response>"}
"""Control tokens at which an answer ends."""
_LABELS = ("thought", "thoughts", "thinking", "analysis", "reasoning")
_LABEL = re.compile(rf"\s{{0,16}}(?:{'|'.join(_LABELS)})[ \t]{{0,16}}:?[ \t]{{0,16}}(?:\n|\Z)", re.IGNORECASE)
"""The first line of a channel, which names it."""
_LABEL_BEGUN = re.compile(r"\s{0,16}([a-z]{0,16})[ \t]{0,16}:?[ \t]{0,16}", re.IGNORECASE)
_LEAD = re.compile(r"\s{0,16}thought[ \t]{0,16}\n")
"""How a text begins that is a thought whose opening token is missing."""
_LEAD_BEGUN = re.compile(r"\s{0,16}(t|th|tho|thou|thoug|though|thought[ \t]{0,16})?")
_TURN = re.compile(r"\s{0,16}model[ \t]{0,16}\n")
_TURN_BEGUN = re.compile(r"\s{0,16}(m|mo|mod|mode|model[ \t]{0,16})?")
_CALL = re.compile(rf"call:{IN_NAME}{{1,{LONGEST_NAME}}}[{{(]")
"""How a call begins whose opening token is missing."""
_CALL_BEGUN = re.compile(rf"c(?:a(?:l(?:l(?::{IN_NAME}{{0,{LONGEST_NAME}}})?)?)?)?\Z")


class _Piece(NamedTuple):
    """Text, or a control token; `is_end`: the answer ends at it."""

    text: str
    is_control: bool = False
    is_end: bool = False
    size: int = 0
    """Its tokens."""


class _Passage:
    """A text that grows and is given away as far as it is certain, without the line breaks at its ends.

    It holds `MARK` for `<|"|>`."""

    def __init__(self, waiting: str = "") -> None:
        self.waiting = waiting
        self.is_begun = False

    def take(self, end: int | None = None) -> str:
        """What was not given away yet, up to a place in what waits."""
        piece, rest = (self.waiting, "") if end is None else (self.waiting[:end], self.waiting[end:])
        if not self.is_begun:
            piece = piece.lstrip("\n")
        stripped = piece.rstrip("\n")
        self.is_begun = self.is_begun or bool(stripped)
        self.waiting = piece[len(stripped) :] + rest
        return plain(stripped)


def parse_ids(tokenizer: Tokenizer, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] | None = None) -> Reply:
    """The reply in an answer's token ids; the values of its calls follow the types that the tools declare."""
    parser = ReplyParser(tokenizer, tools=tools)
    parser.push(ids)
    return parser.finish()


class PromptEnd(NamedTuple):
    """Whether a prompt ends within a thought of the model's turn, directly behind one, or neither."""

    thought: Literal["open", "closed", "none"]
    text: str = ""
    """What stands in the open thought."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int]) -> PromptEnd:
        """Of a prompt's token ids."""
        turn, opener, closer = (tokenizer.id(name) for name in ("<|turn>", "<|channel>", "<channel|>"))
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] == opener:
                return cls("open", tokenizer.decode(ids[at + 1 :]))
            if ids[at] == closer:
                return cls("none" if tokenizer.decode(ids[at + 1 :]).strip() else "closed")
            if ids[at] == turn:
                break
        return cls("none")


class ReplyParser:
    """Parses one answer. `take` gives what has become certain, `finish` the rest; joined, they are the reply.

    `ends`: token ids at which the answer ends, beside the control tokens that always end one. `tools`: what the answer
    may call, whose types the arguments follow. `prompt`: the ids that the answer stands behind; it may leave a thought
    open.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: Iterable[int] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._detokeniser, self._ends = tokenizer, Detokeniser(tokenizer), frozenset(ends)
        self._tools = Declared.by_tool(tools)
        self._text, self._thought = _Passage(), _Passage()
        self._calls: list[dict[str, Any]] = []
        self._thoughts: list[str] = []
        """What is certain of thoughts and was not given away yet."""
        self._has_thought = False
        """Whether anything was, before the present thought."""
        self._run = 0
        """Where, in the text that waits, the last control token stood."""
        self._is_beginning = True
        """No control token has come yet."""
        self._is_thinking = self._may_have_label = False
        self._block: list[str] | None = None
        """The pieces of the call that is open."""
        self._held: list[_Piece] | None = None
        """What came since a call began within a thought."""
        self._is_held_closed = False
        self._are_calls_quoted: bool | None = None
        """Whether calls in the present thought are a part of it; None: not decided."""
        self._turn: str | None = None
        """What came behind `<|turn>`."""
        self._is_over = False
        self.thought_tokens = 0
        """Tokens of thoughts so far, those that open and close them not counted."""
        end = PromptEnd.of(tokenizer, prompt)
        if end.thought == "open":
            self._open_thought()
            self._may_have_label = _may_be_label(end.text)
            self._thought.waiting = end.text if self._may_have_label else ""

    @property
    def is_thinking(self) -> bool:
        """Whether a thought is open."""
        return self._is_thinking

    def push(self, ids: Iterable[int]) -> None:
        """Take the next tokens of the answer."""
        run: list[int] = []
        for index in ids:
            if index in self._tokenizer.special_ids or index in self._ends:
                self._take(_Piece(self._detokeniser.push(run) + self._detokeniser.flush(), size=len(run)))
                token = self._tokenizer.token(index) or ""
                self._take(_Piece(token, True, token in ENDS or index in self._ends, 1))
                run = []
            else:
                run.append(index)
        self._take(_Piece(self._detokeniser.push(run), size=len(run)))

    def take(self) -> Reply:
        """What is certain by now and was not given away yet."""
        if self._is_thinking:
            self._flow_thought()
        waiting = len(self._text.waiting)
        text = self._text.take(None if self._is_over else self._certain_end())
        self._run = max(0, self._run - waiting + len(self._text.waiting))
        thought, calls = "".join(self._thoughts), self._calls
        self._thoughts, self._calls = [], []
        return Reply(text, thought or None, calls)

    def finish(self) -> Reply:
        """What was not given away yet: the answer has ended."""
        self._take(_Piece(self._detokeniser.flush()))
        if self._held is not None:
            self._release(are_calls_quoted=False)
        if self._block is not None:
            self._close_block(is_closed=False)
        if self._is_thinking:
            self._close_thought()
        self._is_over = True
        return self.take()

    # ---- one event after the other ----------------------------------------------------------------------------------

    def _take(self, event: _Piece) -> None:
        if self._is_over or not event.text:
            return
        if self._turn is not None:
            self._take_behind_turn(event)
        elif self._held is not None:
            self._hold(event)
        elif self._block is not None:
            self._take_in_block(self._block, event)
        elif not event.is_control or event.text == '<|"|>':
            self._say(event.text if not event.is_control else MARK)
            self.thought_tokens += event.size if self._is_thinking else 0
        elif event.is_end:
            self._end()
        else:
            self._take_control(event)

    def _take_control(self, event: _Piece) -> None:
        """A control token in text or in a thought. One that means nothing there is dropped."""
        token = event.text
        if token == "<|turn>":
            self._turn = ""
        elif token == "<|tool_call>" and self._is_thinking and self._are_calls_quoted is None:
            self._held, self._is_held_closed = [event], False
        elif token == "<|tool_call>" and not self._are_calls_quoted:
            self._block = []
        elif token == "<|channel>":
            if self._is_thinking:
                self._close_thought()
            self._open_thought()
        elif token == "<channel|>" and self._is_thinking:
            self._close_thought()
        elif token == "<channel|>" and self._is_beginning:
            self._take_back_thought()
        elif token == "<tool_call|>" and not self._is_thinking:
            self._take_back_call()
        self._run = len(self._text.waiting)
        self._is_beginning = False

    def _take_in_block(self, block: list[str], event: _Piece) -> None:
        token = event.text if event.is_control else ""
        if not event.is_control or token == '<|"|>':
            block.append(MARK if token else event.text)
        elif event.is_end or token in ("<tool_call|>", "<|turn>"):
            self._close_block(is_closed=True)
            if token != "<tool_call|>":
                self._take(event)
        elif token == "<|tool_call>":
            if any(piece.strip() for piece in block):
                self._close_block(is_closed=False)
                self._take(event)
        elif token == "<|channel>" or (token == "<channel|>" and self._is_thinking):
            self._close_block(is_closed=False)
            self._take(event)

    def _take_behind_turn(self, event: _Piece) -> None:
        """After `<|turn>`: if it is the model's own turn once more the answer goes on, else it has ended."""
        turn = self._turn or ""
        if event.is_control:
            is_own = turn.strip() in ("", "model") and not event.is_end
            rest = event
        else:
            turn += event.text
            match = _TURN.match(turn)
            if match is None and _TURN_BEGUN.fullmatch(turn):
                self._turn = turn
                return
            is_own, rest = match is not None, _Piece(turn[match.end() :] if match else "")
        self._turn = None
        if is_own:
            self._take(rest)
        else:
            self._end()

    def _end(self) -> None:
        if self._is_thinking:
            self._close_thought()
        self._is_over = True

    # ---- text -------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        passage = self._thought if self._is_thinking else self._text
        passage.waiting += text

    def _certain_end(self) -> int:
        """Up to where the text that waits is certain to be text, and no thought or call without its opening token."""
        waiting = self._text.waiting
        if self._is_beginning and not self._text.is_begun and (_LEAD.match(waiting) or _LEAD_BEGUN.fullmatch(waiting)):
            return 0
        if self._is_thinking:
            return len(waiting)
        match = _CALL.search(waiting, self._run) or _CALL_BEGUN.search(
            waiting, max(self._run, len(waiting) - LONGEST_NAME - len("call:"))
        )
        return match.start() if match else len(waiting)

    def _take_back_thought(self) -> None:
        """The text so far is a thought if it begins with a thought's label: its opening token is missing."""
        match = None if self._text.is_begun else _LEAD.match(self._text.waiting)
        if match:
            self._open_thought()
            self._thought.waiting, self._text.waiting = self._text.waiting[match.end() :], ""
            self._may_have_label = False
            self._close_thought()

    def _take_back_call(self) -> None:
        """The text since the last control token is a call if it reads as one: its opening token is missing."""
        waiting = self._text.waiting
        match = _CALL.search(waiting, self._run)
        block = read_block(waiting[match.start() :], self._tools, is_closed=True) if match else None
        if match and block:
            self._calls += block.calls
            self._text.waiting = waiting[: match.start()] + block.before + block.behind

    # ---- thoughts ---------------------------------------------------------------------------------------------------

    def _open_thought(self) -> None:
        self._thought = _Passage()
        self._is_thinking = self._may_have_label = True
        self._are_calls_quoted = None

    def _flow_thought(self) -> None:
        """Give away what is certain of the open thought; its label is left out."""
        thought = self._thought
        if self._may_have_label:
            match = _LABEL.match(thought.waiting)
            if match and match.group().endswith("\n"):
                thought.waiting = thought.waiting[match.end() :]
            elif _may_be_label(thought.waiting):
                return
            self._may_have_label = False
        is_first = not thought.is_begun
        piece = thought.take()
        if piece and is_first and self._has_thought:
            piece = "\n" + piece
        self._has_thought = self._has_thought or bool(piece)
        self._thoughts.append(piece)

    def _close_thought(self) -> None:
        match = _LABEL.match(self._thought.waiting) if self._may_have_label else None
        self._thought.waiting = self._thought.waiting[match.end() :] if match else self._thought.waiting
        self._may_have_label = False
        self._flow_thought()
        self._is_thinking = False

    def _hold(self, event: _Piece) -> None:
        """What comes behind a call within a thought, until it is clear whether the call is real.

        If the thought is closed and something follows, the call is a part of the thought. If not, the model has left
        out the end of its thought, and the call ends it."""
        held = self._held or []
        held.append(event)
        token = event.text if event.is_control else ""
        if event.is_end or token == "<|turn>" or (token == "<|channel>" and not self._is_held_closed):
            self._release(are_calls_quoted=False)
        elif token == "<channel|>":
            self._is_held_closed = True
        elif self._is_held_closed and (token in ("<|channel>", "<|tool_call>") or (not token and event.text.strip())):
            self._release(are_calls_quoted=True)

    def _release(self, are_calls_quoted: bool) -> None:
        events, self._held, self._are_calls_quoted = self._held or [], None, are_calls_quoted
        for event in events:
            self._take(event)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _close_block(self, is_closed: bool) -> None:
        """The end of a call. `is_closed`: the model has ended it, or its turn."""
        source, self._block = "".join(self._block or []), None
        block = read_block(source, self._tools, is_closed)
        if block is None:
            self._say(source)
        else:
            if self._is_thinking:
                self._close_thought()
            self._calls += block.calls
            self._text.waiting += block.before + block.behind
        self._run = len(self._text.waiting)


def _may_be_label(text: str) -> bool:
    """Whether a thought that begins with this text may turn out to begin with its label."""
    match = _LABEL_BEGUN.fullmatch(text)
    return match is not None and any(label.startswith(match[1].lower()) for label in _LABELS)
