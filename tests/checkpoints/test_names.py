"""checkpoints/names.py: the model's names of tensors and the released ones."""

from __future__ import annotations

import pytest
from small_checkpoints import ENCODER

from sfumato.checkpoints.names import own_name, released_name
from sfumato.model.network import Model


def test_names_both_ways(model: Model) -> None:
    for own in model.state_dict():
        assert own_name(released_name(own)) == own
    assert released_name("layers.2.encode_scalar") == ENCODER + "layers.2.layer_scalar"
    assert released_name("layers.2.denoise_scalar") == "model.decoder.layers.2.layer_scalar"
    assert released_name("norm.weight") == "model.decoder.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "norm.weight",
        "lm_head.weight",
        "model.decoder.",
        ENCODER + "norm.weight",
        "model.decoder.layers.0.encode_scalar",
        "model.encoder.vision_tower.layers.0.layer_scalar",
    ],
)
def test_names_of_no_tensor_of_ours(name: str) -> None:
    assert own_name(name) is None
