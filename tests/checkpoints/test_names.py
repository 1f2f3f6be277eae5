"""checkpoints/names.py: the model's names of tensors and the released ones."""

from __future__ import annotations

import pytest
from small_checkpoints import ENCODER

from sfumato.checkpoints.names import decoder_twin, own_name, released_name, released_spelling, released_spellings
from sfumato.errors import CheckpointError
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
        "lm_head",
        "model.decoder.",
        ENCODER + "norm.weight",
        "model.decoder.layers.0.encode_scalar",
        "model.encoder.vision_tower.layers.0.layer_scalar",
    ],
)
def test_names_of_no_tensor_of_ours(name: str) -> None:
    assert own_name(name) is None


def test_how_other_tools_spell_the_names() -> None:
    for tail in ("layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.qweight", "embed_tokens.weight", "norm.weight"):
        released = f"model.decoder.{tail}"
        for begin in ("", "module.", "_orig_mod.", "module._orig_mod.", "base_model.model."):
            assert released_spelling(begin + released) == released
        for begin in ("decoder.", "language_model.model.", "model.language_model.", "language_model."):
            assert released_spelling(begin + tail) == released
    for begin in ("model.encoder.", "encoder.", "model.", ""):
        assert released_spelling(f"{begin}vision_tower.std_bias") == "model.encoder.vision_tower.std_bias"
    for name in ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"):
        assert released_spelling(name) == "lm_head.weight"
    for name in ("encoder.language_model.norm.weight", ENCODER + "norm.weight"):
        assert released_spelling(name) == ENCODER + "norm.weight"
    for name in ("", "norm.weight", "model.layers.0.x", "audio_tower.x"):
        assert released_spelling(name) == name


def test_two_spellings_of_one_tensor_are_refused() -> None:
    names = ["decoder.norm.weight", "x"]
    assert released_spellings(names) == {"decoder.norm.weight": "model.decoder.norm.weight", "x": "x"}
    with pytest.raises(
        CheckpointError, match=r"'decoder\.norm\.weight' and 'model\.decoder\.norm\.weight' are the same"
    ):
        released_spellings([*names, "model.decoder.norm.weight"])


def test_what_both_directions_share() -> None:
    assert decoder_twin(ENCODER + "norm.weight") == "model.decoder.norm.weight"
    for alone in ("layers.0.layer_scalar", "self_conditioning.up_proj.weight"):
        assert decoder_twin(ENCODER + alone) is None
    for name in ("model.decoder.norm.weight", "model.encoder.vision_tower.std_bias", "lm_head.weight"):
        assert decoder_twin(name) is None
