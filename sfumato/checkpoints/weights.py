"""Checkpoint ↔ Model: one name table, streamed tensor by tensor, checked before a byte is believed; never pickle.

Loading builds the Model on the meta device, holds every file's header against it, and only then reads: one tensor at a
time, straight from the file into its place, packed to fewer bits on the way if a recipe says so. So a checkpoint is
refused before it costs memory, and the peak is the finished model plus one tensor. How a format stores its tensors is
`interop`'s; here none is known by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, Vocabulary
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats import gemma4
from sfumato.checkpoints.formats.released import joined, packed_parts, places
from sfumato.checkpoints.shards import as_json, plain, short, write_file, write_shards
from sfumato.errors import CapacityError, CheckpointError, InputError, is_panic
from sfumato.model import offload
from sfumato.model.config import ModelConfig, generation_values, read_generation_config, read_json
from sfumato.model.network import Model, products, replace_
from sfumato.ops import load as load_ops
from sfumato.ops.contract import Ops
from sfumato.ops.packed import Packed
from sfumato.quant.formats import Format, pack
from sfumato.quant.recipes import Recipe, named
from sfumato.system.files import locked
from sfumato.text.tokenizer import Tokenizer

GENERATION = "generation_config.json"
NANO = Path(__file__).parents[1] / "nano"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""What a model may compute in, by safetensors' names for what is stored so."""

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
    """Where a checkpoint is: "nano" (the embedded model), a folder, a .gguf file, or a hub id ("owner/name").

    A hub id is downloaded, or taken from the offline cache; without `weights` only its configuration, tokenizer and
    chat template. `Path("nano")` or "./nano" is a folder of that name. CheckpointError when there is no such thing."""
    if path == "nano":
        return NANO
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.isfile(folder):
        if folder.endswith(".gguf"):
            return Path(folder)
        raise CheckpointError(f"{path} is a file; give a .gguf file, or the folder that holds config.json and weights")
    if isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path, re.ASCII):
        return _from_hub(path, ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])])
    raise CheckpointError(
        f"there is no folder {short(path)}; give a checkpoint folder, a .gguf file, a hub id like owner/name, or nano"
    )


def _from_hub(name: str, patterns: list[str]) -> Path:
    import huggingface_hub  # here: it takes a while to import, and local checkpoints do without

    try:
        # The hub's own rules: when the net is down or HF_HUB_OFFLINE is set, what the cache holds is taken.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except BaseException as error:  # of many families: the hub's, its HTTP library's, the disk's, a panic in hf_xet
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        kind = type(error).__name__
        known = {
            "RepositoryNotFoundError": "the hub has no such model, or it is private and needs `hf auth login`",
            "GatedRepoError": "its licence must be accepted on the hub first, then `hf auth login`",
            "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be reached",
            "IncompleteSnapshotError": "the cache holds only a part of it and the hub cannot be reached",
        }
        reason = known.get(kind, short(f"{kind}: {error}"))
        raise CheckpointError(f"cannot get {name} from the hub: {reason}") from error


# ---- files ----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file: beside it first, then renamed, so that a reader never sees half a file.

    SfumatoError where the disk says no."""
    write_file(Path(path), tensors, metadata or {})


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; CheckpointError names a file that is none."""
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


