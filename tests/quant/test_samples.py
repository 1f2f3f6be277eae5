"""quant/apply.py: a sample of every format of a recipe."""

from __future__ import annotations

from sfumato.quant.apply import samples


def test_a_sample_of_every_format_of_a_recipe() -> None:
    packed = samples("int4")
    assert [(one.kind, one.group, one.shape) for one in packed] == [("int4", 64, (32, 128)), ("int8", 128, (32, 128))]
    assert [one.kind for one in samples("nvfp4")] == ["nvfp4", "fp8"]
    assert [(one.kind, one.group) for one in samples("int4-small")] == [("int4", 128), ("int4", 64), ("int8", 128)]
    assert all(not one.dense().any() for one in packed)
