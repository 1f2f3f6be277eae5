"""What `sfumato finetune --dry-run` shows: a few examples as the model will see them, and the whole set in figures.

On a terminal an example is its text, each token in the shade of what is learned from it. Elsewhere a token is a line:
its position, its id, the part that it belongs to, the losses that it has, its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from sfumato.cli.view import SMOKE, visible
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.data.dataset import Dataset, PlacedExample
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.setup import base_of, dataset_of
from sfumato.training.spec import DataSpec

EXAMPLES = 3
"""Examples that a dry run shows."""

_BARS = 8
_BAR = 32
"""Columns of the longest bar of the histogram."""
_BESIDE_BAR = 24
"""Columns beside a bar: lengths, and how many."""
_PROMPT, _LEARNED, _FILL, _CUT = "dim", ("", SMOKE[6]), SMOKE[1], SMOKE[3]
"""Styles; neighbours among the tokens that are learned have one each, so that they can be told apart."""


def dry_run(model: str, data: DataSpec, numbers: TrainingRecipe, console: Console) -> None:
    """Read the data as training will, show examples of it and its figures; InputError for bad records, by number."""
    base = base_of(model)
    with console.status("reading the data") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"reading the data: {done / max(1, total):.0%}")

        dataset = dataset_of(data, base, numbers.seed, progress)
    firsts = {one.place: one for one in reversed(dataset.examples(20 * EXAMPLES))}  # rather of several records
    shown = list(reversed(firsts.values()))[:EXAMPLES]
    show_examples(shown, base.tokenizer, base.config.canvas_length, base.config.eos_ids[0], console)
    show_figures(dataset, data.limit(base.config.max_position).tokens, numbers.batch, console)


def show_examples(
    examples: Sequence[PlacedExample], tokenizer: Tokenizer, canvas_length: int, eos: int, console: Console
) -> None:
    """Show each example token by token, with its canvases and what is learned from it."""
    for number, (example, place) in enumerate(examples, 1):
        responses = len(example.tokens) - example.prompt
        canvases = -(-responses // canvas_length)
        parts = f"{len(example.tokens):,} tokens: {example.prompt:,} prompt, {responses:,} response"
        several = f"{canvases} canvases" if canvases > 1 else "one canvas"
        title = f"Example {number}: {place}; {parts} in {several} of {canvas_length}"
        console.print(visible(title, "bold"), soft_wrap=True)
        tokens = list(_tokens_of(example.tokens, example.prompt, canvas_length))
        fill = canvases * canvas_length - responses
        if console.is_terminal:
            console.print(_flow(tokens, tokenizer, fill, eos, example.is_cut))
        else:
            for line in _lines(tokens, tokenizer, fill, eos, example.is_cut):
                console.print(visible(line), soft_wrap=True)
        console.print()
    if console.is_terminal:
        legend = [("prompt", _PROMPT), ("response", _LEARNED[0]), ("response", _LEARNED[1]), ("end fill", _FILL)]
        legend += [("unknown behind a cut", _CUT)]
        console.print(Text("  ").join(Text(word, style) for word, style in legend))


@dataclass(frozen=True)
class _ShownToken:
    """A token, its position in the example, and the canvas that it is in (0: the prompt)."""

    token: int
    position: int
    canvas: int
    is_first: bool
    """Of its canvas."""


def _tokens_of(tokens: Sequence[int], prompt: int, canvas_length: int) -> Iterator[_ShownToken]:
    for position, token in enumerate(tokens):
        behind = position - prompt
        canvas = behind // canvas_length + 1 if behind >= 0 else 0
        yield _ShownToken(token, position, canvas, behind >= 0 and behind % canvas_length == 0)


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, with signs for what has none."""
    text = tokenizer.token(token)
    return "?" if text is None else text if token in tokenizer.special_ids else text.replace("▁", " ")


def _flow(tokens: Sequence[_ShownToken], tokenizer: Tokenizer, fill: int, eos: int, is_cut: bool) -> Text:
    """The example as text, in the styles of what is learned."""
    flow = Text()
    for place in tokens:
        if place.is_first:
            flow.append_text(visible(f"\n── canvas {place.canvas} ──\n", _PROMPT))
        style = _LEARNED[place.position % 2] if place.canvas else _PROMPT
        flow.append_text(visible(_spelling(tokenizer, place.token).replace("\n", "↵\n"), style))
    if fill:
        name = _spelling(tokenizer, eos)
        flow.append_text(
            visible(f"… cut: {fill} places unknown" if is_cut else f" + {fill} × {name}", _CUT if is_cut else _FILL)
        )
    return flow


def _lines(tokens: Sequence[_ShownToken], tokenizer: Tokenizer, fill: int, eos: int, is_cut: bool) -> Iterator[str]:
    """The example as a table: position, id, part, losses, text."""
    for place in tokens:
        part = f"canvas {place.canvas}" if place.canvas else "prompt"
        losses = [*(["canvas"] if place.canvas else []), *(["next"] if place.position else [])]
        text = repr(_spelling(tokenizer, place.token))
        yield f"{place.position:>6} {place.token:>7}  {part:<10} {' + '.join(losses) or '-':<14} {text}"
    if fill and is_cut:
        yield f"{'cut':>6} {'-':>7}  {'fill':<10} {'-':<14} {fill} places of which nothing is learned"
    elif fill:
        yield f"{'':>6} {eos:>7}  {'fill':<10} {'canvas':<14} {fill} × {_spelling(tokenizer, eos)!r}"


def show_figures(data: Dataset, longest: int, batch: int, console: Console) -> None:
    """The set in figures: examples, tokens, a histogram of lengths, what is cut, left out and held out."""
    about = data.train.describe()
    tokens, prompts = about["tokens"], about["prompt_tokens"]
    files = ", ".join(about["files"][:3]) + (" …" if len(about["files"]) > 3 else "")
    held = f", and {len(data.held_out):,} held out" if data.held_out is not None else ""
    records = _several(about["records"], "record")
    padding = f"in batches of {batch}, {data.train.padding(batch):.1%} of the positions are padding"
    lines = [
        f"{_several(len(data.train), 'example')} to train on{held}, of {records} in {files}",
        f"{tokens:,} tokens, {prompts / tokens:.0%} of them prompt; {padding}",
    ]
    if about["cut"]:
        lines.append(f"{_several(about['cut'], 'example')} cut at {longest:,} tokens")
    for reason, count in about["left_out"].items():
        lines.append(f"{count:,} left out ({reason}), from {'; '.join(about['left_out_at'][:5])}")
    for line in lines:
        console.print(visible(line), soft_wrap=True)
    for line in _histogram(data.train.lengths, min(_BAR, max(1, console.width - _BESIDE_BAR))):
        console.print(visible(line), soft_wrap=True)


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _histogram(lengths: np.ndarray[Any, Any], most: int = _BAR) -> Iterator[str]:
    """Lines of a histogram of lengths in tokens, its bars of `most` columns; every length belongs to one line."""
    first, last = int(lengths.min()), int(lengths.max())
    edges = np.linspace(first, last + 1, min(_BARS, last - first + 1) + 1).astype(int)
    counts = np.histogram(lengths, bins=edges)[0]
    for count, low, past in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * max(int(count > 0), round(most * count / counts.max()))
        yield f"{low:>6,} – {past - 1:<6,} {bar} {count:,}"