# ---- load -----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "fused",
    notice: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    quantize: str | Recipe | None = None,
    seen: Mapping[str, Tensor] | None = None,
    memory_limit: int | None = None,
) -> Model:
    """The Model of a checkpoint: one that is open, or whatever `resolve` understands, in any format that `interop`
    reads. `dtype` None keeps the checkpoint's own.

    `ops` names operations (`ops.load`) or brings them. Weights are packed where these want that ("cpu", and so "auto"):
    such a model runs, but is neither saved nor trained. `quantize` names a recipe (`quant.recipes`): its weights are
    packed to fewer bits as they are read, with regard to what `quant.calibrate` has `seen`; None keeps what the
    checkpoint has in fewer bits as it is. `memory_limit`, bytes of weights on the device, leaves what does not fit on
    the host, from where it is streamed in every pass (`offload`); `notice` hears what lies where.

    `notice` hears, in one sentence a kind, of tensors that are known and left aside; `progress(done, all)` counts
    bytes. CheckpointError names the tensor or file that is wrong, before any tensor is read; InputError names an
    argument, CapacityError a full device."""
    place, wanted = _device(device), _dtype(dtype)
    recipe = named(quantize) if isinstance(quantize, str) else quantize
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(resolve(path))
    model = _described(checkpoint)
    entries = _matched(model, checkpoint, notice or (lambda sentence: None))
    forms = {own: recipe.format_of(own) if recipe else None for own in entries}
    wanted = wanted or DTYPES.get(entries["embed_tokens.weight"].stored, torch.bfloat16)
    names = {module: name for name, module in model.named_modules()}
    laid_out = {f"{names[owner]}.{leaf}" for owner, leaf in products(model)}
    samples = _samples(entries, forms, laid_out)
    model.use_(load_ops(ops, place, wanted, samples) if isinstance(ops, str) else ops)
    for sample in samples:  # refused now, if at all
        model.ops.pack(sample.to(place))
    placement = None
    if memory_limit is not None:
        sizes = _sizes(model, entries, forms, laid_out, wanted)
        placement = offload.plan(sizes, memory_limit, place)
    done, total = 0, sum(entry.nbytes for entry in entries.values())
    for own, entry in entries.items():
        try:
            form = forms[own]
            weight: Tensor | Packed
            if form is not None:
                weight = _packed(entry, form, place, (seen or {}).get(own))
            elif entry.packed is not None and own in laid_out:
                weight = entry.packed(0, entry.shape[0]).to(place)
            else:
                weight = _plain(entry, place, wanted)
            kept = model.ops.pack(weight) if own in laid_out else weight
            is_streamed = placement is not None and placement.is_on_host(own)
            _place(model, own, offload.to_host(kept, place) if is_streamed else kept)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{place} is full after {done >> 20} of {total >> 20} MiB of weights; fewer bits (quantize=), a "
                "memory_limit, or another device may do"
            ) from error
        done += entry.nbytes
        if progress:
            progress(done, total)
    model.pack_()
    if placement is not None:
        offload.attach_(model, placement)
        if notice:
            notice(placement.sentence(offload.bandwidth(place)))
    return model


