"""What a checkpoint is for, where it is for one thing alone: its own sentence, kept in its generation_config.json.

    "sfumato": {"purpose": "nano solves Sudoku and nothing else", "prompt": "Solve this Sudoku:", "max_tokens": 82}

Whoever talks with such a model is told, if what is asked is something else. Another program leaves the key aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.options import OPTIONS

KEY = "sfumato"
"""The key in generation_config.json."""
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
    def of(cls, generation: Mapping[str, Any], source: str) -> Purpose | None:
        """The purpose that a generation_config states, None for one that states none.

        CheckpointError, which names `source`, for one that is no sentence or no length."""
        if (raw := generation.get(KEY)) is None:
            return None
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{source}: {KEY} is {type(raw).__name__}; it must be an object")
        texts = {name: raw.get(name, "") for name in ("purpose", "prompt")}
        for name, text in texts.items():
            if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
                raise CheckpointError(f"{source}: {KEY}.{name} must be a text of {MOST_CHARACTERS} characters at most")
        try:
            length = OPTIONS["max_tokens"].checked(raw.get("max_tokens"))
        except InputError as error:
            raise CheckpointError(f"{source}: {KEY}.{error}") from error
        if not texts["purpose"]:
            raise CheckpointError(f"{source}: {KEY}.purpose is missing; give a sentence")
        return cls(" ".join(texts["purpose"].split()), texts["prompt"], length)
