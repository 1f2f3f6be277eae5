"""What a constraint costs a step: masks and checks at 256 positions with Gemma 4's real vocabulary.

    python benchmarks/constrain.py -o runs/bench/constrain.json

A fake model's share of right argmax tokens grows from step to step, from 30 % to 100 %; the wrong ones are random.
Beside it stand a model that is wrong everywhere, the worst case, and the naive way: a mask at every position. Twenty
ordinary schemas follow, with nano's vocabulary: what compiling one takes, and a token of an answer where every word is
wrong.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import gemma_vocab
import grammars

from benchmarks import common
from sfumato.constraints.grammar import Grammar
from sfumato.constraints.guide import Guide, Pick
from sfumato.text.tokenizer import Tokenizer

LENGTH, STEPS, BOUND = 256, 16, 0.1
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["author", "editor", "reader"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "city", "age", "role", "note"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 20}
PEOPLE: list[dict[str, Any]] = [
    {"name": "Ada Lovelace", "city": "London", "age": 36, "role": "author", "note": "wrote the first program"},
    {"name": "Zoë Müller", "city": "Zürich", "age": 41, "role": "editor", "note": None},
    {"name": "Grace Hopper", "city": "New York", "age": 85, "role": "reader", "note": "found a moth in a relay"},
    {"name": "山田 花子", "city": "東京", "age": 29, "role": "author", "note": "prefers short sentences"},
    {"name": "Emmy Noether", "city": "Erlangen", "age": 53, "role": "author", "note": "symmetries and what they keep"},
]


TEXT, WHOLE, NUMBER, FLAG = ({"type": name} for name in ("string", "integer", "number", "boolean"))


def record_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these keys alone, all of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SIMPLE: list[dict[str, Any]] = [
    TEXT,
    WHOLE,
    NUMBER,
    FLAG,
    {"type": "object"},
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": TEXT},
    {"type": "array", "items": WHOLE},
    {"anyOf": [TEXT, WHOLE, {"type": "null"}]},
    {"type": "object", "additionalProperties": NUMBER},
    {"type": "object", "properties": {"a": TEXT, "b": WHOLE, "c": FLAG}},
    record_of(a=TEXT),
    record_of(name=TEXT, age=WHOLE),
    record_of(x=NUMBER, y=NUMBER),
    record_of(ok=FLAG, why=TEXT),
    record_of(colour={"enum": ["red", "green", "blue"]}),
    record_of(day={"type": "string", "format": "date"}),
    record_of(outer=record_of(middle=record_of(inner=TEXT))),
    record_of(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
    record_of(tags={"type": "array", "items": TEXT, "maxItems": 5}, n={"type": "integer", "minimum": 0}),
]
ROOM, CANVAS, ANSWERS = 100, 32, 6


def simple() -> dict[str, float]:
    """What the ordinary schemas take, on average: the best of four times, processor time where it is the walk's."""
    grammars.compiled("schema", {"type": "null"})  # the child process and its vocabulary
    compile_ms, token_us = [], []
    for schema in SIMPLE:
        clock, busy = [], []
        for _ in range(4):
            began = time.perf_counter()
            grammar = grammars.compiled("schema", schema)
            clock.append(time.perf_counter() - began)
        for _ in range(4):
            tokens, began = 0, time.process_time()
            for seed in range(ANSWERS):
                fake = grammars.FakeModel(random.Random(seed), grammars.nano())
                tokens += 1 + len(grammars.written(grammar.start(ROOM), fake, CANVAS)[0])
            busy.append((time.process_time() - began) / tokens)
        compile_ms.append(1e3 * min(clock))
        token_us.append(1e6 * min(busy))
    return {
        "compile_ms": float(np.mean(compile_ms)),
        "compile_ms_worst": max(compile_ms),
        "us_a_token": float(np.mean(token_us)),
    }