def _sizes(
    model: Model,
    entries: Mapping[str, Entry],
    forms: Mapping[str, Format | None],
    laid_out: Collection[str],
    wanted: torch.dtype,
) -> dict[str, int]:
    """Bytes of every weight as it will be: what a placement is planned with."""
    sizes: dict[str, int] = {}
    for own, entry in entries.items():
        form = forms[own]
        if own not in laid_out:
            sizes[own] = math.prod(entry.shape) * wanted.itemsize
        elif form is not None:
            make = lambda weight, form=form: model.ops.pack(pack(weight, form))  # noqa: E731
            sizes[own] = offload.packed_bytes(entry.shape, wanted, make)
        elif entry.packed is not None:
            some = 1 if len(entry.shape) == 3 else entry.shape[0]
            sizes[own] = model.ops.pack(entry.packed(0, some)).nbytes * (entry.shape[0] // some)
        else:
            sizes[own] = offload.packed_bytes(entry.shape, wanted, model.ops.pack)
    return sizes


def _packed(entry: Entry, form: Format, place: torch.device, seen: Tensor | None) -> Packed:
    if entry.packed is not None and entry.stored == form.name:
        return entry.packed(0, entry.shape[0]).to(place)
    return joined([part.to(place) for part in packed_parts(entry, form, seen)])


def _plain(entry: Entry, place: torch.device, wanted: torch.dtype) -> Tensor:
    parts = [entry.read(first, last).to(place).to(wanted) for first, last in places(entry)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _samples(
    entries: Mapping[str, Entry], forms: Mapping[str, Format | None], laid_out: Collection[str]
) -> list[Packed]:
    """One small packed weight of every kind that there will be."""
    found: dict[str, Packed] = {}
    for own, entry in entries.items():
        form = forms[own]
        if form is not None and form.name not in found:
            found[form.name] = pack(torch.zeros(32, entry.shape[-1]), form)
        elif form is None and entry.packed is not None and own in laid_out and entry.stored not in found:
            found[entry.stored] = entry.packed(0, entry.shape[0] if len(entry.shape) == 2 else 1)
    return list(found.values())


def _described(checkpoint: Checkpoint) -> Model:
    """The model that its configuration describes: names and shapes alone."""
    config = config_of(checkpoint)
    try:
        return blank(config, load_ops("reference"))
    except RuntimeError as error:  # sizes whose product has no place in 64 bits
        raise CheckpointError(f"{_config_of(checkpoint)} describes a model that is too large to exist") from error


def matched(checkpoint: Checkpoint, notice: Callable[[str], None]) -> dict[str, Entry]:
    """Every tensor of the text model by our name, as the checkpoint has it; CheckpointError where one is missing,
    misshapen or unknown. `notice` hears of what is left aside."""
    return _matched(_described(checkpoint), checkpoint, notice)


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that a file carries within itself."""
    special = {f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.special.items()}
    return Tokenizer.from_vocabulary(vocabulary.tokens, vocabulary.kinds, vocabulary.merges, special)


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """Its configuration, with the ids that end an answer from generation_config.json where that names any."""
    config = ModelConfig.from_dict(checkpoint.config, str(_config_of(checkpoint)))
    eos_ids = generation_of(checkpoint)[1]
    if eos_ids is None:
        return config
    if max(eos_ids) >= config.vocab_size:
        place = checkpoint.path if checkpoint.path.is_file() else checkpoint.path / GENERATION
        raise CheckpointError(f"{place}: eos_token_id {max(eos_ids)} is not among the {config.vocab_size} tokens")
    return replace(config, eos_ids=eos_ids)


def _config_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_file() else checkpoint.path / "config.json"


def generation_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """`read_generation_config` of a checkpoint of any format."""
    if checkpoint.path.is_file():
        return generation_values(checkpoint.generation, str(checkpoint.path))
    return read_generation_config(checkpoint.path)


def _matched(model: Model, checkpoint: Checkpoint, notice: Callable[[str], None]) -> dict[str, Entry]:
    """Ours -> theirs, for all tensors of the model; every other tensor of the checkpoint is accounted for."""
    folder = checkpoint.path
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    matched: dict[str, Entry] = {}
    vision = copies = 0
    for released, entry in checkpoint.entries.items():
        if released.startswith(_VISION):
            vision += 1
            continue
        own = own_name(released)
        shape = shapes.get(own or _repeated(released) or "")
        if shape is None:
            raise CheckpointError(f"{folder} has an unexpected tensor {short(released)}")
        if entry.shape != shape:
            raise CheckpointError(
                f"{released} in {folder} has the shape {short(list(entry.shape))}; {_config_of(checkpoint).name} asks "
                f"for {list(shape)}"
            )
        if own:
            matched[own] = entry
        else:
            copies += released.startswith(_ENCODER)
    missing = [name for name in shapes if name not in matched]
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {released_name(missing[0])}{others}")
    for sentence in checkpoint.notices:
        notice(sentence)
    if vision:
        notice(f"{folder} has {vision} tensors for vision; they are left aside, this engine reads text only")
    if copies:
        notice(f"{folder} has {copies} tensors twice; the encoder's are left aside for the decoder's")
    return {name: matched[name] for name in shapes}


def blank(config: ModelConfig, ops: Ops) -> Model:
    """Names and shapes alone."""
    with torch.device("meta"):
        return Model(config, ops)


def _place(model: nn.Module, name: str, weight: Any) -> None:
    """Put a tensor, or what the operations made of it, where its meta twin stands."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if not isinstance(weight, Tensor):
        replace_(module, leaf, weight)
    else:
        setattr(module, leaf, nn.Parameter(weight) if leaf in module._parameters else weight)


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

TOKENIZER = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
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
    written beside first: a failure (SfumatoError, also where another process writes there) leaves what was there.
    Vision tensors were left aside by `load` and are not in it."""
    expected = blank(model.config, model.ops).state_dict()
    for name in {**expected, **(tensors := model.state_dict())}:
        if name not in expected or name not in tensors or tensors[name].shape != expected[name].shape:
            raise InputError(f"{name} is not as the released layout has it; load with ops='fused' what is to be saved")
    folder, copied = Path(folder), {}
    if tokenizer_from is not None:
        source = Path(tokenizer_from)
        copied = {name: source / name for name in TOKENIZER if (source / name).is_file()}
        if "tokenizer.json" not in copied:
            raise CheckpointError(f"{source} has no tokenizer.json to copy")
        if generation is None and (source / GENERATION).exists():
            generation = read_json(source / GENERATION)
    config = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    if ModelConfig.from_dict(config) != model.config:
        raise InputError("this model's layers differ in ways that config.json cannot say")
    ids = {name: config["text_config"][name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    files: dict[str, str | Path] = {
        **copied,
        "config.json": as_json(config),
        GENERATION: as_json({**ids, **(generation or {})}),
    }
    name_of = str if model.config.is_diffusion else gemma4.name_of
    names = {own: name_of(released_name(own)) for own in tensors}
    planned = [plain(name, tensors[own]) for own, name in names.items() if name]
    with locked(folder):
        write_shards(folder, planned, shard_bytes=shard_bytes, files=files)
