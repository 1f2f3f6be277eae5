"""What benchmarks/decisions.py asks, and of whom: models with a vocabulary of words, states, questions.

mid and the slice have random weights. Their tokens are words all the same, as what is timed hangs on how many there
are: Gemma 4's vocabulary, read from the shared GGUF file, whole or, where a model has room for fewer words, its
commonest. "toy" is for seeing that everything runs, with nano's vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import gemma_vocab

from benchmarks import common
from sfumato import LLM, Choice, Noul
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.save import save
from sfumato.measure.parts import random_config, random_model
from sfumato.model.config import ModelConfig
from sfumato.questions import Question
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

# ---- models ---------------------------------------------------------------------------------------------------------


CONTROL, USER, BYTE = 3, 4, 6
"""Kinds of tokens in a GGUF file."""

PLAIN = {"▁", *map(chr, range(128))}
"""Letters that words are made of."""


def words(most: int) -> tuple[Tokenizer, ChatTemplate]:
    """Gemma 4's tokenizer of at most so many words, and its chat template: control tokens, bytes and letters, then the
    words that its merges make first."""
    whole, known = gemma_vocab.build(), gemma_vocab.metadata()
    tokens, kinds = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    if most >= len(tokens):
        tokenizer = Tokenizer(whole)
        return tokenizer, ChatTemplate(gemma_vocab.template(), tokenizer.special)
    controls = {token: kind for token, kind in zip(tokens[:most], kinds, strict=False) if kind in (CONTROL, USER)}
    letters = [t for t, kind in zip(tokens, kinds, strict=True) if kind == BYTE or t in PLAIN]
    numbers = {token: n for n, token in enumerate(dict.fromkeys([*tokens[:4], *controls, *letters]))}
    merges = []
    for merge in known["tokenizer.ggml.merges"]:
        left, right = merge.split(" ")
        if len(numbers) < most and left in numbers and right in numbers:
            numbers.setdefault(left + right, len(numbers))
            merges.append((left, right))
    model = tokenizers.models.BPE(vocab=numbers, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer, inner.decoder = whole.normalizer, whole.decoder
    for kind, add in ((USER, inner.add_tokens), (CONTROL, inner.add_special_tokens)):
        add([tokenizers.AddedToken(token, normalized=False) for token, own in controls.items() if own == kind])
    tokenizer = Tokenizer(inner)
    return tokenizer, ChatTemplate(gemma_vocab.template(), tokenizer.special)


def ended(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with the words that end answers where this tokenizer has them."""
    return replace(config, eos_ids=tuple(n for n in map(tokenizer.id, ("<eos>", "<turn|>")) if n is not None))


def model_of(name: str, device: str, layers: int = 2, recipe: str = "") -> LLM:
    """ "mid", "slice" (the released size with these layers, in this recipe or bfloat16), "toy", or a checkpoint."""
    if name == "toy":
        tokenizer = Tokenizer.from_folder(NANO)
        config = ended(random_config("tiny"), tokenizer)
        template = ChatTemplate.from_folder(NANO, tokenizer.special)
        return LLM(random_model(config, torch.float32, device, "auto"), tokenizer, template, {}, name)
    if name not in ("mid", "slice"):
        return LLM.load(name, device=device)
    config = random_config("mid") if name == "mid" else common.released_config(layers)
    tokenizer, template = words(config.vocab_size)
    config = ended(config, tokenizer)
    if name == "mid":
        model = random_model(config, torch.bfloat16, device, "auto", quantize=recipe or None)
    else:
        model = common.random_packed(config, device, "auto", recipe)
    return LLM(model, tokenizer, template, {}, name)


def checkpoint_of_mid(folder: Path) -> Path:
    """mid with its vocabulary as a checkpoint, for a server; it is written once."""
    if not (folder / "config.json").exists():
        common.say(f"writing mid to {folder}, once")
        config = random_config("mid")
        tokenizer, template = words(config.vocab_size)
        beside = folder.with_name(f"{folder.name}-words")
        beside.mkdir(parents=True, exist_ok=True)
        tokenizer.save(beside)
        (beside / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        model = random_model(ended(config, tokenizer), torch.bfloat16, "cpu", "reference")
        save(model, folder, tokenizer_from=beside, generation={})
    return folder


# ---- states ---------------------------------------------------------------------------------------------------------

SUBJECTS = ("The parcel", "Your invoice", "My account", "The new printer", "A colleague", "The warehouse", "Our driver")
VERBS = ("arrived late on", "was changed without notice on", "was promised to us for", "stopped working on")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "the third of March", "the last day of the month")
ENDS = (
    "and nobody has answered my letters since.",
    "although we paid the whole amount in advance.",
    "so please tell me what I should do next.",
    "which has never happened in the last six years.",
    "and the second one has a crack in the glass.",
)


