"""What a checkpoint is for, where it is for one thing alone: its own sentence, kept in a file beside it.

    {"purpose": "nano solves Sudoku and nothing else", "prompt": "Solve this Sudoku:", "max_tokens": 82}

Whoever talks with such a model is told, if what is asked is something else. The file is our own: transformers refuses a
generation_config.json with keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.options import OPTIONS

FILE = "purpose.json"
"""The file of a checkpoint that holds it."""
MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Purpose:
    """What a model is for."""

    sentence: str
    """One sentence, for whoever asks something else."""
    prompt: str = ""
    """What stands in every prompt that it is for; "": nothing is known of them."""
    max_tokens: int | None = None
    """New tokens at most, where a request leaves that open."""

    def fits(self, prompt: str) -> bool:
        """Whether a prompt is of the kind that the model is for."""
        return self.prompt in prompt

    @classmethod
    def of(cls, raw: Mapping[str, Any], source: str) -> Purpose:
        """The purpose that such a file states.

        CheckpointError, which names `source`, for one that is no sentence or no length."""
        texts = {name: raw.get(name, "") for name in ("purpose", "prompt")}
        for name, text in texts.items():
            if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
                raise CheckpointError(f"{source}: {name} must be a text of {MOST_CHARACTERS} characters at most")
        try:
            length = OPTIONS["max_tokens"].checked(raw.get("max_tokens"))
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error
        if not texts["purpose"]:
            raise CheckpointError(f"{source}: purpose is missing; give a sentence")
        return cls(" ".join(texts["purpose"].split()), texts["prompt"], length)
