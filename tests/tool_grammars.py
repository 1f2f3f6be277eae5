"""Tools and their grammars under nano's vocabulary, for tests of constraints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sfumato.constraints.grammar import Grammar
from sfumato.text.tokenizer import Tokenizer

NANO_FOLDER = Path(__file__).parents[1] / "sfumato" / "nano"
NANO = Tokenizer.from_folder(NANO_FOLDER)
ENDS = [0, 1, 5, 13]  # nano's <pad>, <eos>, <turn|> and <|tool_response>
OPEN, CLOSE = 11, 12  # its <|tool_call> and <tool_call|>

TEXT = {"type": "string"}


def record(required: str = "", /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def compiled_tools(*tools: dict[str, Any], tokenizer: Tokenizer = NANO, ends: list[int] = ENDS) -> Grammar:
    return Grammar.compile("calls", list(tools), tokenizer, tokenizer.vocab_size, ends)


def allows_ids(grammar: Grammar, ids: list[int]) -> bool:
    """Whether the whole answer may be these tokens."""

    def pick(at: int, mask: np.ndarray) -> tuple[int, float]:
        return int(np.flatnonzero(mask)[0]), 0.0

    walk = grammar.start(len(ids) + 200).walk([*ids, ENDS[1]], [True] * (len(ids) + 1), pick, 1.0)
    return walk.tokens == ids and walk.end == len(ids)


def allows(grammar: Grammar, text: str) -> bool:
    """The same for the tokens of a text, its control tokens real."""
    return allows_ids(grammar, NANO.encode(text, parse_special=True))
