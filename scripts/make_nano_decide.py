"""Write what nano-decide is made of besides its weights: tokenizer, template, config.json, generation_config.json.

The tokenizer is built as nano's (`make_nano_tokenizer`), of 768 ids, with merges for the words and the fixed sentences
of typed questions, so that a question takes about a third of the tokens. An option's line begins with one token, and
what follows is written with the tokens of an answer.

    python scripts/make_nano_decide.py
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.make_nano_tokenizer import (
    BYTES,
    CHARACTERS,
    CONTROL,
    ENGLISH,
    NANO,
    assembled,
    configuration,
    learn_merges,
)
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.tasks import decisions

FOLDER = NANO.with_name("nano_decide")
VOCABULARY = 768

SENTENCES = (
    "Answer Yes or No only.",
    "Answer with one of the options only.",
    "Answer with the number of a level only.",
    "Is there",
    "Is any line",
    "Does the text have",
    "Does the text name",
    "there is no",
    "there is",
    "Who has more",
    "Who has most",
    "Who differs",
    "Which has the largest number",
    "How many are",
    "How many lines are",
    "Which line is odd",
    "Which is not like the others",
    "Where does",
    "Which takes",
)
"""Sentences that are one token: in questions, and in what the generator asks."""
DESKS = "billing repair sales orders support returns".split()
WORDS = ("user", "model", "system", "Yes", "No", "trust", "Options", "Levels", "Count", "▁go", "▁of", "▁only")
ENDS = ("\n-▁", "▁of▁10", "trust▁", "Options:", "Levels:", *(f"\n{digit}:" for digit in range(10)))


def words() -> list[str]:
    """Words that are one token each."""
    own = [*decisions.NAMES, *decisions.COLOURS, *DESKS]
    both = [*decisions.NAMES, *decisions.SECOND, *decisions.COLOURS, *decisions.LEVELS, *decisions.PARTS]
    parts = [word for sentence in SENTENCES for word in _words(sentence)]
    return list(dict.fromkeys([*WORDS, *own, *("▁" + word for word in both), *parts]))


def _words(sentence: str) -> list[str]:
    first, *rest = sentence.rstrip(".").split(" ")
    return [first, *("▁" + word for word in rest)]


def merges() -> list[tuple[str, str]]:
    """What begins an option's line; words, most of the vocabulary; the sentences out of their words; English."""
    first = [("\n", "-"), ("\n-", "▁")]
    weights = Counter({word: 20_000 for word in words()})
    weights.update({"▁" + word: 1000 - 3 * rank for rank, word in enumerate(ENGLISH)})
    chains = [[*_words(sentence), *("." if sentence.endswith(".") else "")] for sentence in SENTENCES]
    chains += [["▁of", "▁", "1", "0"], ["trust", "▁"], ["Options", ":"], ["Levels", ":"]]
    last: dict[tuple[str, str], None] = {}
    for chain in chains:
        for end in range(1, len(chain)):
            last[("".join(chain[:end]), chain[end])] = None
    for digit in "0123456789":  # not "\n" with the digit first, which would join an answer with what stands before it
        last |= {(digit, ":"): None, ("\n", f"{digit}:"): None}
    count = VOCABULARY - len(CONTROL) - len(BYTES) - len(CHARACTERS) - len(first) - len(last)
    return [*first, *learn_merges(weights, count), *last]


def build() -> Tokenizer:
    """The tokenizer; SystemExit where a word or a sentence is not one token."""
    return assembled(merges(), VOCABULARY, [*words(), *ENDS, *SENTENCES])


def config() -> ModelConfig:
    """Six layers, every third full."""
    sliding = LayerConfig(head_dim=16, kv_heads=4, window=128, rope=Rope(100.0))
    full = LayerConfig(head_dim=32, kv_heads=2, window=None, rope=Rope(100.0, partial=0.25, proportional=True))
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=128,
        num_heads=8,
        num_experts=4,
        top_k_experts=2,
        expert_size=32,
        layers=tuple(full if (number + 1) % 3 == 0 else sliding for number in range(6)),
        canvas_length=16,
        max_position=16384,
        eos_ids=(1,),
    )


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    build().save(str(FOLDER / "tokenizer.json"))
    shutil.copy(NANO / "chat_template.jinja", FOLDER / "chat_template.jinja")
    generation = json.loads((NANO / "generation_config.json").read_text())
    generation |= {"max_new_tokens": 16, "max_denoising_steps": 8, "t_min": 1.0, "t_max": 1.0}
    for name, value in (
        ("tokenizer_config.json", configuration()),
        ("config.json", config().to_dict()),
        ("generation_config.json", generation),
    ):
        (FOLDER / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
