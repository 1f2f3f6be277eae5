"""safetensors ↔ Model: one name table, streamed tensor by tensor, checked before a byte is believed; never pickle.

Loading builds the Model on the meta device, holds every file's header against it, and only then reads: one tensor at a
time, straight from the file into its place. So a checkpoint is refused before it costs memory, and the peak is the
finished model plus one tensor. Files are read, not mapped: a mapped file changes under the model when it is replaced.
It lacks quantised tensors (`quant`) and foreign formats (`interop`) on purpose.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.config import ModelConfig, read_generation_config, read_json
from sfumato.events import CapacityError, CheckpointError, InputError, SfumatoError
from sfumato.model import Model
from sfumato.ops import Ops
from sfumato.ops import load as load_ops

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
NANO = Path(__file__).parent / "nano"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""What weights may be stored as; the names are safetensors'."""

# ---- names ----------------------------------------------------------------------------------------------------------

_NAMES = (  # ours, released; {} stands for the same in both, and the first line that fits counts
    ("{}.encode_scalar", "model.encoder.language_model.{}.layer_scalar"),
    ("{}.denoise_scalar", "model.decoder.{}.layer_scalar"),
    ("{}", "model.decoder.{}"),
)
_DECODER, _ENCODER = "model.decoder.", "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def released_name(own: str) -> str:
    """The released checkpoint's name of a tensor of `Model.state_dict()`."""
    return _translate(own, 0) or own


def own_name(released: str) -> str | None:
    """The other way; None for a name that belongs to no tensor of ours."""
    own = _translate(released, 1)
    return own if own and released_name(own) == released else None


def _repeated(released: str) -> str | None:
    """Ours, of which this is a tied copy: lm_head, or the encoder's side of what it shares with the decoder."""
    if released == "lm_head.weight":
        return "embed_tokens.weight"
    shared = released.removeprefix(_ENCODER)
    return None if shared == released or "self_conditioning." in shared else own_name(_DECODER + shared)


def _translate(name: str, column: int) -> str | None:
    for line in _NAMES:
        before, after = line[column].split("{}")
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            return line[1 - column].replace("{}", name[len(before) : len(name) - len(after)])
    return None


# ---- where a checkpoint is ------------------------------------------------------------------------------------------


