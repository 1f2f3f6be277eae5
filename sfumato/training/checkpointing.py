"""Activation checkpointing: of a block's pass its results alone stay in memory, and the rest is computed once more.

A block gives hidden states and the new keys and values (`BlockResult`). These stay: the hidden states are what the next
block takes, and the encoder's keys and values are what all denoise passes read, so that no denoise pass, and none of
its gradients, waits for the encoder to run again. Everything between them is computed anew in the backward pass, block
by block. Gradients are the same to the last bit, and a step takes 38 % more time (nano; docs/LOG.md). The model knows
nothing of it.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from sfumato.model.network import Model


def checkpoint_(model: Model) -> Model:
    """Let every block keep its results alone where gradients are on, in place; once a model.

    A block says itself, whenever it runs, which adapter its tokens have (`Pass.enter`), so that its second run has the
    lanes of the first."""
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model
