"""The models of peers.py: ours, transformers' around the same tensors, and what both get."""

from __future__ import annotations

from typing import Any

import torch

from sfumato import ops
from sfumato.checkpoints.names import own_name
from sfumato.measure.parts import prompt_ids, random_config, random_model
from sfumato.measure.plan import BenchPlan
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.quant.apply import quantize_, samples

CALM = 0.1
"""What each block adds, as a share of its norm (see `calm_`)."""


def twin(model: Model) -> Any:
    """transformers' model of the same config, around the same tensors: nothing is copied."""
    import transformers

    config = transformers.DiffusionGemmaConfig(**model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.DiffusionGemmaForBlockDiffusion(config)
    own = model.state_dict()
    shared = {}
    for name in theirs.state_dict():
        if "vision" not in name:
            source = "embed_tokens.weight" if name == "lm_head.weight" else own_name(name)
            source = source or own_name(name.replace("encoder.language_model.", "decoder."))
            shared[name] = own[source or name]
    theirs.load_state_dict(shared, strict=False, assign=True)
    for module in list(theirs.modules()):  # what no checkpoint holds, and meta therefore lost
        for child_name, child in list(module.named_children()):
            if type(child).__name__.endswith("TextRotaryEmbedding"):
                setattr(module, child_name, type(child)(child.config, model.device))
            elif hasattr(child, "scalar_embed_scale"):
                child.embed_scale = torch.tensor(child.scalar_embed_scale, device=model.device)
    theirs.model.encoder.vision_tower.to_empty(device=model.device)
    theirs.model.encoder.embed_vision.to_empty(device=model.device)
    left = [name for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
    return theirs.requires_grad_(False).eval()


def packed(plain: Model, kind: str, name: str) -> Model:
    """Our model of the same tensors, in this recipe (or none), in the form that these operations take."""
    record = ops.load(name, plain.device, plain.dtype, samples(kind) if kind else [])
    with torch.device("meta"):
        model = Model(plain.config, record)
    model.load_state_dict(plain.state_dict(), assign=True)
    model.requires_grad_(False).eval()
    return (quantize_(model, kind) if kind else model).pack_()


def inputs(model: Model, plan: BenchPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt, canvas, and the logits of a step before: the same for everyone."""
    config, generator = model.config, torch.Generator().manual_seed(plan.seed)
    canvas_BL = torch.randint(config.vocab_size, (1, config.canvas_length), generator=generator)
    logits_BLV = torch.randn(1, config.canvas_length, config.vocab_size, generator=generator)
    prompt_BT = torch.tensor([prompt_ids(config, plan)])
    return prompt_BT.to(model.device), canvas_BL.to(model.device), logits_BLV.to(model.device, model.dtype)


def calm_(model: Model) -> Model:
    """Each block adds a tenth of its norm, as a trained one does; with random weights and whole norms a last place in
    one layer sends tokens to other experts in the next, and no two engines, nor bf16 and float32, agree on anything."""
    for name, parameter in model.named_parameters():
        if "post_" in name:
            parameter.data.fill_(CALM)
    return model


def model_of(size: str, dtype: str, device: str) -> tuple[Model, ModelConfig]:
    config = random_config(size)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    return calm_(random_model(config, kind, device, "fused")), config
