"""checkpoints/choices.py: which of several GGUF files a word means."""

from __future__ import annotations

import pytest

from sfumato.checkpoints.choices import chosen, models
from sfumato.errors import CheckpointError

NAMES = [
    "README.md",
    "x-IQ2_XXS.gguf",
    "x-Q4_K_M.gguf",
    "x-Q4_K_S.gguf",
    "x-UD-Q4_K_XL.gguf",
    "BF16/x-BF16-00002-of-00002.gguf",
    "BF16/x-BF16-00001-of-00002.gguf",
    "x.Q6_K.gguf",
    "x.Q6_K.imatrix.gguf",
    "mmproj-BF16.gguf",
]


@pytest.mark.parametrize(
    ("tag", "files"),
    [
        ("Q4_K_M", ["x-Q4_K_M.gguf"]),
        ("q4_k_xl", ["x-UD-Q4_K_XL.gguf"]),
        ("UD-Q4_K_XL", ["x-UD-Q4_K_XL.gguf"]),
        ("iq2_xxs", ["x-IQ2_XXS.gguf"]),
        ("Q6_K", ["x.Q6_K.gguf"]),
        ("X-Q4_K_S", ["x-Q4_K_S.gguf"]),
        ("x-q4_k_s.GGUF", ["x-Q4_K_S.gguf"]),
        ("BF16", ["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
        ("BF16/x-BF16-00002-of-00002.gguf", ["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
    ],
)
def test_a_word_means_one_model(tag: str, files: list[str]) -> None:
    assert chosen(NAMES, tag, "here") == files


@pytest.mark.parametrize("tag", ["Q4_K", "K_M", "Q2_XXS", "x-Q4", "mmproj-BF16", ".", "", "README.md", "*"])
def test_a_word_that_means_none(tag: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"here holds no GGUF '.*'; it has BF16/x-BF16\.gguf, x-IQ2_XXS\.gguf, x-Q4"
    ):
        chosen(NAMES, tag, "here")


def test_a_word_that_means_several() -> None:
    with pytest.raises(
        CheckpointError, match=r"holds 2 models 'Q4_0': a-Q4_0\.gguf, b-Q4_0\.gguf; name one, as here:a-Q4_0"
    ):
        chosen(["b-Q4_0.gguf", "a-Q4_0.gguf"], "Q4_0", "here")
    with pytest.raises(CheckpointError, match=r"here holds 6 models: .*; name one, as here:BF16"):
        chosen(NAMES, None, "here")
    assert chosen(["a.gguf", "mmproj.gguf"], None, "here") == ["a.gguf"]
    with pytest.raises(CheckpointError, match="here holds no GGUF file of a model"):
        chosen(["mmproj.gguf", "a.safetensors"], None, "here")
    many = [f"x-{at:03}-Q4_0.gguf" for at in range(300)]
    with pytest.raises(CheckpointError, match=r"x-019-Q4_0\.gguf and 280 more; name one, as here:Q4_0") as caught:
        chosen(many, None, "here")
    assert len(str(caught.value)) < 600


def test_parts_that_are_not_all_there_are_one_model() -> None:
    assert models(["a-00003-of-00003.gguf", "a-00001-of-00003.gguf", "a.gguf\n"]) == {
        "a.gguf": ["a-00001-of-00003.gguf", "a-00003-of-00003.gguf"]
    }
