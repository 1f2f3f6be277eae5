"""Checks of a whole text, for what a schema says and a grammar cannot: that all items of a list differ, for one.

A guide asks them where a text ends, and of each completion that it means to take, and goes back where the answer is no.
They are values, and go to other processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.constraints.values.document import Document
from sfumato.constraints.values.validity import is_valid
from sfumato.text.replies import parse_ids
from sfumato.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SchemaCheck:
    """The text is JSON that obeys a schema."""

    schema: Any

    def is_passed(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
        """Whether a whole text passes."""
        try:
            value = json.loads(tokenizer.decode(tokens))
        except (ValueError, RecursionError):
            return False
        return is_valid(value, Document(self.schema, "the schema").root)


@dataclass(frozen=True)
class CallCheck:
    """The arguments of each call in the text can be read, and obey the schema of their tool; `schemas` has its name."""

    schemas: Mapping[str, Any]
    opener: str = "<|tool_call>"

    def is_passed(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
        """Whether a whole text passes."""
        calls = parse_ids(tokenizer, tokens).tool_calls
        if len(calls) != list(tokens).count(tokenizer.id(self.opener) or -1):
            return False
        return all(
            call["name"] in self.schemas
            and is_valid(call["arguments"], Document(self.schemas[call["name"]], "the tool's schema").root)
            for call in calls
        )


Check = SchemaCheck | CallCheck
