"""What the model writes while it learns: answers to held-out prompts, with drafts on their way from noise to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.events import Done, Draft
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.text.tokenizer import Tokenizer
from sfumato.training import logs
from sfumato.training.data import Source

DRAFTS = 4
"""Drafts of an answer that are kept, evenly spaced over its steps."""
SEARCHED = 16
"""Examples among which prompts are looked for."""


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt, and the answer that its example has."""

    tokens: list[int]
    prompt: str
    expected: str


@dataclass(frozen=True)
class Sample:
    """An answer, and how it came."""

    step: int
    number: int
    prompt: str
    expected: str
    text: str
    drafts: list[str]
    passes: int


def prompts_of(source: Source, tokenizer: Tokenizer, count: int) -> list[SamplePrompt]:
    """The first prompts of a source, all different."""
    if not count:
        return []
    batch = source.batch(0, max(count, SEARCHED), torch.device("cpu"))
    prompts: dict[tuple[int, ...], SamplePrompt] = {}
    for row, (whole, start) in enumerate(zip(batch.counts, batch.prompts, strict=True)):
        ids = batch.tokens_BT[row, :whole].tolist()
        answer = [token for token in ids[start:] if token not in tokenizer.control_tokens]
        prompt = SamplePrompt(ids[:start], tokenizer.decode(ids[:start]), tokenizer.decode(answer))
        prompts.setdefault(tuple(prompt.tokens), prompt)
    return list(prompts.values())[:count]


def write_samples(llm: LLM, prompts: Sequence[SamplePrompt], step: int) -> list[Sample]:
    """The model's answers, a canvas long at most, with the same noise each time."""
    options = Options(seed=0, max_tokens=llm.model.config.canvas_length, drafts=True)
    drafts: dict[int, list[str]] = {row: [] for row in range(len(prompts))}
    done: dict[int, Done] = {}
    for event in llm.events([prompt.tokens for prompt in prompts], options=options):
        if isinstance(event, Draft):
            drafts[event.row].append(event.text)
        elif isinstance(event, Done):
            done[event.row] = event
    samples = []
    for row, prompt in enumerate(prompts):
        own = drafts[row]
        places = sorted({round(i * (len(own) - 1) / (DRAFTS - 1)) for i in range(DRAFTS)}) if own else []
        kept = [own[place] for place in places]
        end = done[row]
        samples.append(Sample(step, row, prompt.prompt, prompt.expected, end.text, kept, end.usage.passes))
    return samples


def log_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Append them to samples.jsonl."""
    for sample in samples:
        logs.append(folder / "samples.jsonl", asdict(sample))


def as_markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The samples of a log as a page: the last step first."""
    parts = ["# Samples\n\nAnswers to held-out prompts while it trained, and drafts on their way.\n"]
    for line in reversed(lines):
        parts.append(f"\n## Step {line['step']}, prompt {line['number']}\n\n")
        rows = [("prompt", line["prompt"]), ("expected", line["expected"])]
        rows += [(f"draft {n}", text) for n, text in enumerate(line["drafts"], 1)] + [("answer", line["text"])]
        parts += [f"- {name}: {_code(text)}\n" for name, text in rows]
    return "".join(parts)


def _code(text: str) -> str:
    fence = "`" * (max((len(run) for run in text.split() if set(run) == {"`"}), default=0) + 1)
    one_line = text.replace("\n", "⏎")
    return f"{fence} {one_line} {fence}" if one_line else "(nothing)"
