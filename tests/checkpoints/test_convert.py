"""checkpoints/convert.py: checkpoint → checkpoint: every target is written, loads without a flag and says the same; cut
off, it goes on.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import LLM, Options, ops
from sfumato.checkpoints import convert, shards, targets
from sfumato.checkpoints.contents import config_of
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import PLAIN
from sfumato.checkpoints.load import load as load_with
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.save import save
from sfumato.cli import main
from sfumato.errors import CapacityError, CheckpointError, InputError, SfumatoError
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, products
from sfumato.ops.contract import dense
from sfumato.ops.packed import Packed
from sfumato.quant import recipes
from sfumato.quant.apply import quantize_
from sfumato.quant.formats import pack
from sfumato.system import files

RECIPES = list(recipes.RECIPES)


def load(path: Any, calibration: Mapping[str, Tensor] | None = None, **changes: Any) -> Model:
    return load_with(path, replace(PLAIN, dtype="float32", **changes), calibration=calibration)


@pytest.fixture(scope="module")
def plain() -> Model:
    return load("nano")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """nano as every target."""
    folder = tmp_path_factory.mktemp("converted")
    actual = {}
    for to in targets.TARGETS:
        actual[to] = folder / (f"{to}.gguf" if to.startswith("gguf") else to)
        convert.convert("nano", to, actual[to])
    yield actual


def every_weight(model: Model) -> dict[str, torch.Tensor]:
    names = {module: name for name, module in model.named_modules()}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for owner, leaf in products(model):
        tensors[f"{names[owner]}.{leaf}"] = dense(getattr(owner, leaf), torch.float32).detach()
    return tensors


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_written_is_what_loading_makes(written: dict[str, Path], name: str) -> None:
    """To the bit: quantised to disk and loaded, quantised while loading, and as a pass over a loaded model."""
    one, two = load(written[name]), load("nano", quantize=name)
    three = quantize_(load("nano"), name)
    for (owner, leaf), (other, _), (third, _) in zip(products(one), products(two), products(three), strict=True):
        first, second, last = getattr(owner, leaf), getattr(other, leaf), getattr(third, leaf)
        assert isinstance(first, Packed) and isinstance(second, Packed) and isinstance(last, Packed)
        assert first.kind == second.kind == last.kind and first.group == second.group == last.group
        for part, tensor in first.parts.items():
            bits = tensor.view(torch.uint8)
            assert torch.equal(bits, second.parts[part].view(torch.uint8))
            assert torch.equal(bits, last.parts[part].view(torch.uint8))
    for key, tensor in load("nano").state_dict().items():
        if "norm" in key or "scal" in key or "router" in key or "embed" in key:
            assert torch.equal(one.state_dict()[key], tensor)


@pytest.mark.parametrize(
    ("to", "most"),
    [
        *(("bf16", 0.003), ("compressed-fp8", 0.03), ("mlx-8bit", 0.006), ("mlx-4bit", 0.1), ("gguf-q8_0", 0.006)),
        *(("gguf-bf16", 0.003), ("int8", 0.01), ("fp8", 0.03), ("int4", 0.1), ("int4-fp8", 0.1), ("nvfp4", 0.1)),
        *(("int4-small", 0.12), ("mlx-3bit", 0.22), ("mlx-5bit", 0.05), ("mlx-6bit", 0.025), ("mlx-mxfp4", 0.12)),
    ],
)
def test_every_target_loads_without_a_flag_and_holds_the_weights(
    plain: Model, written: dict[str, Path], to: str, most: float
) -> None:
    exact, actual = every_weight(plain), every_weight(load(written[to]))
    assert exact.keys() == actual.keys()
    for name, tensor in exact.items():
        error = (actual[name] - tensor).norm() / tensor.norm()
        assert error <= most, f"{name}: {error}"


@pytest.mark.parametrize("to", ["int4", "gguf-q8_0", "gguf-bf16", "mlx-8bit", "compressed-fp8"])
def test_the_tokenizer_and_the_template_come_along(written: dict[str, Path], to: str) -> None:
    known, llm = LLM.load("nano", ops="fused"), LLM.load(written[to], ops="fused")
    messages = [{"role": "user", "content": "Solve this Sudoku:\n" + "5300700006" * 8 + "1"}]
    assert llm.encode(messages) == known.encode(messages)
    assert llm.tokenizer.decode(known.encode(messages)) == known.tokenizer.decode(known.encode(messages))
    left = {"max_tokens"} if to.startswith("gguf") else set()  # one file holds nothing of what nano is for
    assert llm.defaults == {name: known.defaults[name] for name in known.defaults.keys() - left}
    assert llm.purpose == (None if left else known.purpose)
    assert llm.model.config.eos_ids == known.model.config.eos_ids
    assert len(llm.chat(messages, options=Options(max_tokens=82, max_steps=1, seed=1)).tokens) > 0


def test_the_page_has_every_target() -> None:
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    assert [to for to in targets.TARGETS if to not in RECIPES and f"`{to}`" not in page] == []


def test_formats_are_changed_along_a_chain(plain: Model, written: dict[str, Path], tmp_path: Path) -> None:
    """GGUF → ours in 4 bits → GGUF → MLX: each reads what the one before wrote."""
    convert.convert(written["gguf-q8_0"], "int4", tmp_path / "one")
    convert.convert(tmp_path / "one", "gguf-q8_0", tmp_path / "two.gguf")
    convert.convert(tmp_path / "two.gguf", "mlx-8bit", tmp_path / "three")
    exact, actual = every_weight(plain), every_weight(load(tmp_path / "three"))
    for name, tensor in exact.items():
        assert (actual[name] - tensor).norm() / tensor.norm() < 0.12, name
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    assert config["quantization_config"].get("quant_method") is None  # MLX's: not what ours said before


def test_a_recipe_over_its_own_checkpoint_copies_the_codes(written: dict[str, Path], tmp_path: Path) -> None:
    convert.convert(written["int4"], "int4", tmp_path / "again")
    one, two = (shards.stored_tensors(folder) for folder in (written["int4"], tmp_path / "again"))
    assert one.keys() == two.keys()
    for name, stored in one.items():
        assert torch.equal(stored.read().view(torch.uint8), two[name].read().view(torch.uint8))


def test_quantising_a_quantised_model_packs_anew(written: dict[str, Path]) -> None:
    model = load(written["int8"], quantize="int4")
    stack = model.layers[0].get_submodule("experts").down_proj
    assert isinstance(stack, Packed) and stack.kind == "int4"
    with pytest.raises(InputError, match=r"packed already; load the checkpoint in full precision"):
        quantize_(load(written["int8"]), "int8")


def test_large_parts_are_mapped_not_read(tmp_path: Path) -> None:
    """A weight that is mapped costs no memory until it is looked at, and one that is replaced stays what it was."""
    config = replace(config_of(open_checkpoint(NANO)), hidden_size=256, expert_size=512, num_experts=16)
    model = Model(config, ops.load("fused")).init_()
    save(model, tmp_path / "plain")
    convert.convert(tmp_path / "plain", "int4", tmp_path / "int4")
    held = load_with(tmp_path / "int4", PLAIN).layers[0].get_submodule("experts").gate_up_proj
    assert isinstance(held, Packed) and held.data.nbytes >= 1 << 20
    with Path("/proc/self/maps").open() as maps:
        assert any(str(tmp_path / "int4" / "model.safetensors") in line for line in maps)
    before = held.data.clone()
    convert.convert(tmp_path / "plain", "int8", tmp_path / "int4", force=True)
    assert torch.equal(held.data, before)


# ---- being cut off --------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle (SIGKILL): nothing can be seen of it; the next run keeps the finished shards."""
    script = (
        "import sys, os, signal\nfrom dataclasses import replace\nfrom sfumato.checkpoints import convert, shards\n"
        "write = shards.write_shards\n"
        "convert.write_shards = lambda folder, plan, *a: write(folder, replace(plan, shard_bytes=200_000), *a)\n"
        "def progress(done, total):\n    if done > total // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert.convert('nano', 'int4', {str(tmp_path / 'out')!r}, progress if sys.argv[1] == 'kill' else None)\n"
    )

    def run(how: str) -> int:
        return subprocess.run([sys.executable, "-c", script, how], timeout=120).returncode

    assert run("kill") == -9
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".writing"]
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / ".writing").glob("*.safetensors")}
    assert len(kept) >= 2
    with pytest.raises(CheckpointError):
        load_with(tmp_path / "out", PLAIN)
    time.sleep(0.01)
    assert run("go on") == 0
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert kept.items() <= now.items() and len(now) > len(kept)
    assert not (tmp_path / "out" / ".writing").exists()
    one, two = load(tmp_path / "out"), load("nano", quantize="int4")
    for name, tensor in every_weight(two).items():
        assert torch.equal(every_weight(one)[name], tensor)


