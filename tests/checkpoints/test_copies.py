"""checkpoints/copies.py: what a file holds twice is compared; a matrix of its own reads logits out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import ENCODER, TINY, edit, make, same
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.contents import config_of, entries_of
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.copies import without_copies
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.save import save
from sfumato.checkpoints.targets import TARGETS
from sfumato.engine.run import generate
from sfumato.errors import CheckpointError, InputError
from sfumato.events import Done
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.quant.formats import Format, pack

EMBEDDING = "model.decoder.embed_tokens.weight"
SHARED = "layers.1.self_attn.o_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def say_tied(folder: Path, tie: bool) -> None:
    edit(folder / "config.json", lambda raw: raw.update(tie_word_embeddings=tie))


def shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies under the encoder's names."""
    return {
        name.replace("model.decoder.", ENCODER): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.decoder.") and "layer_scalar" not in name and "self_conditioning" not in name
    }


def move(tensors: dict[str, Tensor], end: str = "") -> None:
    for name, tensor in shared(tensors).items():
        if name.endswith(end):
            tensors[name] = tensor
            del tensors[name.replace(ENCODER, "model.decoder.")]


@pytest.mark.parametrize("end", ["", "per_expert_scale", "norm.weight"])
def test_the_encoders_alone_are_the_decoders(folder: Path, model: Model, end: str) -> None:
    rewrite(folder, lambda tensors: move(tensors, end))
    assert same(load(folder, PLAIN), model)
    assert all(not name.startswith(ENCODER) or "scalar" in name for name in open_checkpoint(folder).entries)


