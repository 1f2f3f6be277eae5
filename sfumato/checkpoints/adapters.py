"""Adapters as files: peft's layout, read from whoever writes it and written so that peft reads it.

A folder has adapter_config.json and adapter_model.safetensors. peft wraps modules, and transformers runs this model as
an encoder and a decoder that share their weights: so a file may have two sets of factors for one weight. Equal ones are
one adapter here; where they differ, or one set is missing, encode and denoise have each their own. What both passes
share is written under both names. It lacks every adapter that is not LoRA, and pickles.

Source: peft 0.21.2, `tuners/lora/layer.py` (`Linear`, `ParamWrapper`), `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints import calibration
from sfumato.checkpoints.adapter_config import CONFIG, LAYOUT, PeftOptions, read_options
from sfumato.checkpoints.adapter_experts import Lying, factors_of_experts, is_of_experts, lying_of
from sfumato.checkpoints.adapter_names import Passes, Spot, spot
from sfumato.checkpoints.shards import Stored, as_json, header, short, write_tensors
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.adapters import TARGETS, Adapter, Factors, targeted
from sfumato.model.network import Model
from sfumato.system.files import locked

TENSORS = "adapter_model.safetensors"
_NEMO = "automodel_peft_config.json"
"""What NeMo AutoModel, which trains one stack, writes beside."""
MOST_RANK = 4096
"""The largest rank that is read: all adapters of a model lie in stacks of the largest rank among them."""
_FLOATS = ("F32", "BF16", "F16", "F64")
_HEAD, _EMBEDDING, _CONDITIONING = "lm_head.weight", "embed_tokens.weight", "self_conditioning."
_PEFT = "base_model.model."
_DECODER, _ENCODER = f"{_PEFT}model.decoder.", f"{_PEFT}model.encoder.language_model."
_GEMMA4 = f"{_PEFT}model.language_model."
_CLASS = {
    "base_model_class": "DiffusionGemmaForBlockDiffusion",
    "parent_library": "transformers.models.diffusion_gemma.modeling_diffusion_gemma",
}
"""What peft's AutoPeftModel loads the base as."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path, model: Model) -> Adapter:
    """The adapter in a folder, checked for this model, which may be on the meta device. Factors stay as stored.

    CheckpointError names what is wrong with the files, InputError that they are for another model. Tensors of the part
    that sees images are left aside with a notice (`Adapter.notices`)."""
    options, contents = _open(folder)
    return _AdapterReading(folder, model, options, contents).adapter()


@dataclass
class _AdapterFile:
    """What an adapter's file holds, by headers alone."""

    spots: dict[str, Spot] = field(default_factory=dict)
    """By the tensor's name in the file."""
    tensors: dict[str, Stored] = field(default_factory=dict)
    aside: int = 0
    """Tensors of the part that sees images."""


def _open(folder: Path) -> tuple[PeftOptions, _AdapterFile]:
    """The checked options and names of an adapter. CheckpointError where it is none."""
    _check_folder(folder)
    options, path, contents = read_options(folder), folder / TENSORS, _AdapterFile()
    names: dict[tuple[Passes, str, str], str] = {}
    for stored in header(path):
        place = spot(stored.name, str(path))
        if place is None:
            contents.aside += 1
            continue
        other = names.setdefault(place[:3], stored.name)
        if other != stored.name:
            raise CheckpointError(f"{path} has {short(other)} and {short(stored.name)}, which are the same tensor")
        if stored.dtype not in _FLOATS or not stored.is_whole:
            raise CheckpointError(
                f"{short(stored.name)} in {path} is stored as {short(stored.dtype)}; factors must be "
                f"{', '.join(_FLOATS)}"
            )
        contents.spots[stored.name], contents.tensors[stored.name] = place, stored
    if not contents.spots:
        raise CheckpointError(f"{path} changes nothing of the text model; there is no adapter in it")
    return options, contents