def test_what_another_source_left_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    save(load("nano").init_(5), other, tokenizer_from=NANO)
    write = shards.write_shards

    def in_small_shards(folder: Path, plan: shards.PlannedFolder, *rest: Any) -> None:
        write(folder, replace(plan, shard_bytes=200_000), *rest)

    monkeypatch.setattr(convert, "write_shards", in_small_shards)
    progress: list[int] = []

    def stop(done: int, total: int) -> None:
        progress.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert("nano", "int8", tmp_path / "out", stop)
    assert len(list((tmp_path / "out" / ".writing").glob("*.safetensors"))) >= 2
    convert.convert(other, "int8", tmp_path / "out")
    for name, tensor in every_weight(load(other, quantize="int8")).items():
        assert torch.equal(every_weight(load(tmp_path / "out"))[name], tensor)


def test_a_full_disk_leaves_what_was_there(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert("nano", "int8", tmp_path / "out")
    before = every_weight(load(tmp_path / "out"))
    real = shards._write

    def full(file: Any, tensor: Any, progress: Any) -> None:
        if progress.done > 500_000:
            raise OSError(28, "No space left on device")
        real(file, tensor, progress)

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(SfumatoError, match=r"cannot write the checkpoint .*No space left"):
        convert.convert("nano", "int4", tmp_path / "out", force=True)
    for name, tensor in every_weight(load(tmp_path / "out")).items():
        assert torch.equal(before[name], tensor)
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result([0] * 10) and _Usage())
    with pytest.raises(CapacityError, match=r"GB free and .* GB are to be written"):
        convert.convert("nano", "int4", tmp_path / "new")
    assert not (tmp_path / "new").exists()