def resolve(path: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: "nano" (the embedded model), a folder, or a hub id ("owner/name").

    A hub id is downloaded, or taken from the offline cache; without `weights` only its configuration, tokenizer and
    chat template. `Path("nano")` or "./nano" is a folder of that name. CheckpointError when there is no such thing."""
    if path == "nano":
        return NANO
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
    if isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path, re.ASCII):
        return _from_hub(path, ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])])
    raise CheckpointError(
        f"there is no folder {_short(path)}; give a checkpoint folder, a hub id like owner/name, or nano"
    )


def _from_hub(name: str, patterns: list[str]) -> Path:
    import huggingface_hub  # here: it takes a while to import, and local checkpoints do without

    try:
        # The hub's own rules: when the net is down or HF_HUB_OFFLINE is set, what the cache holds is taken.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # of many families: the hub's, its HTTP library's, the disk's
        kind = type(error).__name__
        known = {
            "RepositoryNotFoundError": "the hub has no such model, or it is private and needs `hf auth login`",
            "GatedRepoError": "its licence must be accepted on the hub first, then `hf auth login`",
            "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be reached",
            "IncompleteSnapshotError": "the cache holds only a part of it and the hub cannot be reached",
        }
        reason = known.get(kind, _short(f"{kind}: {error}"))
        raise CheckpointError(f"cannot get {name} from the hub: {reason}") from error


# ---- files ----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file: beside it first, then renamed, so that a reader never sees half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()}, beside, {"format": "pt", **(metadata or {})}
        )
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # safetensors writes files that only their owner can read
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; CheckpointError names a file that is none."""
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file; `dtype` is safetensors' name, `start` counts from the file's first byte."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, on the CPU, as it is stored. CheckpointError when the file has changed or cannot be read."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while left.nbytes:
                    count = file.readinto(left)
                    if not count:
                        raise CheckpointError(f"{self.file} ends inside {self.name}")
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read {self.name} from {self.file}: {error.strerror or error}") from error
        return tensor


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its released name, from the headers alone.

    model.safetensors comes before an index, as in transformers. CheckpointError names a missing, truncated or damaged
    file, a tensor in two files, one that the index promises."""
    found: dict[str, Stored] = {}
    weight_map = {} if (folder / SINGLE).is_file() else _weight_map(folder)
    for shard in sorted(set(weight_map.values())) or [SINGLE]:
        for stored in _header(folder / shard):
            if stored.name in found:
                raise CheckpointError(f"{stored.name} is both in {found[stored.name].file} and in {stored.file.name}")
            found[stored.name] = stored
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(f"{folder / INDEX} says that {_short(name)} is in {shard}, where it is not")
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are never read")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}", shard, re.ASCII):
            raise CheckpointError(f"{path} puts {_short(name)} in {_short(shard)}, which is no plain file name")
    return weight_map


def _header(path: Path) -> Iterator[Stored]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(str(path), "pt"):  # the library's own check: sizes, offsets, nothing missing, nothing left over
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(size))
        for name, entry in table.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                yield Stored(name, path, str(entry["dtype"]), tuple(entry["shape"]), 8 + size + first, last - first)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_short(error)}") from error


# ---- load -----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "fused",
    notice: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    quantize: str | None = None,
) -> Model:
    """The Model of a checkpoint: whatever `resolve` understands. `dtype` None keeps the checkpoint's own.

    `ops` names operations (`ops.load`) or brings them. Weights are packed where these want that ("cpu", and so "auto"):
    such a model runs, but is neither saved nor trained. `quantize` packs to fewer bits: "int8" (cpu,
    triton), "fp8" or "int4" (triton).

    `notice` hears, in one sentence a kind, of tensors that are known and left aside; `progress(done, all)` counts
    bytes. CheckpointError names the tensor or file that is wrong, before any tensor is read; InputError names an
    argument, CapacityError a full device."""
    place, wanted = _device(device), _dtype(dtype)
    folder = resolve(path)
    config = _config(folder)
    try:
        model = _blank(config, load_ops("reference"))
    except RuntimeError as error:  # sizes whose product has no place in 64 bits
        raise CheckpointError(f"{folder / 'config.json'} describes a model that is too large to exist") from error
    stored = _matched(model, stored_tensors(folder), folder, notice or (lambda sentence: None))
    wanted = wanted or DTYPES[stored["embed_tokens.weight"].dtype]
    model.use_(load_ops(ops, place, wanted, quantize) if isinstance(ops, str) else ops)
    if quantize:  # refused now, if at all
        model.ops.pack(torch.zeros(256, 256, device=place, dtype=wanted), quantize)
    done, total = 0, sum(entry.nbytes for entry in stored.values())
    for name, entry in stored.items():
        try:
            _place(model, name, entry.read().to(place).to(wanted))
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{place} is full after {done >> 20} of {total >> 20} MiB of weights; a smaller dtype or another "
                "device may do"
            ) from error
        done += entry.nbytes
        if progress:
            progress(done, total)
    return model.pack_(quantize or "")


def _config(folder: Path) -> ModelConfig:
    """config.json, with the ids that end an answer from generation_config.json where that names any."""
    config = ModelConfig.from_file(folder / "config.json")
    _, eos_ids = read_generation_config(folder)
    if eos_ids is None:
        return config
    if max(eos_ids) >= config.vocab_size:
        raise CheckpointError(
            f"{folder / GENERATION}: eos_token_id {max(eos_ids)} is not among the {config.vocab_size} tokens"
        )
    return replace(config, eos_ids=eos_ids)


def _matched(
    model: Model, found: Mapping[str, Stored], folder: Path, notice: Callable[[str], None]
) -> dict[str, Stored]:
    """Ours -> stored, for all tensors of the model; every other stored tensor is accounted for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    matched: dict[str, Stored] = {}
    vision = copies = 0
    for released, stored in found.items():
        if released.startswith(_VISION):
            vision += 1
            continue
        own = own_name(released)
        shape = shapes.get(own or _repeated(released) or "")
        if shape is None:
            raise CheckpointError(f"{stored.file} has an unexpected tensor {_short(released)}")
        if stored.shape != shape:
            raise CheckpointError(
                f"{released} in {stored.file} has the shape {_short(list(stored.shape))}; config.json asks for "
                f"{list(shape)}"
            )
        if stored.dtype not in DTYPES or stored.nbytes != math.prod(shape) * DTYPES[stored.dtype].itemsize:
            raise CheckpointError(
                f"{released} in {stored.file} is stored as {_short(stored.dtype)}; weights must be {', '.join(DTYPES)}"
            )
        if own:
            matched[own] = stored
        else:
            copies += released.startswith(_ENCODER)
    missing = [name for name in shapes if name not in matched]
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {released_name(missing[0])}{others}")
    if vision:
        notice(f"{folder} has {vision} tensors for vision; they are left aside, this engine reads text only")
    if copies:
        notice(f"{folder} has {copies} tensors twice; the encoder's are left aside for the decoder's")
    return {name: matched[name] for name in shapes}


def _blank(config: ModelConfig, ops: Ops) -> Model:
    """Names and shapes alone."""
    with torch.device("meta"):
        return Model(config, ops)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where its meta twin stands."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, nn.Parameter(tensor) if leaf in module._parameters else tensor)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    names = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    if dtype is not None and dtype not in DTYPES.values() and dtype not in names:
        raise InputError(f"dtype is {str(dtype)!r}; choose one of {', '.join(names)}")
    return names[dtype] if isinstance(dtype, str) else dtype


# ---- save -----------------------------------------------------------------------------------------------------------

_TOKENIZER = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    chat_template.jinja chat_template.json""".split()


def save(
    model: Model,
    folder: str | Path,
    shard_bytes: int = 5 << 30,
    tokenizer_from: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint in the released layout, which transformers reads too; an older one in `folder` is replaced.

    `shard_bytes` bounds a file, unless a single tensor is larger. The tokenizer's files are copied from the folder
    `tokenizer_from`; `generation` is what generation_config.json is to say, None: what that folder's says. All is
    written beside first: a failure (SfumatoError) leaves what was there. Vision tensors were left aside by `load` and
    are not in it."""
    expected = _blank(model.config, model.ops).state_dict()
    for name in {**expected, **(tensors := model.state_dict())}:
        if name not in expected or name not in tensors or tensors[name].shape != expected[name].shape:
            raise InputError(f"{name} is not as the released layout has it; load with ops='fused' what is to be saved")
    folder, copied = Path(folder), {}
    if tokenizer_from is not None:
        source = Path(tokenizer_from)
        copied = {name: source / name for name in _TOKENIZER if (source / name).is_file()}
        if "tokenizer.json" not in copied:
            raise CheckpointError(f"{source} has no tokenizer.json to copy")
        if generation is None and (source / GENERATION).exists():
            generation = read_json(source / GENERATION)
    config = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    if ModelConfig.from_dict(config) != model.config:
        raise InputError("this model's layers differ in ways that config.json cannot say")
    ids = {name: config["text_config"][name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            beside = Path(temporary)
            for name, file in copied.items():
                shutil.copyfile(file, beside / name)
            _write_json(beside / "config.json", config)
            _write_json(beside / GENERATION, {**ids, **(generation or {})})
            _write_shards(beside, tensors, shard_bytes)
            _move_in(beside, folder)
    except (OSError, SafetensorError) as error:
        raise SfumatoError(f"cannot write the checkpoint {folder}: {_short(error)}") from error


def _write_shards(beside: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][released_name(name)] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return write_tensors(beside / SINGLE, shards[0])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(beside / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return _write_json(beside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _move_in(beside: Path, folder: Path) -> None:
    """The file that says where the weights are goes first and comes last, so that old and new never pass for one."""
    new = sorted(beside.iterdir(), key=lambda file: (file.name in (SINGLE, INDEX), file.name))
    for name in (SINGLE, INDEX):
        if name != new[-1].name or name == INDEX:
            (folder / name).unlink(missing_ok=True)
    for old in folder.glob("model-?????-of-?????.safetensors"):
        if not (beside / old.name).exists():
            old.unlink()
    for file in new:
        os.replace(file, folder / file.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