def _check_folder(folder: Path) -> None:
    """CheckpointError with what a folder is instead, and what to do, where it is no adapter in peft's layout."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the one with {CONFIG} and {TENSORS}")
    if (folder / CONFIG).exists() and (folder / TENSORS).exists():
        return
    names = sorted(file.name for file in folder.iterdir())
    inner = [name for name in names if (folder / name / TENSORS).exists()]
    if "adapters.safetensors" in names:
        what = "holds an adapter of mlx; fuse it there (mlx_vlm.lora, mlx_lm.fuse) and load the model that it writes"
    elif pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".nemo"))]:
        what = (
            f"has pickled factors ({short(pickles[0])}), which can run code when they are opened and are never read; "
            "save it anew with peft (safe_serialization=True)"
        )
    elif inner:
        what = f"is no adapter itself, but has one in {', '.join(map(short, inner[:3]))}; give one of these folders"
    elif "config.json" in names:
        what = "is a whole model and no adapter; load it as the model"
    else:
        what = f"has no {TENSORS if CONFIG in names else CONFIG}; an adapter in peft's layout has both"
    raise CheckpointError(f"{folder} {what}")


_StoredPart = tuple[Lying, Stored, Stored, float]


class _AdapterReading:
    """One adapter being read: its tensors by pass, then as the model has them."""

    def __init__(self, folder: Path, model: Model, options: PeftOptions, contents: _AdapterFile) -> None:
        self.folder, self.model, self.options, self.contents = folder, model, options, contents
        self.source = str(folder) + (f" (made for {options.base})" if options.base else "")
        self.shapes = {name: tuple(getattr(*place).shape) for name, place in targeted(model).items()}
        self.has_one_stack = not options.is_of_peft or (folder / _NEMO).exists()
        self.notices: list[str] = []
        if contents.aside:
            self.notices.append(
                f"{folder} has {contents.aside} tensors for vision; they are left aside, this engine adapts text only"
            )

    def adapter(self) -> Adapter:
        """Both passes' factors, joined where they are equal."""
        by_pass = {passes: dict(self._makers(passes)) for passes in ("encode", "denoise", "both")}
        factors, denoise = self._joined(by_pass)
        whole = self._whole()
        temperatures = calibration.calibration_beside(self.folder).temperatures
        adapter = Adapter(factors, denoise, whole, self.source, tuple(self.notices), temperatures)
        adapter.check(self.model)
        return adapter

    # -- factors

    def _makers(self, passes: Passes) -> Iterator[tuple[str, Callable[[], Factors]]]:
        """What reads the factors of each weight of a pass, by the weight's name; all shapes are checked."""
        pairs: dict[str, dict[str, tuple[Stored, Spot]]] = {}
        for name, place in self.contents.spots.items():
            if place.passes == passes and place.role != "whole":
                pairs.setdefault(place.module, {})[place.role] = self.contents.tensors[name], place
        experts: dict[str, list[_StoredPart]] = {}
        for module, pair in pairs.items():
            if pair.keys() != {"A", "B"}:
                (one,) = pair
                raise CheckpointError(
                    f"{self.folder / TENSORS} has lora_{one} of {short(module)} without its "
                    f"lora_{'B' if one == 'A' else 'A'}; it was not saved whole"
                )
            (a, place), (b, _) = pair["A"], pair["B"]
            if is_of_experts(module):
                lying = lying_of(module, a, b, self.shapes, self.options.is_turned, self.source)
                path = place.path if lying.expert is not None else f"{lying.path(place.path)}"
                scale = self._scale(path, lying.rank(a))
                experts.setdefault(lying.weight, []).append((lying, a, b, scale))
            else:
                self._check_linear(module, a, b)
                yield f"{module}.weight", partial(self._linear, a, b, self._scale(place.path, a.shape[0]))
        for weight, parts in experts.items():
            yield weight, partial(self._experts, weight, parts)

    def _experts(self, weight: str, parts: list[_StoredPart]) -> Factors:
        read = [(lying, self._read(a), self._read(b), scale) for lying, a, b, scale in parts]
        return factors_of_experts(self.shapes[weight], read)

    def _check_linear(self, module: str, a: Stored, b: Stored) -> None:
        name = f"{module}.weight"
        if name not in self.shapes:
            if module in ("embed_tokens", "lm_head"):
                raise CheckpointError(
                    f"{self.source} has factors for {module}, which is run as it is; targets are {', '.join(TARGETS)}: "
                    "train with one of these, or merge it with peft"
                )
            raise CheckpointError(
                f"{self.source} changes {short(module)}, which this model does not have; it is for another model"
            )
        outputs, inputs = self.shapes[name]
        is_right = len(a.shape) == len(b.shape) == 2 and (a.shape[1], *b.shape) == (inputs, outputs, a.shape[0])
        if not is_right or not a.shape[0]:
            raise CheckpointError(
                f"{self.source} has factors {list(a.shape)} and {list(b.shape)} for {module}, where this model needs "
                f"[rank, {inputs}] and [{outputs}, rank]; it is for another model"
            )

    def _scale(self, path: str, rank: int) -> float:
        """CheckpointError where the rank is not what the options say, or larger than any that is of use."""
        if rank > MOST_RANK:
            raise CheckpointError(
                f"{self.folder / TENSORS} has factors of rank {rank} for {short(path)}; at most {MOST_RANK} is run "
                "here: merge it with peft (merge_and_unload, save_pretrained) and load that model"
            )
        expected = self.options.ranks[path]
        if rank != expected:
            raise CheckpointError(
                f"{self.folder / TENSORS} has factors of rank {rank} for {short(path)}, and {CONFIG} says "
                f"{expected:g}; the two files do not belong together"
            )
        return self.options.scale(path, rank)

    def _linear(self, a: Stored, b: Stored, scale: float) -> Factors:
        return Factors(self._read(a), self._read(b).mT.contiguous(), scale)

    def _read(self, stored: Stored) -> Tensor:
        tensor = stored.read()
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not tensor.isfinite().all():
            raise CheckpointError(f"{short(stored.name)} in {stored.file} has numbers that are not finite (NaN or inf)")
        return tensor

    def _joined(
        self, by_pass: Mapping[str, Mapping[str, Callable[[], Factors]]]
    ) -> tuple[dict[str, Factors], dict[str, Factors] | None]:
        """Factors of encode and of denoise; None for the latter where both share one set."""
        encode, denoise, both = (by_pass[passes] for passes in ("encode", "denoise", "both"))
        shared = {name: make() for name, make in both.items()}
        if not encode and not self._is_split(denoise):
            return shared | {name: make() for name, make in denoise.items()}, None
        first = {name: make() for name, make in encode.items()}
        second: dict[str, Factors] = {}
        is_equal = True
        for name, make in denoise.items():
            factors = make()
            if name in first and _are_equal(first[name], factors):
                factors = first[name]  # once in memory
            elif not name.startswith(_CONDITIONING):
                is_equal = False
            second[name] = factors
        if is_equal and first.keys() <= second.keys():
            return shared | second, None
        return shared | first, shared | second

    def _is_split(self, denoise: Mapping[str, Any]) -> bool:
        """Whether factors under the decoder's names alone are denoise's alone: so peft runs what it has trained.

        Tools that train one stack name its weights as the released files do, which is the decoder's way too."""
        blocks = [name for name in denoise if not name.startswith(_CONDITIONING)]
        if not blocks:
            return False
        self.notices.append(
            f"{self.folder} names the decoder's layers alone: its factors are taken for "
            + (
                "encode and denoise, as its tool trains one stack"
                if self.has_one_stack
                else "denoise alone, as peft does"
            )
        )
        return not self.has_one_stack

    # -- whole weights

    def _whole(self) -> dict[str, Tensor]:
        """The weights that it replaces, each read once and, where encoder and decoder share it, compared."""
        for name, place in self.contents.spots.items():  # all shapes first: a header may promise more than memory holds
            if place.role == "whole":
                shape = torch.empty(self.contents.tensors[name].shape, device="meta")
                Adapter({}, whole={place.module: shape}, source=self.source).check(self.model)
        by_name: dict[str, dict[Passes, Tensor]] = {}
        for name, place in self.contents.spots.items():
            if place.role == "whole":
                tensor = self._read(self.contents.tensors[name])
                by_name.setdefault(place.module, {})[place.passes] = tensor
        whole: dict[str, Tensor] = {}
        for name, tensors in by_name.items():
            one, *others = tensors.values()
            is_alone = len(tensors) == 1 and "both" not in tensors and not name.startswith(_CONDITIONING)
            if (is_alone and not self.has_one_stack) or any(not torch.equal(one, other) for other in others):
                raise CheckpointError(
                    f"{self.source} replaces {short(name)} differently for encode and denoise, which share it here; "
                    "save it for both alike, or leave it out of modules_to_save"
                )
            whole[name] = one
        return self._without_copy(whole)

    def _without_copy(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """A head that equals the embedding goes; an embedding that leaves a tied head behind is refused."""
        head, embedding = whole.get(_HEAD), whole.get(_EMBEDDING)
        if embedding is not None and head is None and self.model.lm_head is None and not self.options.is_tied:
            raise CheckpointError(
                f"{self.source} replaces embed_tokens without lm_head, which this model ties to it; save both, or "
                "say ensure_weight_tying"
            )
        if embedding is not None and head is not None and self.model.lm_head is None and torch.equal(head, embedding):
            del whole[_HEAD]
        return whole


def _are_equal(one: Factors, other: Factors) -> bool:
    return one.scale == other.scale and torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


# ---- told without a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's files say of it, by headers alone."""

    base: str | None
    """The model that it was made for, as its maker called it."""
    ranks: tuple[int, ...]
    passes: str
    """Whose weights its names are of: "encode and denoise", or one of them."""
    targets: dict[str, int]
    """How many weights it has factors for, by the keys of `TARGETS` ("other": none of them), each once."""
    whole: int
    """How many weights it replaces."""
    parameters: int
    """Numbers in the file, those of both passes."""
    nbytes: int
    aside: int
    """Tensors for vision, which are left aside."""


def describe_adapter(folder: Path) -> AdapterFacts:
    """What the adapter of a folder is. CheckpointError where it is none; for which model it fits nobody has looked."""
    options, file = _open(folder)
    factors = {name: place for name, place in file.spots.items() if place.role == "A"}
    ranks = {round(options.ranks[_weight_of(place)[1]]) for place in factors.values()}
    weights = {_weight_of(place)[0] for place in factors.values()}
    kinds = Counter(
        next((kind for kind, ends in _KINDS.items() if weight.endswith(ends)), "other") for weight in weights
    )
    passes = {place.passes for place in factors.values() if not place.module.startswith(_CONDITIONING)} - {"both"}
    alone = passes.pop() if len(passes) == 1 and options.is_of_peft else None
    whole = {place.module for place in file.spots.values() if place.role == "whole"}
    tensors = file.tensors.values()
    return AdapterFacts(
        base=options.base,
        ranks=tuple(sorted(ranks)),
        passes=alone or "encode and denoise",
        targets={kind: kinds[kind] for kind in (*TARGETS, "other") if kinds[kind]},
        whole=len(whole),
        parameters=sum(math.prod(one.shape) for one in tensors),
        nbytes=sum(one.nbytes for one in tensors),
        aside=file.aside,
    )


_KINDS = {kind: tuple(ends) for kind, ends in TARGETS.items()}


def _weight_of(place: Spot) -> tuple[str, str]:
    """The weight that a factor is of, as far as its name says, and what patterns call it."""
    if not is_of_experts(place.module):
        return f"{place.module}.weight", place.path
    begin, _, rest = place.module.partition(".experts")
    is_gate = "gate" in rest or "up_proj" in rest or rest == ".base_layer"
    leaf = "gate_up_proj" if is_gate else "down_proj"
    path = place.path.removesuffix(".base_layer")
    return f"{begin}.experts.{leaf}", path if rest not in ("", ".base_layer") else f"{path}.{leaf}"


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(
    adapter: Adapter,
    folder: Path,
    model: Model,
    *,
    base: str,
    extra: Mapping[str, str | Path] = {},
) -> None:
    """Write an adapter of this model in peft's layout; one that is there is replaced when the new one is whole.

    `base` is what the model is called, `extra` what else goes in, by file name: texts, or files to copy. What encode
    and denoise share is written under the names of both. InputError for an adapter that does not fit, SfumatoError
    where the disk says no: then what was there is as it was."""
    adapter.check(model)
    layout = _Layout((_ENCODER, _DECODER) if model.config.is_diffusion else (_GEMMA4,))
    layout.add(layout.begins[0], adapter.factors)
    if model.config.is_diffusion:
        layout.add(_DECODER, adapter.factors if adapter.denoise is None else adapter.denoise)
    layout.add_whole(adapter.whole, is_tied=model.lm_head is None)
    files = {**extra, CONFIG: as_json(layout.options(base))}
    beside = folder.with_name(f".{folder.name}.writing")
    with locked(folder):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write_tensors(beside / TENSORS, layout.tensors)
            for name, content in files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, beside / name)
                else:
                    (beside / name).write_text(content, encoding="utf-8")
            _move_in(beside, folder)
        except OSError as error:
            raise SfumatoError(f"cannot write the adapter {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _move_in(beside: Path, folder: Path) -> None:
    """A folder that is not there comes as a whole; in one that is, no reader takes new tensors with old options.

    Options that stay the same stay; others go first and come last."""
    if not folder.exists():
        os.rename(beside, folder)
        return
    new, old = beside / CONFIG, folder / CONFIG
    if old.exists() and old.read_bytes() != new.read_bytes():
        old.unlink()
    if not (beside / calibration.FILE).exists():
        (folder / calibration.FILE).unlink(missing_ok=True)  # of the factors that were there
    for file in sorted(beside.iterdir(), key=lambda file: (file.name == CONFIG, file.name == TENSORS)):
        os.replace(file, folder / file.name)


class _Layout:
    """An adapter as peft has it: tensors by name, and what the options must say for peft to wrap the same weights."""

    def __init__(self, begins: tuple[str, ...]) -> None:
        self.begins = begins
        """What the names of the model's stacks begin with."""
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        """By what peft calls the weight's place."""
        self.alphas: dict[str, float] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self.saved: list[str] = []

    def add(self, begin: str, factors: Mapping[str, Factors]) -> None:
        """One pass's factors, under names that begin so."""
        for name, own in factors.items():
            if begin == _ENCODER and name.startswith(_CONDITIONING):
                continue
            path = begin + name.removesuffix(".weight")
            if ".experts." in name:
                self.parameters.append(_place(path))
                lies, _, leaf = path.rpartition(".")
                is_inner = leaf == "gate_up_proj" and name.replace("gate_up_proj", "down_proj") in factors
                lies += ".base_layer" if is_inner else ""
                a, b = own.a.flatten(0, 1), own.b.permute(2, 1, 0).flatten(1)
            else:
                self.modules.append(_place(path))
                lies, a, b = path, own.a, own.b.mT
            self.ranks[_place(path)], self.alphas[_place(path)] = own.rank, own.scale * own.rank
            self.tensors[f"{lies}.lora_A.weight"] = a.detach().contiguous()
            self.tensors[f"{lies}.lora_B.weight"] = b.detach().contiguous()

    def add_whole(self, whole: Mapping[str, Tensor], is_tied: bool) -> None:
        """Weights that are replaced, under both names; a head that is tied to the embedding goes with it."""
        for name, tensor in whole.items():
            if name.endswith("_scalar"):
                raise InputError(f"{name} is of one pass alone, which peft's layout cannot say; leave it out")
            begins = (_DECODER,) if name.startswith(_CONDITIONING) else self.begins
            paths = [begin + name for begin in begins] if name != _HEAD else [_PEFT + _HEAD]
            if name == _EMBEDDING and is_tied and _HEAD not in whole:
                paths.append(_PEFT + _HEAD)
            for path in paths:
                self.tensors[path] = tensor.detach()
                self.saved.append(_place(path.rpartition(".")[0]))

    def options(self, base: str) -> dict[str, Any]:
        """What adapter_config.json says."""
        rank, alpha = (_commonest(values) for values in (self.ranks, self.alphas))
        return {
            "peft_type": "LORA",
            "peft_version": LAYOUT,
            "task_type": None,
            "auto_mapping": _CLASS if _DECODER in self.begins else None,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "r": int(rank),
            "lora_alpha": _whole_number(alpha),
            "rank_pattern": {re.escape(path): own for path, own in self.ranks.items() if own != rank},
            "alpha_pattern": {re.escape(path): _whole_number(own) for path, own in self.alphas.items() if own != alpha},
            "use_rslora": False,
            "use_dora": False,
            "target_modules": self.modules,
            "target_parameters": self.parameters or None,
            "modules_to_save": sorted(set(self.saved)) or None,
        }


def _place(path: str) -> str:
    return path.removeprefix(_PEFT)


def _commonest(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0] if values else 1


def _whole_number(value: float) -> float:
    """8 rather than 8.0: some readers take whole numbers alone."""
    return int(value) if value == int(value) else value
