"""How tools name the tensors of an adapter of this model, in one table, and what each of them is.

Others train it as transformers has it, an encoder and a decoder that share their weights, or as one stack; peft, data
parallelism and compilation put more around a name. Here every name becomes the model's own, with the pass whose it is.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError

Passes = Literal["encode", "denoise", "both"]

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DDP, torch.compile, FSDP and activation checkpointing put into names, anywhere."""
PEFT = ("base_model.model.", "base_model.")
"""What peft puts before names."""
STACKS: tuple[tuple[str, Passes], ...] = (
    # transformers' DiffusionGemmaForBlockDiffusion, and so peft, TRL and Unsloth; NeMo's export has the first alone
    ("model.decoder.", "denoise"),
    ("model.encoder.language_model.", "encode"),
    # DiffusionGemmaModel, without its head
    ("decoder.", "denoise"),
    ("encoder.language_model.", "encode"),
    # one stack: Gemma 4's names (Unsloth's FastModel, Megatron-Bridge), mlx-vlm's, and NeMo's own
    ("model.language_model.model.", "both"),
    ("language_model.model.", "both"),
    ("model.language_model.", "both"),
    ("language_model.", "both"),
    ("model.", "both"),
    ("", "both"),
)
"""What names begin with behind that, and the pass whose weights follow; the first that fits counts."""
INSIDE = (
    # NeMo AutoModel's blocks, before and after its own export; and mixtures of other models
    (".moe.gate.", ".router."),
    (".moe.router.", ".router."),
    (".mlp.router.", ".router."),
    (".moe.experts.", ".experts."),
    (".mlp.experts.", ".experts."),
)
"""Parts of names that mean parts of ours."""
VISION = ("vision_tower.", "embed_vision.", "multi_modal_projector.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?!weight$|bias$)[\w-]{1,80})?(?:\.weight)?", re.ASCII
)
"""`.lora_A.weight` of peft, `.lora_A.default.weight` of a state saved with its adapter's name, `.lora_A` of stacks."""
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?:(?!weight$)[\w-]{1,80}\.)?(?P<leaf>\w+)", re.ASCII)
_PLAIN = re.compile(r"[\w.]+\.(weight|scale|per_expert_scale|layer_scalar|gate_up_proj|down_proj)|lm_head\.weight")
_OTHERS = (
    (r"\.lora_magnitude_vector", "DoRA (lora_magnitude_vector)"),
    (r"\.lora_[AB]\.(?:[\w-]+\.)?bias$", "LoRA with a bias of its own (lora_bias)"),
    (r"\.lora_(gate_and_up|down)_[AB]$", "NeMo's own layout of experts, before its export to peft's"),
    (r"\.lora_E\b", "AdaLoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.ia3_l\b", "IA3"),
    (r"\.oft_", "OFT"),
    (r"\.vera_", "VeRA"),
    (r"\.token_adapter\.|trainable_tokens", "trainable tokens"),
    (r"prompt_embeddings", "prompt tuning"),
    (r"\.bias$", "a bias"),
)
"""What a name says that is no LoRA."""


class Spot(NamedTuple):
    """What a tensor of an adapter's file is."""

    passes: Passes
    module: str
    """The model's own name: of a module, or of a part of one where factors of experts lie; of a weight as a whole."""
    role: Literal["A", "B", "whole"]
    path: str
    """The module as the file's writer called it: what the patterns of adapter_config.json are about."""


def spot(name: str, at: str) -> Spot | None:
    """What the tensor of this name is; None for one of the part that sees images.

    CheckpointError where it is no low-rank factor and no weight; `at` is the file, for messages."""
    bare = name
    for wrapper in WRAPPERS:
        bare = bare.removeprefix(wrapper).replace("." + wrapper, ".")
    for prefix in PEFT:
        bare = bare.removeprefix(prefix)
    for pattern, what in _OTHERS:
        if re.search(pattern, bare, re.ASCII):
            raise CheckpointError(
                f"{at} has {short(name)}, which is {what}; only LoRA without it can be run here: train without it, or "
                "merge it with peft (merge_and_unload, save_pretrained) and load that model"
            )
    if any(part in f".{bare}" for part in (f".{part}" for part in VISION)):
        return None
    if match := _FACTOR.fullmatch(bare):
        passes, module = _own(match["module"])
        return Spot(passes, module, "A" if match["side"] == "A" else "B", match["module"])
    if match := _WHOLE.fullmatch(bare):
        bare = f"{match['module']}.{match['leaf']}"
    elif not _PLAIN.fullmatch(bare):
        raise CheckpointError(f"{at} has {short(name)}, which is no factor of LoRA and no weight that is replaced")
    passes, module = _own(bare)
    if module.endswith(".layer_scalar"):
        if passes == "both":
            raise CheckpointError(f"{at} has {short(name)}, which encode and denoise each have their own of")
        return Spot("both", module.replace("layer_scalar", f"{passes}_scalar"), "whole", bare)
    return Spot("both" if module == "lm_head.weight" else passes, module, "whole", bare)


def _own(path: str) -> tuple[Passes, str]:
    begin, passes = next(stack for stack in STACKS if path.startswith(stack[0]))
    name = f".{path.removeprefix(begin)}."
    for theirs, ours in INSIDE:
        name = name.replace(theirs, ours)
    return passes, name[1:-1]
