"""Write what nano-skills is made of besides its weights: tokenizer, template, config.json, generation_config.json.

The tokenizer is built as nano's (`make_nano_tokenizer`), with no more ids than its words need. A word is one token
wherever it stands, in an instruction and in a document, so that it can be copied; digits, signs and most characters of
a molecule are a token each; the fixed parts of instructions are one.

    python scripts/make_nano_skills.py
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
    NANO,
    assembled,
    configuration,
    learn_merges,
)
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.tasks import edits, graphs

FOLDER = NANO.with_name("nano_skills")

FIXED = (
    "Rename▁",
    "▁to▁",
    "Set▁",
    "▁of▁",
    "Sort▁by▁",
    "Sort▁the▁list.",
    "Fix▁the▁syntax.",
    "Fill▁the▁empty▁cell.",
    "Fill▁the▁gap:\ndef▁",
    "return▁",
    "▁if▁",
    "▁in▁",
    "Complete▁this▁molecule:",
    "Molecule▁with▁this▁formula:",
    "Molecule▁with▁these▁rings:",
    "Molecule▁with▁these▁groups:",
    "Plot▁this:",
    "Which▁family▁is▁this?",
    "sin(x)",
)
"""Parts of instructions that are one token."""
INFILL = """
def return for in if else and or not is of the to at all its on but than then each with from other same every how
abs len max min sum sorted range split append count join lower upper replace startswith endswith
xs ys zs whether times plus minus half twice squared modulo between below above size first second last lies even odd
letter letters less more larger largest smaller smallest most least without backwards words number divides added are
equals often multiplied order after length lengths kept middle distance subtracted begins ends end around case front
""".split()
MOLECULES = """
rings atoms ester ether amine amide nitrile chloride fluoride sulfide alcohol thiol acid alkene alkyne aldehyde ketone
""".split()


def words() -> list[str]:
    """Words that are one token each."""
    own = [*edits.KEYS, *edits.WORDS, *edits.TITLES, *graphs.FAMILIES, *INFILL, *MOLECULES]
    return list(dict.fromkeys(["user", "model", "system", *own]))


def merges() -> list[tuple[str, str]]:
    """Words; then the fixed parts out of their words and signs."""
    parts = [piece for text in FIXED for piece in _pieces(text) if len(piece) > 1]
    weights = Counter({word: 20_000 for word in [*words(), *parts]})
    last: dict[tuple[str, str], None] = {}
    for text in FIXED:
        chain = _pieces(text)
        for end in range(1, len(chain)):
            last[("".join(chain[:end]), chain[end])] = None
    return [*learn_merges(weights, None), *last]


def _pieces(text: str) -> list[str]:
    """Runs of letters, and every other character by itself."""
    pieces: list[str] = []
    for character in text:
        if pieces and character.isalpha() and pieces[-1][-1].isalpha():
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def build() -> Tokenizer:
    """The tokenizer; SystemExit where a word or a fixed part is not one token."""
    own = merges()
    size = len(CONTROL) + len(BYTES) + len(CHARACTERS) + len(own)
    return assembled(own, size, [*words(), *FIXED])


def config(vocabulary: int) -> ModelConfig:
    """Six layers, every third full; one of two small experts beside a wide dense part."""
    sliding = LayerConfig(head_dim=32, kv_heads=2, window=128, rope=Rope(100.0))
    full = LayerConfig(head_dim=64, kv_heads=1, window=None, rope=Rope(100.0, partial=0.25, proportional=True))
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=384,
        num_heads=6,
        num_experts=2,
        top_k_experts=1,
        expert_size=32,
        layers=tuple(full if (number + 1) % 3 == 0 else sliding for number in range(6)),
        canvas_length=96,
        max_position=4096,
        eos_ids=(1,),
    )


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    shutil.copy(NANO / "chat_template.jinja", FOLDER / "chat_template.jinja")
    generation = json.loads((NANO / "generation_config.json").read_text())
    generation |= {"max_new_tokens": 96, "max_denoising_steps": 16, "t_min": 0.8, "t_max": 1.0}
    for name, value in (
        ("tokenizer_config.json", configuration()),
        ("config.json", config(tokenizer.get_vocab_size()).to_dict()),
        ("generation_config.json", generation),
    ):
        (FOLDER / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