class Fake:
    """A model whose words are right, a share of them replaced; picks are the masked argmax of bfloat16 logits."""

    def __init__(self, right: list[int], vocab_size: int, eos: int) -> None:
        self.rng = random.Random(0)
        self.right = (right + [eos] * LENGTH)[:LENGTH]
        self.vocab_size = vocab_size
        self.logits_LV = torch.randn(LENGTH, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.logits_LV[torch.arange(LENGTH), torch.tensor(self.right)] = 30.0

    def top(self, share: float) -> tuple[list[int], list[bool]]:
        is_right = [self.rng.random() < share for _ in range(LENGTH)]
        words = [t if ok else self.rng.randrange(self.vocab_size) for t, ok in zip(self.right, is_right, strict=True)]
        return words, is_right

    def pick(self, position: int, mask: NDArray[np.bool_]) -> tuple[int, float]:
        allowed = torch.from_numpy(mask)
        row_V = self.logits_LV[position].float().masked_fill(~allowed, -torch.inf)
        chances_V = row_V.softmax(-1)
        return int(row_V.argmax()), float(torch.special.entr(chances_V).sum())


def _picked(fake: Fake, position: int, _: int, mask: NDArray[np.bool_]) -> tuple[int, float]:
    return fake.pick(position, mask)


def run(guide: Guide, fake: Fake, shares: list[float], is_last: bool) -> dict[str, Any]:
    seconds, masks, tokens = [], [], 0
    for share in shares:
        top, is_sure = fake.top(share)
        before, began = guide.masks, time.perf_counter()
        walk = guide.walk(top, is_sure, fake.pick, BOUND, is_last)
        seconds.append(time.perf_counter() - began)
        masks.append(guide.masks - before)
        tokens = len(walk.tokens)
    return {
        "ms_mean": 1000 * float(np.mean(seconds)),
        "ms_worst": 1000 * max(seconds),
        "masks_mean": float(np.mean(masks)),
        "masks_worst": max(masks),
        "tokens": tokens,
        "ms": [round(1000 * s, 3) for s in seconds],
        "masks": masks,
    }


def naive(grammar: Grammar, fake: Fake) -> dict[str, Any]:
    """A mask and a pick for each position of each step, from the left, nothing kept."""
    seconds, masks = [], 0
    no_token = fake.vocab_size  # every position needs its mask

    def picker(position: int) -> Pick:
        return lambda _, mask: fake.pick(position, mask)

    for _ in range(2):
        guide = grammar.start(LENGTH)
        began = time.perf_counter()
        for position in range(LENGTH):
            walk = guide.walk([no_token], [True], partial(_picked, fake, position), BOUND, True)
            guide.commit(len(walk.tokens))
            if guide.is_over:
                break
        seconds.append(time.perf_counter() - began)
        masks = guide.masks
    return {"ms_mean": 1000 * float(np.mean(seconds)), "ms_worst": 1000 * max(seconds), "masks_mean": masks}


def main() -> None:
    arguments = common.argument_parser(__doc__, 5.0).parse_args()
    common.say("the vocabulary")
    tokenizer = Tokenizer(gemma_vocab.build())
    eos = tokenizer.special_id("eos_token")
    began = time.perf_counter()
    Grammar.compile("choices", ["a"], tokenizer, tokenizer.vocab_size, [eos])
    first = time.perf_counter() - began
    began = time.perf_counter()
    grammar = Grammar.compile("schema", SCHEMA, tokenizer, tokenizer.vocab_size, [eos])
    compiled = time.perf_counter() - began

    right = spelled(grammar, tokenizer, json.dumps(PEOPLE, ensure_ascii=False), eos)
    fake = Fake(right, tokenizer.vocab_size, eos)
    common.say(f"{len(right)} tokens, {STEPS} steps")
    rows = {
        "settles": run(grammar.start(LENGTH), fake, [0.3 + 0.7 * s / (STEPS - 1) for s in range(STEPS)], False),
        "wrong everywhere": run(grammar.start(LENGTH), fake, [0.0] * STEPS, False),
        "wrong everywhere, last step": run(grammar.start(LENGTH), fake, [0.0], True),
        "naive": naive(grammar, fake),
    }
    means = simple()
    record = {
        "what": "constrain",
        "positions": LENGTH,
        "vocabulary": tokenizer.vocab_size,
        "tokens": len(right),
        "seconds_first_grammar": first,
        "seconds_compile": compiled,
        "rows": rows,
        "simple": means,
        "targets": {"mean ms a step": common.target(rows["settles"]["ms_mean"], 20.0)},
    }
    common.finish(record, arguments)
    lines = [
        [name, f"{row['ms_mean']:.2f}", f"{row['ms_worst']:.2f}", f"{row['masks_mean']:.1f}"]
        for name, row in rows.items()
    ]
    print(common.table(["", "ms a step", "worst", "masks a step"], lines))
    print(f"first grammar {first:.2f} s, this one {1000 * compiled:.1f} ms")
    print(f"simple schemas: {means['compile_ms']:.1f} ms to compile, {means['us_a_token']:.0f} µs a token")


def spelled(grammar: Grammar, tokenizer: Tokenizer, text: str, eos: int) -> list[int]:
    """The tokens of a text as the tokenizer writes them, where the grammar does not force others."""
    guide, data = grammar.start(LENGTH), text.encode()
    tokens: list[int] = []
    while not guide.is_over:
        left = data[len(tokenizer.decode(tokens).encode()) :].decode()
        top = tokenizer.encode(left) or [eos]
        walk = guide.walk(top[:1], [True], lambda _, mask: (int(mask.argmax()), 0.0), BOUND, True)
        tokens += walk.tokens
        guide.commit(len(walk.tokens))
    assert tokenizer.decode(tokens) == text, tokenizer.decode(tokens)
    return tokens


if __name__ == "__main__":
    main()
