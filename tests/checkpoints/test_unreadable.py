"""checkpoints/unreadable.py: what is no checkpoint gets one sentence that says what it is and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.locate import resolve
from sfumato.checkpoints.unreadable import begins_oddly, sentence
from sfumato.cli import main
from sfumato.errors import CheckpointError

FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "adapter": (
        {"adapter_config.json": b'{"base_model_name_or_path": "google/x"}', "adapter_model.safetensors": b"x"},
        r"is an adapter \(LoRA\) and no model; load its base with it .*--adapter DIR.* \(its base is google/x\)",
    ),
    "adapter of no base": (
        {"adapter_config.json": b"[", "README.md": b""},
        r"is an adapter .* --adapter DIR --to bf16$",
    ),
    "orbax": (
        {"_CHECKPOINT_METADATA": b"{}", "manifest.ocdbt": b"x", "d/1": b""},
        "is a JAX checkpoint .* safetensors",
    ),
    "Keras": ({"config.json": b"{}", "model.weights.h5": b"x", "task.json": b"{}"}, "holds Keras weights; export"),
    "pickles": (
        {"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"x"},
        "pickled weights, which can run code",
    ),
    "Lightning": ({"last.ckpt": b"x"}, "pickled weights"),
    "Flax": ({"config.json": b"{}", "flax_model.msgpack": b"x"}, "holds Flax weights"),
    "TensorFlow": ({"model.data-00000-of-00001": b"x"}, "holds TensorFlow weights"),
    "sharded": ({"__0_0.distcp": b"x", ".metadata": b"x"}, "sharded state of a training run; gather it"),
    "ONNX": ({"config.json": b"{}", "model.onnx": b"x"}, "compiled for another engine .*; give a folder"),
    "archive": ({"model.tar.gz": b"x"}, "is an archive; unpack it"),
    "download": ({"config.json": b"{}", "model.safetensors.incomplete": b"x"}, "was not finished; fetch it again"),
    "GGUF": (
        {"config.json": b"{}", "m-Q4_K_M.gguf": b"GGUF"},
        r"no safetensors but m-Q4_K_M\.gguf; give the path of one",
    ),
    "weights alone": ({"model.safetensors": b"x"}, r"has weights \(model\.safetensors\) and no config\.json"),
    "other names": ({"config.json": b"{}", "a.safetensors": b"x"}, r"under other names .*a\.safetensors.* no index"),
    "config alone": ({"config.json": b"{}"}, "has a config.json and no weights; `sfumato info` reads that much"),
    "folders": ({"a/x": b"", "b/config.json": b"{}", "args.bin": b""}, r"has folders in it \(b\); give one of these"),
    "other folders": ({f"{name}/x": b"" for name in "abcde"}, r"folders in it \(a, b, c and 2 more\)"),
    "models--owner--name": (
        {"snapshots/0/config.json": b"{}", "refs/main": b"0"},
        "hub's cache of owner/name; give that",
    ),
    "empty": ({}, "is an empty folder; give a folder with config.json and safetensors, or a .gguf file"),
    "nothing known": ({"README.md": b"x"}, r"has no config\.json; give"),
}


@pytest.mark.parametrize("denied", ["model.safetensors", "config.json", "folder"])
def test_what_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, denied: str) -> None:
    """Files and folders of other people, as the system denies them to whoever is not root."""
    usual_open, usual_stat, usual_list = Path.open, os.stat, Path.iterdir

    def is_denied(path: Path | str) -> bool:
        return Path(path).name == denied or (denied == "folder" and Path(path).parent == folder)

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        if is_denied(path):
            raise PermissionError(13, "Permission denied", str(path))
        return usual_open(path, *arguments, **named)

    def stat(path: Any, *arguments: Any, **named: Any) -> Any:
        if denied == "folder" and isinstance(path, str | Path) and is_denied(path):
            raise PermissionError(13, "Permission denied", str(path))
        return usual_stat(path, *arguments, **named)

    def listed(path: Path) -> Any:
        if denied == "folder" and path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return usual_list(path)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Path, "iterdir", listed)
    with pytest.raises(CheckpointError, match=r"(cannot read .*|cannot be read): Permission denied$"):
        open_checkpoint(folder)


def test_links_to_nothing(tmp_path: Path) -> None:
    """As a cache leaves them from which something was deleted."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"links to files that are not there \(model\.safetensors\); fetch"):
        open_checkpoint(tmp_path)


FILES: dict[str, tuple[bytes, str]] = {
    "model.safetensors": (b"x", "is one file of a checkpoint; give the folder that it lies in"),
    "config.json": (b"{}", "is one file of a checkpoint"),
    "pytorch_model.bin": (b"x", "pickled weights"),
    "model.PT": (b"x", "pickled weights"),
    "gemma.keras": (b"PK\x03\x04", "holds Keras weights"),
    "model.onnx": (b"x", "compiled for another engine"),
    "model.zip": (b"PK\x03\x04", "is an archive"),
    "blob": (b"\x89HDF\r\n", "holds Keras weights"),
    "old": (b"tjgg\x01\0\0\0", "is a GGML file from before GGUF; get the model as GGUF"),
    "old-lora": (b"algg\x01\0\0\0", "is a LoRA adapter from before GGUF"),
    "page": (b"<!DOCTYPE html>", "is a web page and no model"),
}


def make(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    files, expected = FOLDERS[name]
    folder = make(tmp_path / name, files)
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder} ") and "\n" not in text and text == sentence(folder)
    assert len(text.removeprefix(str(folder))) < 300


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    for give in (resolve, open_checkpoint):
        with pytest.raises(CheckpointError, match=expected) as caught:
            give(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} ") and "\n" not in str(caught.value)


def test_a_pointer_in_place_of_a_file(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    raw = {"config.json": json.dumps({"model_type": "diffusion_gemma", "text_config": {}}).encode()}
    folder = make(tmp_path / "clone", {**raw, "model.safetensors": pointer, "model.gguf": pointer})
    for path in (folder, folder / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"is a Git LFS pointer .*; run `git lfs pull` there"):
            open_checkpoint(path)


def test_what_is_known_is_not_guessed_at(tmp_path: Path) -> None:
    """A file of no known kind, and one that is not there, are the caller's to name."""
    (tmp_path / "x").write_bytes(b"x")
    assert sentence(tmp_path / "x") is sentence(tmp_path / "none") is begins_oddly(tmp_path / "none") is None


def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "adapter", FOLDERS["adapter"][0])
    for command, says in (
        (["info", str(folder)], "adapter_config.json says peft_type None"),  # `info` describes adapters
        (["convert", str(folder), "--to", "int8", "-o", str(tmp_path / "out")], "is an adapter (LoRA) and no model"),
    ):
        assert main(command) != 0
        assert says in " ".join(capsys.readouterr().err.split())
