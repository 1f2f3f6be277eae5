"""The card of a run: what was trained on what, by which command, with which figures; for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.checkpoints.shards import as_json
from sfumato.errors import SfumatoError
from sfumato.system.files import replacing
from sfumato.training import logs
from sfumato.training.recipe import TrainingRecipe

RUN, README = "run.json", "README.md"


def figures_of(folder: Path) -> dict[str, Any]:
    """What the logs say: the first and last losses, what the looks at the model gave, and the time."""
    steps, looks = (logs.lines_of(folder / name) for name in ("log.jsonl", "evals.jsonl"))
    figures: dict[str, Any] = {}
    if steps:
        names = ("step", "diffusion_loss", "encode_loss")
        figures["first"], figures["last"] = ({name: line.get(name) for name in names} for line in (steps[0], steps[-1]))
        figures["examples"] = steps[-1].get("examples")
        figures["seconds"] = round(sum(line.get("seconds", 0.0) for line in steps), 1)
    if looks:
        figures["looks"] = {"first": looks[0], "last": looks[-1]}
        held = [line for line in looks if isinstance(line.get("held_out_loss"), float)]
        if held:
            figures["looks"]["best"] = min(held, key=lambda line: float(line["held_out_loss"]))
    return figures


def card_of(
    identity: Mapping[str, Any], recipe: TrainingRecipe, environment: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The card as plain data."""
    return {**more, **identity, "recipe": asdict(recipe), "environment": dict(environment)}


def as_page(card: Mapping[str, Any]) -> str:
    """The card as a page."""
    model, figures = card["model"]["name"], card.get("figures", {})
    kind = "A low-rank adapter for" if card.get("lora") else "Weights trained from"
    written = f"Written after step {card.get('written_step', 0)} of a run of Sfumato ({card.get('status', 'running')})."
    lines = [
        *(
            "---",
            f"base_model: {json.dumps(model)}",
            f"library_name: {'peft' if card.get('lora') else 'sfumato'}",
            "---",
        ),
        *("", f"# {kind} {model}", "", f"{written} `{RUN}` has all of this as data.", ""),
        *("```", str(_command(card)), "```", ""),
    ]
    if card.get("lora"):
        lora = card["lora"]
        scaling = ", rsLoRA" if lora["is_rs"] else ""
        lines += [f"Rank {lora['rank']}, alpha {lora['alpha']:g}{scaling}, on {', '.join(lora['targets'])}.", ""]
    lines += ["## Data", "", "```json", json.dumps(card.get("data"), indent=1), "```", "", "## Figures", ""]
    lines += ["| | step | denoise, nats a token | encode, nats a token |", "| --- | ---: | ---: | ---: |"]
    rows = {"first step": figures.get("first"), "last step": figures.get("last")}
    rows |= {f"held out, {name}": line for name, line in figures.get("looks", {}).items()}
    for name, line in rows.items():
        if line and isinstance(line.get("diffusion_loss"), float):
            lines.append(f"| {name} | {line['step']} | {line['diffusion_loss']:.4f} | {line['encode_loss']:.4f} |")
    last = figures.get("looks", {}).get("last", {})
    rates = {name: value for name, value in last.items() if name.endswith("_rate")}
    lines += ["", *(f"{name.removesuffix('_rate')}: {value:.1%} right." for name, value in rates.items())]
    lines += ["", "## Recipe", "", "```json", json.dumps(card["recipe"], indent=1), "```", ""]
    lines += ["## Where", "", "```json", json.dumps(card["environment"], indent=1), "```", ""]
    return "\n".join(lines)


def _command(card: Mapping[str, Any]) -> object:
    return card["environment"].get("command", "")


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write run.json and README.md, each whole or not at all. SfumatoError where the disk says no."""
    try:
        for name, text in ((RUN, as_json(card)), (README, as_page(card))):
            with replacing(folder / name) as file:
                file.write(text.encode())
    except OSError as error:
        raise SfumatoError(f"cannot write the card in {folder}: {error.strerror or error}") from error