def state(tokenizer: Tokenizer, tokens: int, number: int) -> str:
    """A letter of so many tokens; each number has its own, and no two begin alike."""
    draw = random.Random(number)
    sentences = [f"Case {number} of the support desk."]
    ids: list[int] = []
    while len(ids) < tokens:
        parts = [draw.choice(some) for some in (SUBJECTS, VERBS, DAYS, ENDS)]
        sentences.append(" ".join(parts))
        if len(sentences) % 8 == 0:
            ids = tokenizer.encode(" ".join(sentences))
    return tokenizer.decode(ids[:tokens])


# ---- questions ------------------------------------------------------------------------------------------------------

MATTERS = ("the invoice", "the delivery", "the contract", "the repair", "the account", "the complaint", "the order")
ASPECTS = (
    "how soon it needs an answer",
    "which desk it belongs to",
    "what the customer expects",
    "who should read it first",
    "how it should be filed",
    "what caused it",
    "what it will cost us",
    "whether it came up before",
    "what was promised",
    "what is missing",
)
DESKS = (
    *("Billing", "Returns", "Shipping", "Repairs", "Sales", "Legal", "Press", "Hiring", "Security", "Support"),
    *("Training", "Design", "Transport", "Insurance", "Research", "Planning", "Purchasing", "Accounts", "Archive"),
    *("Exports", "Facilities", "Catering", "Events", "Licences", "Warranty", "Quality", "Privacy", "Reception"),
)
MEANINGS = (
    "payments, invoices and refunds of customers",
    "goods that come back to us",
    "parcels on their way to customers",
    "machines that need a new part",
    "questions before anything was bought",
    "contracts, claims and letters from lawyers",
    "everything that no other desk answers",
)
KINDS = ("2", "16", "255", "255 unlike")
"""Of options: yes or no; described desks; names that begin alike; single words."""


def instructions(number: int) -> str:
    """About a dozen words; different for every number below 70."""
    matter, aspect = MATTERS[number % len(MATTERS)], ASPECTS[number // len(MATTERS) % len(ASPECTS)]
    return f"Read the part of the letter about {matter} and decide {aspect}."


def question(kind: str, number: int, tokenizer: Tokenizer) -> Question | None:
    """The question of this number, with options of this kind; None where the vocabulary has too few words."""
    text = instructions(number)
    if kind == "2":
        return Noul(f"{text} Does it ask for a refund?")
    if kind == "255":
        return Choice([f"Queue {n:03}" for n in range(1, 256)], text)
    if kind == "255 unlike":
        names = list(itertools.islice(whole_words(tokenizer), 255))
        return Choice(names, text) if len(names) == 255 else None
    names = [DESKS[(number + n) % len(DESKS)] for n in range(int(kind))]
    return Choice({name: MEANINGS[(number + n) % len(MEANINGS)] for n, name in enumerate(names)}, text)


@functools.lru_cache(4)
def _whole_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    pieces = (tokenizer.token(n) or "" for n in range(tokenizer.vocab_size))
    plain = (piece for piece in pieces if len(piece) > 3 and piece.isascii() and piece.isalpha() and piece.islower())
    return tuple(itertools.islice((piece for piece in plain if len(tokenizer.encode(piece)) == 1), 1024))


def whole_words(tokenizer: Tokenizer) -> Iterator[str]:
    """Words of one token each."""
    return iter(_whole_words(tokenizer))


def questions(kind: str, count: int, tokenizer: Tokenizer) -> dict[str, Question] | None:
    """So many of them by ids."""
    each = {f"q{n:02}": question(kind, n, tokenizer) for n in range(1, count + 1)}
    whole = {id: one for id, one in each.items() if one is not None}
    return whole if len(whole) == count else None


SHORT = ("Which team should answer?", "Where does it belong?", "Who is it for?", "What is it about?")


def three(number: int) -> Choice:
    """A short question with three options."""
    return Choice(["Billing", "Technical", "Other"], SHORT[number % len(SHORT)])


def json_request(text: str, each: dict[str, Question]) -> tuple[str, dict[str, Any]]:
    """The prompt and the schema with which the same questions are answered by one generated object."""
    lines = [f"{id}: {one.text()}" for id, one in each.items()]
    fields: dict[str, Any] = {}
    for id, one in each.items():
        assert isinstance(one, Noul | Choice)
        fields[id] = {"enum": one.words}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    return "\n\n".join([text, *lines, "Answer with one JSON object that has these keys."]), schema
