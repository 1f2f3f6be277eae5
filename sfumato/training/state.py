"""The state of a run on disk: what is trained, the optimisers' states, and a note; written beside, then renamed.

One process writes `state.safetensors`. Several write `state-STEP/`, a share each, through torch's distributed
checkpoint, as safetensors too; either goes on in any number of processes. Frozen weights are in neither.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.shards import read_tensors, write_tensors
from sfumato.errors import CheckpointError, SfumatoError
from sfumato.model.network import Model
from sfumato.training.distributed import Ranks

STATE, NOTE = "state.safetensors", "note.json"
_SHARED = re.compile(r"state-(\d{1,15})")
_PART = ".state.part"


def states_of(folder: Path) -> list[Path]:
    """Everything in the folder that is a state of a run, or was to become one."""
    names = [path for path in folder.iterdir() if _SHARED.fullmatch(path.name)] if folder.is_dir() else []
    return [path for path in (folder / STATE, folder / f".{STATE}.part", folder / _PART) if path.exists()] + names


def latest(folder: Path) -> Path | None:
    """The state to go on from: that of the later step, None where there is none."""
    steps = {
        int(match[1]): path for path in states_of(folder) if (match := _SHARED.fullmatch(path.name)) and path.is_dir()
    }
    shared = steps[max(steps)] if steps else None
    alone = folder / STATE
    if not alone.exists() or shared is None:
        return alone if alone.exists() else shared
    return shared if max(steps) > step_of(note_of(alone), alone) else alone


def note_of(path: Path) -> dict[str, str]:
    """What was noted with a state: texts by name. CheckpointError where it is none."""
    if not path.is_dir():
        return read_tensors(path)[1]
    try:
        with (path / NOTE).open("rb") as file:
            note = json.loads(file.read(1 << 22))
        if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
            raise ValueError("its values are not texts")
    except (OSError, ValueError, RecursionError) as error:
        raise no_state(path) from error
    return note


def step_of(note: Mapping[str, str], path: Path) -> int:
    """The step after which a state was written."""
    text = note.get("step", "")
    if not text.isdecimal() or len(text) > 15:
        raise no_state(path)
    return int(text)


def no_state(path: Path) -> CheckpointError:
    """What to say of a file that is not what this module writes."""
    return CheckpointError(f"{path} is not the state of a run; choose another folder or remove it")


def tensors_to_keep(model: Model) -> dict[str, Tensor]:
    """What of the model belongs to the state: all but frozen parameters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def write_state(
    folder: Path, model: Model, optimizers: list[torch.optim.Optimizer], note: Mapping[str, str], ranks: Ranks
) -> None:
    """Write the whole state. SfumatoError where the disk says no: then the one before is as it was."""
    tensors = {f"model.{name}": value for name, value in tensors_to_keep(model).items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"optimizer.{names[parameter]}.{key}"] = tensor
    if ranks.size == 1:
        write_tensors(folder / STATE, tensors, note)
        kept = folder / STATE
    else:
        kept = _write_shared(folder, tensors, note, ranks)
    if ranks.is_first:
        for old in states_of(folder):
            if old != kept:
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def _write_shared(folder: Path, tensors: dict[str, Tensor], note: Mapping[str, str], ranks: Ranks) -> Path:
    """Each process its share, beside; renamed when all are there."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    beside, target = folder / _PART, folder / f"state-{int(note['step']):09}"
    if ranks.is_first:
        shutil.rmtree(beside, ignore_errors=True)
    ranks.wait()
    trouble = ""
    try:
        writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        save(tensors, storage_writer=writer)
        if ranks.is_first:
            (beside / NOTE).write_text(json.dumps(dict(note)))
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
    except (OSError, CheckpointException) as error:
        trouble = f"cannot write {target}: {error.strerror if isinstance(error, OSError) else error.failures}"
    if ranks.agree(int(bool(trouble))):
        raise SfumatoError(trouble or f"cannot write {target}: another process could not")
    return target


def restore_(path: Path, model: Model, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put a state back where it came from. CheckpointError where it belongs to another model."""
    kept = tensors_to_keep(model)
    names = {f"model.{name}": tuple(value.shape) for name, value in kept.items()}
    tensors = _read_shared(path, model) if path.is_dir() else read_tensors(path)[0]
    read = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("model.")}
    if read != names:
        raise CheckpointError(f"{path} belongs to another model; choose another folder or remove it")
    with torch.no_grad():
        copy_(kept, {name: tensors[f"model.{name}"] for name in kept})
        parameters = dict(model.named_parameters())
        for optimizer in optimizers:
            own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in parameters.items():
                prefix = f"optimizer.{name}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if state and parameter in own:
                    optimizer.state[parameter] = {
                        key: _state_value(key, value, parameter) for key, value in state.items()
                    }


def copy_(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Fill tensors, shared among processes or not, with others of the same names."""
    for name, target in targets.items():
        target.copy_(_shared_as(values[name], target))


def _shared_as(value: Tensor, like: Any) -> Tensor:
    """A whole tensor, shared among processes where `like` is."""
    if hasattr(value, "full_tensor") or not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _state_value(key: str, value: Tensor, parameter: Tensor) -> Any:
    if value.ndim == 0:
        return int(value) if value.dtype == torch.int64 else value
    value = value if hasattr(value, "full_tensor") else value.to(parameter.device)
    return _shared_as(value, parameter) if value.shape == parameter.shape else value


def _read_shared(path: Path, model: Model) -> dict[str, Tensor]:
    """The tensors of a state that several processes wrote: those of this process's shares alone where there are any."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    parameters = dict(model.named_parameters())
    own: dict[str, Tensor] = dict(model.state_dict())
    try:
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Tensor] = {}
        for name, held in reader.read_metadata().state_dict_metadata.items():
            place, _, rest = name.partition(".")
            like = own.get(rest) if place == "model" else parameters.get(rest.rpartition(".")[0])
            size, dtype = torch.Size(held.size), held.properties.dtype  # type: ignore[union-attr]
            if like is not None and like.shape == size:
                tensors[name] = torch.zeros_like(like, dtype=dtype)
            else:
                tensors[name] = torch.zeros(size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process may read what several have written
            load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except (CheckpointException, OSError, KeyError, ValueError) as error:
        raise no_state(path) from error
    return tensors
