"""A whole run: a `RunSpec` in, and in its folder a state, logs, a picture, a card, and the adapter or the checkpoint.

Under torchrun every process carries it out, and the first one alone writes and says anything.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch

from sfumato.checkpoints.adapters import write_adapter
from sfumato.checkpoints.save import save
from sfumato.errors import InputError
from sfumato.evals import tasks as evals
from sfumato.llm import LLM
from sfumato.measure.machine import environment
from sfumato.model.adapters import Adapter
from sfumato.model.config import read_generation_config
from sfumato.model.network import Model
from sfumato.model.trainable import trained
from sfumato.options import Options
from sfumato.system.files import replacing
from sfumato.tasks import task as tasks
from sfumato.training import card, logs, samples, setup
from sfumato.training.distributed import Ranks, full
from sfumato.training.plot import plot
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.spec import RunSpec
from sfumato.training.state import latest, states_of
from sfumato.training.train import BEST, StepReport, Trainer, TrainerSetting

ADAPTER, CHECKPOINT = "adapter", "checkpoint"
PICTURE, SAMPLES = "loss.png", "samples.md"
OURS = (*logs.LOGS, BEST, PICTURE, SAMPLES, card.RUN, card.README)
"""Files of a run, besides its states; and the last folder is written as a whole."""


class Display(Protocol):
    """Who watches a run."""

    def note(self, sentence: str) -> None:
        """Something that happens once."""
        ...

    def follow(self, steps: Iterable[StepReport], total: int) -> Generator[StepReport, None, None]:
        """The same steps, shown as they come."""
        ...

    def look(self, line: Mapping[str, Any], texts: list[samples.Sample]) -> None:
        """What a look at the model gave."""
        ...

    def count(self, done: int, total: int) -> None:
        """Progress before the first step."""
        ...

    def read(self, done: int, total: int) -> None:
        """Bytes of the files that are read so far, and all of them."""
        ...


class Silent:
    """Shows nothing."""

    def note(self, sentence: str) -> None:
        """See `Display.note`."""

    def follow(self, steps: Iterable[StepReport], total: int) -> Generator[StepReport, None, None]:
        """See `Display.follow`."""
        yield from steps

    def look(self, line: Mapping[str, Any], texts: list[samples.Sample]) -> None:
        """See `Display.look`."""

    def count(self, done: int, total: int) -> None:
        """See `Display.count`."""

    def read(self, done: int, total: int) -> None:
        """See `Display.read`."""


def prepare_folder(folder: Path, force: bool) -> None:
    """Make the run's folder, empty or as a run has left it; InputError where it holds other files."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and a run has a folder; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    if force:
        for path in [*states_of(folder), *(folder / name for name in OURS)]:
            _remove(path)
        return
    ours = {*OURS, *(f".{name}.part" for name in OURS), *(path.name for path in states_of(folder))}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if latest(folder) is None and others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"{folder} holds {others[0]}{more} and no run to go on with; give another folder, or --force to train there"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def carry_out(spec: RunSpec, display: Display, is_stopped: Callable[[], bool], ranks: Ranks, device: str) -> None:
    """Train from where the run stands until its last step, its time or a stop, and write what came of it."""
    run = _TrainingRun(spec, display if ranks.is_first else Silent(), ranks, device)
    if run.train(is_stopped):
        run.finish(is_stopped())


