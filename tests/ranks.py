"""Runs of training on the tiny model, in one process or as one of several: `python tests/ranks.py FOLDER STEPS`.

As a script it is one rank of those that the variables of torch.distributed describe, and carries out `runs_of`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model

from sfumato.model.adapters import TARGETS, new_adapter
from sfumato.model.network import Model, products, replace_
from sfumato.model.trainable import trainable_
from sfumato.quant.formats import pack
from sfumato.training.distributed import ALONE, Ranks
from sfumato.training.loss import Examples
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.train import StepReport, Trainer, TrainerSetting


class RaggedSource:
    """Random examples of several lengths."""

    def batch(self, step: int, size: int, device: torch.device) -> Examples:
        """See `Source.batch`."""
        draws = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(6, 61, (size, 24), generator=draws)
        counts = torch.randint(12, 25, (size,), generator=draws).tolist()
        for row, count in enumerate(counts):
            tokens[row, count:] = 0
        prompts = [count - 9 if row % 2 else 4 for row, count in enumerate(counts)]
        return Examples(tokens.to(device), counts, prompts, [row == 0 for row in range(size)])

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"data": "random"}


def model_of(kind: str) -> Model:
    """The tiny model with all weights trainable ("full", "later"), or factors beside plain or packed ones ("lora",
    "packed")."""
    model = tiny_model(name="fused")
    if kind in ("full", "later"):
        return model.requires_grad_(True)
    if kind == "packed":
        for owner, leaf in list(products(model)):
            replace_(owner, leaf, pack(getattr(owner, leaf).detach(), "int8"))
    return trainable_(model, new_adapter(model, 4, 8.0, tuple(TARGETS), seed=1))


def recipe_of(kind: str, steps: int) -> TrainingRecipe:
    """Six examples a step, in ragged parts."""
    repeats = 2 if kind == "lora" else 1
    # At twice this rate a token of the random model is a rounding away from other experts at step 12: the losses part.
    plain = TrainingRecipe(steps=steps, batch=6, lr=5e-4, warmup=5, encode_response_every=2, repeats=repeats)
    return replace(plain, revision_penalty=1.0, self_distillation=0.5) if kind == "later" else plain


@dataclass(frozen=True)
class RunPart:
    """A run of so many steps from where its folder stands, or the half of it."""

    kind: str
    name: str
    steps: int
    is_half: bool = False


def runs_of(steps: int) -> list[RunPart]:
    """What the script does; in "one-then-two" a single process has been before."""
    return [
        RunPart("lora", "lora", steps),
        RunPart("full", "full", steps),
        RunPart("packed", "packed", 4),
        RunPart("later", "later", 3),
        RunPart("lora", "lora-one-then-two", steps),
        RunPart("full", "full-two-then-one", steps, is_half=True),
    ]


def carry_out(part: RunPart, folder: Path, ranks: Ranks = ALONE) -> list[StepReport]:
    """Train; the steps that were taken."""
    model = ranks.shard_(model_of(part.kind))
    setting = TrainerSetting(held_out=RaggedSource(), held_out_batches=1, every=20, ranks=ranks)
    trainer = Trainer(model, RaggedSource(), recipe_of(part.kind, part.steps), folder / part.name, setting)
    reports = []
    for report in trainer.run():
        reports.append(report)
        if part.is_half and report.step == part.steps // 2:
            break
    return reports


def main() -> None:
    """One rank's part of all runs."""
    torch.set_num_threads(1)
    ranks, _ = Ranks.join("cpu")
    for part in runs_of(int(sys.argv[2])):
        carry_out(part, Path(sys.argv[1]), ranks)
    ranks.leave()


if __name__ == "__main__":
    main()
