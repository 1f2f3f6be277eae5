"""The training loop: TrainingRecipe in, a state and logs out, continued exactly where it was cut off.

Everything random is a function of (seed, step): the batch from its source, the corruption from a generator made anew
each step. So a state needs only what is trained, the optimisers' states and the step's number, with what the checks of
the model have said so far. What a step does not depend on is in how many parts its batch is computed, one after the
other (`accumulate`) or in several processes (`Ranks`). Here is nothing of tasks, texts or the command line.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.checkpoints.shards import read_tensors, write_tensors
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.network import Model
from sfumato.training import logs
from sfumato.training.data import Source
from sfumato.training.distributed import ALONE, Ranks, full
from sfumato.training.loss import Corruption, LossSums, Problem, loss_sums, problem
from sfumato.training.objective import Objective
from sfumato.training.optimizers import optimizers_of
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.state import (
    STATE,
    copy_,
    latest,
    no_state,
    note_of,
    restore_,
    step_of,
    tensors_to_keep,
    write_state,
)

BEST = "best.safetensors"
"""What is trained, as it was at the lowest held-out loss."""

PLAIN_ATTENTION = 512
"""On a CPU in bfloat16 the scores of so many tokens are computed whole: torch's flash kernel takes 29 % of a step of
nano-skills there, and the step as a whole 10 % longer (docs/LOG.md)."""


@dataclass(frozen=True)
class StepReport:
    """What a step tells: losses in nats a token, examples seen so far, seconds it took."""

    step: int
    diffusion_loss: float
    encode_loss: float
    rate: float
    grad_norm: float
    examples: int
    seconds: float
    revision_loss: float | None = None
    """Unweighted, as the next; None where the objective lacks it."""
    distillation_loss: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """The mean losses, nats a token, on examples that are not trained on."""

    step: int
    diffusion_loss: float
    encode_loss: float

    @property
    def loss(self) -> float:
        """What decides which step is best: the loss of denoise, which writes answers.

        That of encode says above all how predictable the prompts are, and may rise while answers get better."""
        return self.diffusion_loss


@dataclass
class HeldOutStanding:
    """What the held-out losses have said so far: part of the state."""

    best: float = math.inf
    best_step: int = 0
    worse: int = 0
    """Measurements since the best one."""

    def add(self, step: int, loss: float) -> bool:
        """Whether this loss is the lowest yet."""
        if loss < self.best:
            self.best, self.best_step, self.worse = loss, step, 0
            return True
        self.worse += 1
        return False


ModelCheck = Callable[[int], Mapping[str, Any]]
"""Looks at the model after this step, between steps; gives what evals.jsonl is to say of it."""


@dataclass(frozen=True)
class TrainerSetting:
    """How a run is carried out, which changes none of its steps but where it ends."""

    compile: bool = False
    checkpoint_seconds: float = 300.0
    """Between saves of the state."""
    held_out: Source | None = None
    held_out_batches: int = 4
    """Of the recipe's size, so many are looked at, always the same."""
    every: int = 0
    """Steps between looks at the model: held-out losses, and `checks`; the last step has one too. 0: none."""
    patience: int = 0
    """The run ends after so many looks without a lower held-out loss. 0: never."""
    checks: tuple[ModelCheck, ...] = ()
    show: Callable[[Mapping[str, Any]], None] | None = None
    """Called with each line of evals.jsonl."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the run is besides its recipe: model, data, what is trained. A run goes on with the same alone."""
    ranks: Ranks = ALONE