class _TrainingRun:
    """The parts of a run, put together."""

    def __init__(self, spec: RunSpec, display: Display, ranks: Ranks, device: str) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self.spec, self.display, self.ranks = spec, display, ranks
        self.base = setup.base_of(spec.model)
        recipe = setup.new_recipe(spec, self.base)
        with ranks.in_turn():  # the first one keeps what it has read of files
            self.sources = setup.sources_of(spec, self.base, recipe, display.count, display.read)
        self.recipe: TrainingRecipe = setup.with_steps(recipe, spec, self.sources.examples)
        self.model: Model = ranks.shard_(setup.model_of(spec, self.base, self.recipe, device))
        self.identity = setup.identity_of(spec, self.base, self.sources)
        held_out = self.sources.held_out
        self.prompts = (
            samples.prompts_of(held_out, self.base.tokenizer, spec.looks.samples) if held_out is not None else []
        )
        self.texts: list[samples.Sample] = []
        setting = TrainerSetting(
            compile=spec.compile,
            held_out=held_out,
            every=spec.every(self.recipe.steps),
            patience=spec.looks.patience,
            checks=(self._check,),
            show=self._show,
            identity=self.identity,
            ranks=ranks,
        )
        self.trainer = Trainer(self.model, self.sources.train, self.recipe, spec.folder, setting)

    def train(self, is_stopped: Callable[[], bool]) -> bool:
        """Take the steps that are left; False where they were ended at once."""
        trainer, display = self.trainer, self.display
        if trainer.step:
            display.note(f"going on from step {trainer.step} of {self.recipe.steps}")
        until = time.monotonic() + 60 * self.spec.minutes if self.spec.minutes else math.inf
        if self.ranks.agree(int(is_stopped())):
            until = 0.0
        self._write_card("running", trainer.step)
        try:
            # The run saves as it ends.
            with closing(trainer.run(until)) as steps, closing(display.follow(steps, self.recipe.steps)) as shown:
                for _ in shown:
                    if self.ranks.agree(int(is_stopped())):
                        break
        except KeyboardInterrupt:  # the second one
            display.note("ended at once; the same command goes on from what was saved")
            return False
        return True

    def finish(self, is_cut: bool) -> None:
        """Write what the run is for, the best of it where that was measured, and its picture and card."""
        trainer, folder, display = self.trainer, self.spec.folder, self.display
        status = "finished"
        if is_cut:
            status = "cut off"
            display.note("saved; the same command goes on from here")
        elif trainer.is_stopped_early:
            status = "stopped early"
            worse = trainer.standing.worse
            display.note(
                f"stopped early: the held-out loss was lowest at step {trainer.standing.best_step}, {worse} looks ago"
            )
        step = trainer.take_best_()
        result = self._gathered()
        target = folder / (CHECKPOINT if self.spec.lora is None else ADAPTER)
        if self.ranks.is_first:
            picture = plot(folder)
            with replacing(folder / SAMPLES) as file:
                file.write(samples.as_markdown(logs.lines_of(folder / "samples.jsonl")).encode())
            self._write_card(status, step)
            self._write_result(target, result)
            what = "adapter" if self.spec.lora is not None else "model"
            display.note(f"{target} holds the {what} after step {step}; {picture}")
        self.ranks.wait()

    def _gathered(self) -> Model | Adapter:
        """What was trained, whole in the first process alone; all must ask."""
        if self.spec.lora is not None:
            return trained(self.model, full)
        if self.ranks.size == 1:
            return self.model
        tensors: dict[str, torch.Tensor] = {}
        for name, shared in self.model.state_dict().items():
            tensor = full(shared)
            if self.ranks.is_first:
                tensors[name] = tensor.detach().cpu()
        with torch.device("meta"):
            plain = Model(self.model.config, self.model.ops)
        if self.ranks.is_first:
            plain.load_state_dict(tensors, assign=True)
        return plain

    def _write_result(self, target: Path, result: Model | Adapter) -> None:
        if isinstance(result, Model):
            save(result, target, tokenizer_from=self.base.folder)
            return
        files = {name: self.spec.folder / name for name in (card.RUN, card.README)}
        write_adapter(result, target, self.model, base=self.spec.model, extra=files)

    def _write_card(self, status: str, step: int) -> None:
        if self.ranks.is_first:
            more = {"status": status, "written_step": step, "processes": self.ranks.size}
            figures = card.figures_of(self.spec.folder)
            own = card.card_of(self.identity, self.recipe, environment(self.model.device), **more, figures=figures)
            card.write_card(self.spec.folder, own)

    def _check(self, step: int) -> dict[str, Any]:
        """The tasks' rates on held-out items, and samples. Every process asks the same."""
        line: dict[str, Any] = {}
        if self.sources.items or self.prompts:
            defaults = read_generation_config(self.base.folder)[0]
            llm = LLM(self.model, self.base.tokenizer, self.base.template, defaults, str(self.spec.folder))
            for name, items in self.sources.items.items():
                results = list(evals.answers(llm, tasks.named(name), items, Options(seed=0)))
                line[f"{name}_rate"] = evals.rate(results)
                line[f"{name}_steps"] = sum(result.steps for result in results) / len(results)
            if self.prompts:
                self.texts = samples.write_samples(llm, self.prompts, step)
                if self.ranks.is_first:
                    samples.log_samples(self.spec.folder, self.texts)
        return line

    def _show(self, line: Mapping[str, Any]) -> None:
        self.display.look(line, self.texts)
