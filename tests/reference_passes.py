"""Passes of transformers' model and of ours over the same tokens: encode, denoise, with soft embeddings, and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.ops.lowrank import LanePair

CLOSE = 2e-4
"""How far logits of two right engines in float32 may be apart."""
Passes = dict[str, Tensor]
"""Logits of every pass, by its name."""


def tokens_of(theirs: Any, seed: int = 5) -> tuple[Tensor, list[Tensor], Tensor]:
    """A prompt longer than three windows, three canvases, and text that is encoded behind it."""
    config, text = theirs.config, theirs.config.text_config
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(3, text.vocab_size - 4, (1, length), generator=generator)

    return draw(3 * text.sliding_window + 5), [draw(config.canvas_length) for _ in range(3)], draw(config.canvas_length)


@torch.no_grad()
def passes_of(theirs: Any) -> Passes:
    """What transformers computes."""
    from transformers import DynamicCache

    prompt, (one, two, three), more = tokens_of(theirs)
    past = DynamicCache(config=theirs.config.text_config)
    cap = theirs.final_logit_softcapping

    def encoded(out: Any) -> Tensor:
        hidden = out.encoder_last_hidden_state
        logits: Tensor = torch.tanh(theirs.lm_head(hidden) / cap) * cap
        return logits

    first = theirs(input_ids=prompt, past_key_values=past, decoder_input_ids=one)
    second = theirs(past_key_values=past, decoder_input_ids=two, self_conditioning_logits=first.logits)
    third = theirs(past_key_values=past, decoder_input_ids=three, self_conditioning_logits=second.logits)
    behind = theirs(input_ids=more, past_key_values=past, decoder_input_ids=one)
    return {
        "encode": encoded(first),
        "first": first.logits,
        "second": second.logits,
        "third": third.logits,
        "encode again": encoded(behind),
        "behind": behind.logits,
    }


@torch.no_grad()
def furthest(ours: Model, theirs: Any, expected: Passes | None = None, lanes: LanePair | None = None) -> float:
    """The largest difference between our passes and the reference's; soft embeddings are of the reference's logits.

    `lanes`: of an adapter beside our weights."""
    expected = expected or passes_of(theirs)
    prompt, (one, two, three), more = tokens_of(theirs)
    cache = KVCache.allocate(ours.config, 1, prompt.shape[1] + more.shape[1] + one.shape[1])
    cache.lanes[0] = lanes or cache.lanes[0]

    def soft(name: str) -> Tensor:
        embedded: Tensor = ours.ops.soft_embedding(expected[name], ours.embed_tokens.weight, ours.embed_scale)
        return embedded

    got = {
        "encode": ours.logits(ours.encode(prompt, cache)),
        "first": ours.logits(ours.denoise(one, cache)),
        "second": ours.logits(ours.denoise(two, cache, soft("first"))),
        "third": ours.logits(ours.denoise(three, cache, soft("second"))),
        "encode again": ours.logits(ours.encode(more, cache)),
        "behind": ours.logits(ours.denoise(one, cache)),
    }
    assert all(bool(logits.isfinite().all()) for logits in got.values())
    return max(float((got[name] - expected[name]).abs().max()) for name in expected)


def load_theirs(folder: Path) -> Any:
    """transformers' model of a folder, in float32; every tensor that it wants is there."""
    from transformers import DiffusionGemmaForBlockDiffusion, logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    loader: Any = DiffusionGemmaForBlockDiffusion
    try:
        model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("vision" in name for name in report["missing_keys"])
    return model.requires_grad_(False).eval()