class Trainer:
    """A model, its optimisers and a place on disk.

    Parameters that require gradients are trained. `folder` holds the state (`training.state`) and `log.jsonl`; where
    they are there already, training continues from them. Two runs in one folder at one time need `files.locked`."""

    def __init__(
        self,
        model: Model,
        source: Source,
        recipe: TrainingRecipe,
        folder: Path | str,
        setting: TrainerSetting | None = None,
    ) -> None:
        self.model, self.source, self.recipe = model, source, recipe
        self.setting = setting or TrainerSetting()
        self.ranks = self.setting.ranks
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.standing = 0, HeldOutStanding()
        self._parts = recipe.accumulate * self.ranks.size
        if recipe.batch % self._parts:
            raise InputError(
                f"batch is {recipe.batch}, which {self.ranks.size} processes of {recipe.accumulate} parts each do not "
                f"divide; give a multiple of {self._parts}"
            )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError("no weight of this model is trained; attach an adapter, or train all of them")
        if self.ranks.size > 1 and recipe.optimizer != "adamw":
            raise InputError(f"optimizer {recipe.optimizer!r} is of one process; choose 'adamw' for several")
        if self.ranks.size > 1 and recipe.short_canvases:
            raise InputError(
                f"short_canvases is {recipe.short_canvases}, and only one process can group a batch by its canvases; "
                "leave it out for several"
            )
        self.optimizers = optimizers_of(trained, recipe)
        self._trained = list(trained.values())
        self._losses: Callable[..., LossSums] = (
            torch.compile(loss_sums, dynamic=False) if self.setting.compile else loss_sums
        )
        self._is_between_steps = True
        if (state := latest(self.folder)) is not None:
            self._restore(state)
        self.ranks.wait()
        if self.ranks.is_first:
            for name in logs.LOGS:
                logs.cut(self.folder / name, self.step)

    @property
    def is_stopped_early(self) -> bool:
        """Whether the held-out loss has not fallen for too long."""
        return 0 < self.setting.patience <= self.standing.worse

    def run(self, until: float = math.inf) -> Generator[StepReport, None, None]:
        """Train up to the recipe's last step, or until `time.monotonic()` passes `until`, or it is stopped early.

        It saves on the way out, and so when it is closed. SfumatoError where the disk says no: the state before stays.
        """
        saved = time.monotonic()
        is_failed = False
        try:
            while self.step < self.recipe.steps and not self.is_stopped_early and not self._is_over(until):
                progress = self._advance()
                self._log("log.jsonl", _line_of(progress))
                self._look()
                self._is_between_steps = True
                if self.ranks.agree(int(time.monotonic() - saved > self.setting.checkpoint_seconds)):
                    self.save()
                    saved = time.monotonic()
                yield progress
        except Exception:
            is_failed = True
            raise
        finally:
            if self._is_between_steps and not is_failed:  # else some weights have taken the step and some have not
                self.save()

    def _is_over(self, until: float) -> bool:
        return until < math.inf and bool(self.ranks.agree(int(time.monotonic() >= until)))

    def _advance(self) -> StepReport:
        began, recipe = time.perf_counter(), self.recipe
        batch, corruption, is_whole = self._drawn(self.source, self.step)
        rate = recipe.rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        parts, counts = self._split(batch, corruption, is_whole)
        means = torch.zeros(4, dtype=torch.float64, device=self.model.device)
        for part in parts:
            with self._attention(part):  # the backward pass too, in which checkpointed blocks run again
                sums = self._sums(part, recipe.objective)
                (sums.denoise / counts[0] + sums.encode / counts[1]).backward()
            means += _mean_shares(sums, counts)
        diffusion_loss, encode_loss, revision_loss, distillation_loss = self.ranks.total(means).tolist()
        norm = full(torch.nn.utils.clip_grad_norm_(self._trained, recipe.clip))
        if not math.isfinite(diffusion_loss + encode_loss + revision_loss + distillation_loss + float(norm)):
            raise SfumatoError(
                f"the loss of step {self.step + 1} is {diffusion_loss + encode_loss:g} and the norm of its gradients "
                f"{float(norm):g}, so it was not taken, and what was saved before is as it was; begin anew with "
                "--force and a lower rate, such as -s lr=5e-5, or in float32"
            )
        self._is_between_steps = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepReport(
            step=self.step,
            diffusion_loss=diffusion_loss,
            encode_loss=encode_loss,
            rate=rate,
            grad_norm=float(norm),
            examples=self.step * recipe.batch,
            seconds=time.perf_counter() - began,
            revision_loss=revision_loss if recipe.revision_penalty else None,
            distillation_loss=distillation_loss if recipe.self_distillation else None,
        )

    def _drawn(self, source: Source, step: int) -> Any:
        """The whole batch of a step, its random numbers, and whether the response is encoded."""
        recipe, config, device = self.recipe, self.model.config, self.model.device
        batch = source.batch(step, recipe.batch, device)
        generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + step)
        canvases = recipe.batch * recipe.repeats
        sizes = canvases, config.canvas_length, config.vocab_size
        corruption = Corruption.draw(*sizes, generator, recipe.conditioned, recipe.later_steps)
        return batch, corruption, (step + 1) % recipe.encode_response_every == 0

    def _split(self, batch: Any, corruption: Corruption, is_whole: bool) -> tuple[list[Problem], tuple[int, int]]:
        """This process's parts of a batch, and the targets of the whole one, of denoise and of encode."""
        config, eos = self.model.config, self.model.config.eos_ids[0]

        def noised(rank: int, ranks: int) -> list[Problem]:
            part, own = batch.part(rank, ranks), corruption.part(rank, ranks)
            size = len(part.counts)
            return [
                problem(
                    part.of(rows),
                    own.of([k * size + row for k in range(self.recipe.repeats) for row in rows], length),
                    length,
                    eos,
                    is_whole,
                )
                for length, rows in part.by_canvas(config.canvas_length).items()
            ]

        whole = noised(0, 1)
        count = self._parts
        first = self.ranks.rank * self.recipe.accumulate
        parts = (
            whole if count == 1 else [one for n in range(self.recipe.accumulate) for one in noised(first + n, count)]
        )
        targets = sum(one.diffusion_count for one in whole), sum(one.encode_count for one in whole)
        return parts, (max(1, targets[0]), max(1, targets[1]))

    def _sums(self, part: Problem, objective: Objective) -> LossSums:
        is_half = self.recipe.precision == "bfloat16"
        # Without its cache: that would hold a copy of every weight until all passes are over, sharded or not.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
            return self._losses(self.model, part, objective)

    def _attention(self, part: Problem) -> AbstractContextManager[None]:
        """How attention is computed in this part: see `PLAIN_ATTENTION`."""
        is_half, is_short = self.recipe.precision == "bfloat16", part.tokens_BT.shape[1] <= PLAIN_ATTENTION
        is_plain = is_half and is_short and self.model.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if is_plain else nullcontext()

    # ---- looks at the model -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """The held-out losses and the checks, where this step is one for it."""
        every = self.setting.every
        if not every or (self.step % every and self.step < self.recipe.steps):
            return
        lines: dict[str, Any] = {}
        if self.setting.held_out is not None:
            held = self.measure(self.setting.held_out)
            if self.standing.add(self.step, held.loss):
                self._keep_best()
            lines |= {"diffusion_loss": held.diffusion_loss, "encode_loss": held.encode_loss}
            lines |= {"held_out_loss": held.loss, "best_step": self.standing.best_step}
        for check in self.setting.checks:
            lines |= check(self.step)
        if lines:
            line = {"step": self.step, **lines}
            self._log("evals.jsonl", line)
            if self.setting.show is not None:
                self.setting.show(line)

    @torch.no_grad()
    def measure(self, source: Source) -> HeldOut:
        """L_diff and L_enc alone on the first batches of a source, with the same noise each time."""
        means = torch.zeros(4, dtype=torch.float64, device=self.model.device)
        batches, plain = self.setting.held_out_batches, Objective(self.recipe.leave_one_out)
        for number in range(batches):
            batch, corruption, _ = self._drawn(source, number)
            parts, counts = self._split(batch, corruption, True)
            for part in parts:
                means += _mean_shares(self._sums(part, plain), counts) / batches
        diffusion, encode, *_ = self.ranks.total(means).tolist()
        return HeldOut(self.step, diffusion, encode)

    def _keep_best(self) -> None:
        tensors = {name: full(value) for name, value in tensors_to_keep(self.model).items()}
        if self.ranks.is_first:
            write_tensors(self.folder / BEST, tensors, {"step": str(self.step)})

    @torch.no_grad()
    def take_best_(self) -> int:
        """Put the best weights in the place of the last ones, for what is written at the end; the step they are of."""
        path = self.folder / BEST
        if not self.standing.best_step or not path.exists():
            return self.step
        tensors, note = read_tensors(path)
        kept = tensors_to_keep(self.model)
        step = step_of(note, path)
        if tensors.keys() != kept.keys():
            raise CheckpointError(f"{path} belongs to another model; remove it")
        self.ranks.release_(self.model)
        copy_(kept, tensors)
        return step

    # ---- the state --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the whole state beside, then rename."""
        note = {
            "step": str(self.step),
            "recipe": json.dumps(asdict(self.recipe)),
            "standing": json.dumps(asdict(self.standing)),
            "identity": json.dumps(self.setting.identity),
        }
        write_state(self.folder, self.model, self.optimizers, note, self.ranks)

    def _restore(self, path: Path) -> None:
        note = note_of(path)
        step, recipe = step_of(note, path), _recipe_of(path, note)
        self.recipe.check_same(recipe)
        check_identity(self.setting.identity, _json(path, note.get("identity", "{}")))
        restore_(path, self.model, self.optimizers)
        try:
            self.standing = HeldOutStanding(**_json(path, note.get("standing", "{}")))
        except TypeError as error:
            raise no_state(path) from error
        self.step = step

    def _log(self, name: str, line: Mapping[str, Any]) -> None:
        if self.ranks.is_first:
            logs.append(self.folder / name, line)