class _Usage:
    free = 1000


def test_two_at_once_are_one_and_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the first writes is whole, and the second is told so; then the second is told that something is there."""
    for name, to in (("out", "int4"), ("out.gguf", "gguf-q8_0")):
        target = tmp_path / name
        codes: list[int] = []

        def meanwhile(done: int, total: int, target: Path = target, codes: list[int] = codes) -> None:
            if not codes:
                codes.append(
                    main(["convert", "nano", "--to", "gguf-q8_0" if target.suffix else "bf16", "-o", str(target)])
                )

        convert.convert("nano", to, target, meanwhile)
        assert codes == [1]
        assert f"another process is writing {target}; wait until it has ended" in capsys.readouterr().err
        assert main(["convert", "nano", "--to", to, "-o", str(target)]) == 2
        assert " already; give another" in capsys.readouterr().err
        load(target)
    one, two = load(tmp_path / "out"), load("nano", quantize="int4")
    for key, tensor in every_weight(two).items():
        assert torch.equal(every_weight(one)[key], tensor)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.gguf"]


def test_saving_where_another_writes_is_a_sentence(tmp_path: Path) -> None:
    with files.locked(tmp_path / "out"), pytest.raises(SfumatoError, match="another process is writing"):
        save(load("nano"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("mine")
    (target / "model-00001-of-00002.safetensors").write_text("mine too")
    gguf = tmp_path / "it.gguf"
    gguf.write_text("mine")
    there = "holds config.json and 1 more already; give another place, or --force"
    for arguments in (
        ("quantize", "nano", "--to", "int4", "-o", str(target)),
        ("quantize", "nano", "--to", "int4", "-o", str(target), "--calibrate", "nowhere"),
        ("convert", "nano", "--to", "bf16", "-o", str(target)),
        ("convert", "nobody/nothing", "--to", "bf16", "-o", str(target)),
    ):
        code, out, err = say(*arguments, capsys=capsys)
        assert code == 2 and out == "" and there in err
    code, _, err = say("convert", "nano", "--to", "gguf-bf16", "-o", str(gguf), capsys=capsys)
    assert code == 2 and "is there already; give another name, or --force" in err
    assert (target / "config.json").read_text() == gguf.read_text() == "mine" and len(list(target.iterdir())) == 2
    assert say("convert", "nano", "--to", "bf16", "-o", str(target), "--force", capsys=capsys)[0] == 0
    assert say("convert", "nano", "--to", "gguf-bf16", "-o", str(gguf), "--force", capsys=capsys)[0] == 0
    load(target), load(gguf)
    assert not (target / "model-00001-of-00002.safetensors").exists()


def test_only_what_this_very_run_left_is_taken_up_beside_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replacement that was cut off goes on without being asked again; another one does not."""
    convert.convert("nano", "bf16", tmp_path / "out")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert("nano", "int8", tmp_path / "out", stop, force=True)
    with pytest.raises(InputError, match=r"holds chat_template\.jinja and \d more already"):
        convert.convert("nano", "int4", tmp_path / "out")
    convert.convert("nano", "int8", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").format == "Sfumato int8"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int4", "gguf-q8_0"])