@pytest.mark.parametrize("name", [SHARED, "embed_tokens.weight", "layers.2.experts.down_proj", "norm.weight"])
def test_a_copy_that_differs_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one value, the last, where a tensor is read in several parts."""
    monkeypatch.setattr("sfumato.checkpoints.formats.released.PART", 512)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= shared(tensors)
        tensors[ENCODER + name].view(-1)[-1] += 1e-3

    rewrite(folder, change)
    expected = rf"{ENCODER}{name} and model\.decoder\.{name} in .* differ: .*; transformers runs such a model"
    with pytest.raises(CheckpointError, match=expected):
        load(folder, PLAIN)


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_is_made_of_copies_that_differ(folder: Path, tmp_path: Path, to: str) -> None:
    from sfumato.checkpoints.locate import NANO

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= shared(tensors)
        tensors[ENCODER + SHARED] += 1

    wide = replace(TINY, vocab_size=512, hidden_size=64, intermediate_size=128, expert_size=128)
    save(make(wide), folder, tokenizer_from=NANO)
    rewrite(folder, change)
    with pytest.raises(InputError, match=f"{ENCODER}{SHARED} and .* differ"):
        convert(folder, to, tmp_path / ("out.gguf" if to.startswith("gguf") else "out"))


def test_a_narrower_copy_is_compared_as_narrow(folder: Path, model: Model) -> None:
    """A copy in bfloat16 is equal where the first rounds to it, as in a model of that dtype."""
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in shared(tensors).items()}))
    assert same(load(folder, PLAIN), model)


def test_codes_are_compared_with_codes_and_with_values() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    first, other = (pack(w, Format.named("int4")) for w in (weight, weight.roll(1)))

    def entry(name: str, values: Tensor, codes: object = None, stored: str = "int4") -> Entry:
        packed = None if codes is None else lambda first, last: codes
        return Entry(name, tuple(values.shape), 1, stored, lambda first, last: values[first:last], packed)  # type: ignore[arg-type]

    def single(copy: Entry) -> Entry:
        ours = entry("model.decoder.x", first.dense(), first)
        config = {"model_type": "diffusion_gemma"}
        opened = Checkpoint(
            Path("p"), "x", config, {one.name: one for one in (ours, replace(copy, name=ENCODER + "x"))}
        )
        return without_copies(opened).entries["model.decoder.x"]

    for equal in (entry("", first.dense(), first), entry("", first.dense(), None, "F32")):
        whole = single(equal)
        assert whole.packed is not None and whole.packed(0, 64) is first
        assert torch.equal(whole.read(3, 5), first.dense()[3:5]) and whole.nbytes == 2
    for different in (entry("", other.dense(), other), entry("", other.dense(), None, "F32")):
        whole = single(different)
        with pytest.raises(CheckpointError, match="differ"):
            whole.packed(0, 64)  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="differ"):
            whole.read(0, 2)


# ---- a head of its own ----------------------------------------------------------------------------------------------


@pytest.fixture
def headed(folder: Path) -> Path:
    """A folder whose logits are read out with another matrix than the embedding."""
    head = torch.randn(97, 32, generator=torch.Generator().manual_seed(7))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    return folder


def test_a_head_of_its_own_reads_out(headed: Path, model: Model, tmp_path: Path) -> None:
    ours = load(headed, PLAIN)
    assert ours.config.has_head and config_of(open_checkpoint(headed)).has_head
    head = load_file(headed / "model.safetensors")["lm_head.weight"]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(8))
    assert torch.equal(ours.logits(hidden), torch.tanh(hidden @ head.T / 30) * 30)
    assert not torch.equal(ours.logits(hidden), model.logits(hidden))
    save(ours, tmp_path / "again")
    assert same(load(tmp_path / "again", PLAIN), ours)


@pytest.mark.parametrize("name", ["reference", "fused", "cpu"])
def test_the_engine_reads_out_with_it(headed: Path, model: Model, name: str) -> None:
    """Tokens follow the head: with one that knows a single word, this is what is written."""
    ours = load(headed, replace(PLAIN, ops="fused"))
    assert ours.lm_head is not None
    with torch.no_grad():
        hidden = ours.lm_head.weight
        hidden.zero_()
        hidden[11] = 100 * model.norm.weight.sign()
        hidden[12] = -hidden[11]
    save(ours, headed)
    ours = load(headed, replace(PLAIN, ops=name))
    options = Options(max_tokens=8, max_steps=2)
    written = [event for event in generate(ours, [[2, 3]], options) if isinstance(event, Done)]
    assert set(written[0].tokens) <= {11, 12}


def test_a_head_that_is_the_embedding_is_none(folder: Path, model: Model) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    for tie in (True, False):
        say_tied(folder, tie)
        ours = load(folder, PLAIN)
        assert same(ours, model) and not ours.config.has_head
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    say_tied(folder, True)
    assert same(load(folder, PLAIN), model)  # as in transformers, either may be the one that is there


def test_untied_without_a_head_is_refused(folder: Path) -> None:
    say_tied(folder, False)
    with pytest.raises(
        CheckpointError, match=r"lacks lm_head\.weight, though its config\.json says .*; say true there"
    ):
        open_checkpoint(folder)


def test_untied_without_copies_says_so(headed: Path) -> None:
    say_tied(headed, False)
    notices: list[str] = []
    entries_of(open_checkpoint(headed), notices.append)
    assert len(notices) == 1 and "says tie_word_embeddings false and has no weights of the encoder's own" in notices[0]


@pytest.mark.parametrize("to", TARGETS)
def test_a_head_is_converted_or_refused(headed: Path, tmp_path: Path, to: str) -> None:
    from sfumato.checkpoints.locate import NANO

    wide = replace(TINY, vocab_size=512, hidden_size=64, intermediate_size=128, expert_size=128, has_head=True)
    model = make(wide)
    save(model, headed, tokenizer_from=NANO)
    target = tmp_path / ("out.gguf" if to.startswith("gguf") else "out")
    if to.startswith(("gguf", "mlx")):
        with pytest.raises(InputError, match=r"reads logits out with a matrix of its own \(lm_head\.weight\)"):
            convert(headed, to, target)
        return
    convert(headed, to, target)
    again = load(target, replace(PLAIN, dtype="float32", ops="reference"))
    assert again.lm_head is not None and model.lm_head is not None
    assert torch.allclose(again.lm_head.weight, model.lm_head.weight, rtol=2**-8, atol=0)
    assert not torch.equal(again.lm_head.weight, again.embed_tokens.weight)