def _mean_shares(sums: LossSums, counts: tuple[int, int]) -> Tensor:
    """What a part contributes to the means over the whole batch: of L_diff, L_enc, and what is added to L_diff."""
    denoise, encode = counts
    shares = sums.diffusion / denoise, sums.encode / encode, sums.revision / denoise, sums.distillation / denoise
    return torch.stack(shares).detach()


def _line_of(report: StepReport) -> dict[str, Any]:
    """A step as a line of the log: what the objective lacks is left out."""
    return {name: value for name, value in asdict(report).items() if value is not None}


def recipe_of(folder: Path | str, **changes: Any) -> TrainingRecipe:
    """The recipe that a folder was last trained with, with changes. CheckpointError where its state is none."""
    path = latest(Path(folder)) or Path(folder) / STATE
    note = note_of(path)
    step_of(note, path)
    return replace(_recipe_of(path, note), **changes)


def check_identity(identity: Mapping[str, Any], before: object) -> None:
    """InputError where a run is to go on that was another one: with another model, other data, other factors."""
    if not isinstance(before, dict):
        return
    for name, value in identity.items():
        for place, old, new in _differences(name, before.get(name, value), value):
            raise InputError(
                f"{place} is {_short(new)} and this run began with {_short(old)}; give the same again to go on, or "
                "--force to begin anew"
            )


def _differences(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of JSON differ: the name of the place, and what stands there in both."""
    old, new = (json.loads(json.dumps(one)) for one in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            yield from _differences(f"{place}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield place, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _recipe_of(path: Path, note: Mapping[str, str]) -> TrainingRecipe:
    stored = _json(path, note.get("recipe", ""))
    try:
        return TrainingRecipe(**stored)
    except (TypeError, ValueError, InputError) as error:
        raise no_state(path) from error


def _json(path: Path, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise no_state(path) from error
    if not isinstance(value, dict):
        raise no_state(path)
    return value