def test_kills_at_any_moment_leave_the_old_or_the_new_and_it_goes_on(tmp_path: Path, to: str) -> None:
    """SIGKILL, fifteen times, over a checkpoint that is replaced: what loads is one of the two, and the run after goes
    through. (Between the first and the last of a folder's renames nothing loads: old and new never pass for one.)"""
    target = tmp_path / ("out.gguf" if to.startswith("gguf") else "out")
    old = "gguf-bf16" if to.startswith("gguf") else "bf16"
    script = (
        "import sys\nfrom dataclasses import replace\nfrom sfumato.checkpoints import convert, shards\n"
        "print('ready', flush=True)\n"
        "write = shards.write_shards\n"
        "convert.write_shards = lambda folder, plan, *a: write(folder, replace(plan, shard_bytes=200_000), *a)\n"
        "convert.convert('nano', sys.argv[1], sys.argv[2], force=True)\n"
    )
    expected = {name: every_weight(load(_written(tmp_path / name, name, target.suffix))) for name in (old, to)}
    convert.convert("nano", old, target)
    rng, actual = random.Random(1), set()
    for _ in range(15):
        process = subprocess.Popen([sys.executable, "-c", script, to, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        try:
            now = every_weight(load(target))
        except CheckpointError:
            assert (target / ".writing").exists()
            continue
        (name,) = [name for name, tensors in expected.items() if all(torch.equal(now[k], tensors[k]) for k in tensors)]
        actual.add(name)
    assert actual
    assert subprocess.run([sys.executable, "-c", script, to, str(target)], stdout=subprocess.PIPE).returncode == 0
    now = every_weight(load(target))
    assert all(torch.equal(now[k], tensor) for k, tensor in expected[to].items())
    assert not [file for file in tmp_path.rglob(".*")]


def _written(place: Path, to: str, suffix: str) -> Path:
    place = place.with_name(place.name + suffix)
    convert.convert("nano", to, place)
    return place


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format 'int3' to convert to; choose one of int8, fp8, int4, int4-fp8"):
        convert.convert("nano", "int3", tmp_path / "x")
    with pytest.raises(InputError, match=r"no name for one GGUF file; give a path that ends in \.gguf"):
        convert.convert("nano", "gguf-q8_0", tmp_path / "x")
    with pytest.raises(InputError, match="is what is read"):
        convert.convert(NANO, "int8", NANO)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give a folder"):
        convert.convert("nano", "int8", tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(quant_method="marlin"), "quant_method is marlin; readable are sfumato, compressed-tensors"),
        (lambda c: c.update(quant_method=["sfumato"]), r"quant_method is \['sfumato'\]"),
    ],
)
def test_unknown_methods_are_refused_by_name(
    written: dict[str, Path], tmp_path: Path, change: Any, sentence: str
) -> None:
    for file in written["int4"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence):
        load_with(tmp_path, PLAIN)


