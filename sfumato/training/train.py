"""The training loop: TrainingRecipe in, checkpoints and a log out, continued exactly where it was cut off.

Everything random is a function of (seed, step): the batch from its source, the corruption from a generator made anew
each step. So a checkpoint needs only weights, optimiser state and the step's number. Checkpoints are safetensors.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.shards import read_tensors, write_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.model.network import Model
from sfumato.options import DTYPE_NAMES
from sfumato.system.files import replacing
from sfumato.training.data import Source
from sfumato.training.loss import Corruption, losses, problem

STATE, LOGS = "state.safetensors", ("log.jsonl", "evals.jsonl")
"""What a run's folder holds; the logs have a line for each step, and for each check of the model."""


@dataclass(frozen=True)
class TrainingRecipe:
    """The numbers of a run. The schedule warms up, holds the peak until `hold`, then follows a cosine to `floor`."""

    steps: int = 1000
    batch: int = 96
    lr: float = 2e-3
    warmup: int = 100
    hold: int = 0
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-2
    clip: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"
    """"adamw", or "muon": torch.optim.Muon for the matrices of the blocks, AdamW for everything else."""
    encode_response_every: int = 1
    """The response takes part in the encode pass (and its loss) on every n-th step; the prompt always does."""
    repeats: int = 1
    """Canvases (noise levels) per example: the example is encoded once for all of them."""
    conditioned: float = 0.5
    """Share of a batch that sees the soft embedding of a first pass."""
    leave_one_out: bool = False
    precision: str = "float32"
    """"float32", or "bfloat16": autocast, weights stay float32."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise InputError(f"optimizer is {self.optimizer!r}; choose 'adamw' or 'muon'")
        object.__setattr__(self, "precision", DTYPE_NAMES.get(self.precision, self.precision))
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision is {self.precision!r}; choose 'float32' or 'bfloat16'")
        for name in ("steps", "batch", "encode_response_every", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        start = max(self.hold, self.warmup)
        share = min(max(0.0, (step - start) / max(1, self.steps - start)), 1.0)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))


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


class Trainer:
    """A model, its optimisers and a place on disk.

    `folder` holds `state.safetensors` (weights, optimiser state, step) and `log.jsonl`; where they are there already,
    training continues from them. Two runs in one folder at one time need `files.locked`."""

    def __init__(
        self,
        model: Model,
        source: Source,
        recipe: TrainingRecipe,
        folder: Path | str,
        compile: bool = False,
        checkpoint_seconds: float = 300.0,
    ) -> None:
        self.model, self.source, self.recipe = model, source, recipe
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint_seconds = checkpoint_seconds
        self.step = 0
        named = dict(model.named_parameters())
        is_matrix = {n: p.ndim == 2 and n.startswith("layers.") and "router" not in n for n, p in named.items()}
        by_muon = {n: p for n, p in named.items() if recipe.optimizer == "muon" and is_matrix[n]}
        rest = {n: p for n, p in named.items() if n not in by_muon}
        decay = recipe.weight_decay
        groups = [
            {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, fused=True)
        ]
        if by_muon:
            self.optimizers.append(
                torch.optim.Muon(
                    list(by_muon.values()), lr=recipe.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
        self._losses: Callable[..., tuple[Tensor, Tensor]] = torch.compile(losses, dynamic=False) if compile else losses
        self._is_between_steps = True
        if (self.folder / STATE).exists():
            self._restore()
        for name in LOGS:
            _cut(self.folder / name, self.step)

    def run(self, until: float = math.inf) -> Generator[StepReport, None, None]:
        """Train up to the recipe's last step, or until `time.monotonic()` passes `until`.

        It saves on the way out, and so when it is closed."""
        saved = time.monotonic()
        try:
            while self.step < self.recipe.steps and time.monotonic() < until:
                progress = self._advance()
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(asdict(progress)) + "\n")
                if time.monotonic() - saved > self.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
                yield progress
        finally:
            if self._is_between_steps:  # else some weights have taken the step and some have not
                self.save()

    def _advance(self) -> StepReport:
        began, recipe, step = time.perf_counter(), self.recipe, self.step
        device, config = self.model.device, self.model.config
        batch = self.source.batch(step, recipe.batch, device)
        generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + step)
        canvases = recipe.batch * recipe.repeats
        corruption = Corruption.draw(canvases, config.canvas_length, config.vocab_size, generator, recipe.conditioned)
        is_whole = (step + 1) % recipe.encode_response_every == 0
        noisy = problem(batch, corruption, config.canvas_length, config.eos_ids[0], is_whole)
        rate = recipe.rate(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            diffusion_loss, encode_loss = self._losses(self.model, noisy, recipe.leave_one_out)
        (diffusion_loss + encode_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self._is_between_steps = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._is_between_steps = True
        return StepReport(
            step=self.step,
            diffusion_loss=diffusion_loss.item(),
            encode_loss=encode_loss.item(),
            rate=rate,
            grad_norm=float(norm),
            examples=self.step * recipe.batch,
            seconds=time.perf_counter() - began,
        )

    def save(self) -> None:
        """Write the whole state beside, then rename."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer.{self._names[parameter]}.{key}": value for key, value in state.items()}
        note = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))}
        write_tensors(self.folder / STATE, tensors, note)

    def _restore(self) -> None:
        path = self.folder / STATE
        tensors, note = read_tensors(path)
        own = self.model.state_dict()
        read = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        if read.keys() != own.keys() or any(read[name].shape != own[name].shape for name in own):
            raise CheckpointError(f"{path} belongs to another model; choose another folder or remove it")
        self.model.load_state_dict(read)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"optimizer.{self._names[parameter]}."
                    state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
                    if state:
                        optimizer.state[parameter] = {
                            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                        }
        self.step = _noted(path, note)[0]


def recipe_of(folder: Path | str, **changes: Any) -> TrainingRecipe:
    """The recipe that a folder was last trained with, with changes. CheckpointError where its state is none."""
    path = Path(folder) / STATE
    return replace(_noted(path, read_tensors(path)[1])[1], **changes)


def _noted(path: Path, note: dict[str, str]) -> tuple[int, TrainingRecipe]:
    """Step and recipe of a state."""
    try:
        stored = json.loads(note["recipe"])
        return int(note["step"]), TrainingRecipe(**{**stored, "betas": tuple(stored["betas"])})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the state of a run; choose another folder or remove it") from error


def _cut(path: Path, step: int) -> None:
    """Remove a log's lines of steps after the last save, which are run again, and lines that a kill has cut off.

    Of each step only the last line stays."""
    if not path.exists():
        return
    held = path.read_bytes()
    kept = {at: line for line in held.splitlines() if (at := _step_of(line)) is not None and at <= step}
    data = b"".join(line + b"\n" for line in kept.values())
    if data != held:
        with replacing(path) as file:
            file.write(data)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