def damaged(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a quantised checkpoint with its tensors and metadata changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, target / "model.safetensors", metadata)
    return target


DOWN = "model.decoder.layers.0.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, m: t.pop(f"{DOWN}.scale"), rf"lacks {DOWN}\.scale, which int4 needs"),
        (lambda t, m: t.update({f"{DOWN}.data": torch.zeros(3, dtype=torch.uint8)}), r"is U8 \[3\]; int4 needs U8"),
        (lambda t, m: t.update({f"{DOWN}.scale": t[f"{DOWN}.scale"].float()}), r"is F32 .*; int4 needs BF16"),
        (lambda t, m: m.pop("sfumato.formats"), r"sfumato\.formats cannot be read"),
        (lambda t, m: m.update({"sfumato.formats": "[1]"}), r"sfumato\.formats cannot be read"),
        (lambda t, m: m.update({"sfumato.formats": "[" * 50000}), r"sfumato\.formats cannot be read"),
        (lambda t, m: m.update({"sfumato.formats": json.dumps({DOWN: ["int3", [2, 2]]})}), "no format 'int3'"),
        (lambda t, m: m.update({"sfumato.formats": json.dumps({DOWN: ["int4", [2**62, 2**62]]})}), "int4 needs U8"),
        (lambda t, m: m.update({"sfumato.formats": json.dumps({DOWN: ["int4", [0, -1]]})}), "has the shape"),
    ],
)
def test_damage_is_named(written: dict[str, Path], tmp_path: Path, change: Any, sentence: str) -> None:
    folder = damaged(written["int4"], tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_with(folder, PLAIN)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_stack_is_read_alone(written: dict[str, Path]) -> None:
    entry = open_checkpoint(written["int4"]).entries[DOWN]
    assert entry.packed is not None
    whole = entry.packed(0, entry.shape[0])
    assert torch.equal(entry.packed(1, 3).dense(), whole.dense()[1:3])
    assert torch.equal(entry.read(2, 3), whole.dense()[2:3])
    exact = load("nano").layers[0].get_submodule("experts").down_proj
    assert isinstance(exact, Tensor)
    assert torch.equal(whole.dense(), pack(exact.detach(), "int4").dense())


def test_fp8_in_blocks_is_read_as_it_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stacks and matrices whose sizes no block divides; its group is 128 whatever they are."""
    rules = tuple((pattern, "fp8-block") for pattern, _ in recipes.RECIPES["fp8"].rules)
    monkeypatch.setitem(recipes.RECIPES, "blocks", recipes.Recipe("blocks", rules))
    monkeypatch.setitem(targets.TARGETS, "blocks", "a test's")
    convert.convert("nano", "blocks", tmp_path / "blocks")
    loaded, packed = load(tmp_path / "blocks"), quantize_(load("nano"), "blocks")
    shapes = set()
    for (owner, leaf), (other, _) in zip(products(loaded), products(packed), strict=True):
        actual, expected = getattr(owner, leaf), getattr(other, leaf)
        assert isinstance(actual, Packed) and isinstance(expected, Packed)
        assert (actual.kind, actual.group, actual.shape) == ("fp8", 128, expected.shape) and expected.group == 128
        assert actual.parts.keys() == expected.parts.keys() == {"data", "scale"}
        assert torch.equal(actual.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(actual.scale, expected.scale) and torch.equal(actual.dense(), expected.dense())
        shapes.add(actual.shape)
    for name, entry in open_checkpoint(tmp_path / "blocks").entries.items():
        if entry.packed is not None:
            whole = entry.packed(0, entry.shape[0]).dense()
            assert torch.equal(entry.read(1, entry.shape[0]), whole[1:]), name
    assert {len(shape) for shape in shapes} == {2, 3} and any(size % 128 for shape in shapes for size in shape[-2:])


def test_every_target_has_one_way_to_be_written() -> None:
    ways = [*recipes.RECIPES, *convert._PLANS, *(to for to in targets.TARGETS if to.startswith("gguf-"))]
    assert ways == list(targets.TARGETS)


# ---- with a limit of memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "cpu"])
def test_a_memory_limit_changes_no_answer(written: dict[str, Path], name: str) -> None:
    if name == "cpu":
        from sfumato.ops.cpu import build

        if build.obstacle() is not None:
            pytest.skip(str(build.obstacle()))
    notices: list[str] = []
    whole = LLM.load(written["int4"], ops=name)
    limited = LLM.load(written["int4"], ops=name, memory_limit=1_000_000, notice=notices.append)
    assert (len(notices) == 1 and "pinned host memory" in notices[0]) or "host" in notices[0]
    prompt = [{"role": "user", "content": "Solve"}]
    options = Options(max_tokens=82, max_steps=3, seed=4)
    assert limited.chat(prompt, options=options).tokens == whole.chat(prompt, options=options).tokens
    with pytest.raises(CapacityError, match=r"memory limit is .* give at least"):
        LLM.load(written["int4"], ops=name, memory_limit=1000)


# ---- on the command line --------------------------------------------------------------------------------------------


def say(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_quantize_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two.gguf")
    code, out, _ = say("quantize", "nano", "--to", "int4", "-o", one, capsys=capsys)
    assert code == 0 and out.startswith(f"{one}: 1.70 MB (int4) from 6.31 MB (safetensors)")
    code, out, _ = say("convert", one, "--to", "gguf-q8_0", "-o", two, "--json", capsys=capsys)
    assert code == 0
    record = json.loads(out)
    assert record["from"] == "Sfumato int4" and record["written_bytes"] == Path(two).stat().st_size
    assert say("sudoku", "--random", "--clues", "50", "--seed", "1", "--model", two, capsys=capsys)[0] == 0
    code, _, err = say("quantize", "nano", "--to", "bf16", "-o", one, capsys=capsys)
    assert code == 2 and "there is no recipe 'bf16'; choose one of int8" in err
    code, _, err = say("convert", "nano", "--to", "int4", "-o", two, capsys=capsys)
    assert code == 2 and "is a file; give a folder" in err


def test_quantize_with_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations with answers move the codes, and nearer to what the model says in full precision."""
    digits = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    lines = []
    for shift in range(8):
        answer = "".join(str((int(digit) + shift) % 9 + 1) for digit in digits)
        question = "".join(digit if n % 3 else "0" for n, digit in enumerate(answer))
        turns = [("user", f"Solve this Sudoku:\n{question}"), ("assistant", answer)]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    samples = tmp_path / "samples.jsonl"
    samples.write_text("\n".join(lines))
    out = tmp_path / "out"
    assert (
        say("quantize", "nano", "--to", "int4-small", "-o", str(out), "--calibrate", str(samples), capsys=capsys)[0]
        == 0
    )
    prompt = LLM.load("nano", ops="fused").encode([{"role": "user", "content": "Solve this Sudoku:\n" + digits}])
    ids = torch.tensor([prompt.tokens])

    def logits(model: Model) -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(model.encode(ids, KVCache.allocate(model.config, 1, ids.shape[1])))

    exact, fitted = logits(load("nano")), logits(load(out))
    plain = logits(load("nano", quantize="int4-small"))
    assert (fitted - exact).norm() < 0.8 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"prompt": "x"}\n', r'line 1 has neither a "text" nor "messages"'),
        ("a.jsonl", '{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.txt", " \n\n ", "holds no text"),
    ],
)
def test_samples_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    arguments = ("quantize", "nano", "--calibrate", str(tmp_path / name), "-o", str(tmp_path / "out"))
    code, _, err = say(*arguments, capsys=capsys)
    assert code == 2 and sentence in err and not (tmp_path / "out").exists()
