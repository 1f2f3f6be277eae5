"""checkpoints/locate.py: folders, files, the hub and its offline cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import make, same

import sfumato
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import resolve
from sfumato.errors import CheckpointError
from sfumato.model.network import Model


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("nano") == Path(sfumato.__file__).parent / "nano"
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder nano"):
        resolve(Path("nano"))
    (tmp_path / "nano").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "file.xyz").touch()
    assert resolve(Path("nano")) == Path("nano")
    assert resolve("owner/name") == Path("owner/name")  # a folder comes before the hub
    with pytest.raises(
        CheckpointError, match=r"file\.xyz is a file of no known kind; give a \.gguf file, or the folder"
    ):
        resolve("file.xyz")
    for path in ("", "none", "a/b/c", "/a/b", "../b", "a/b c", "a/b\n", "~nobody-at-all/x/y", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match="there is no folder"):
            resolve(path)


def test_hub(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **how: Any) -> str:
        calls.append((name, how))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same(load("google/diffusiongemma-26B-A4B-it", PLAIN), model)
    assert resolve("a/b", weights=False) == folder
    assert calls[0][0] == "google/diffusiongemma-26B-A4B-it"
    assert set(calls[0][1]["allow_patterns"]) == {"*.json", "*.jinja", "*.safetensors"}
    assert set(calls[1][1]["allow_patterns"]) == {"*.json", "*.jinja"}
    from huggingface_hub.utils._paths import filter_repo_objects

    names = ["config.json", "a.safetensors", "x/a.safetensors", "a.bin", "a.py", "x.jinja", "x/y.json"]
    assert list(filter_repo_objects(names, **calls[0][1])) == ["config.json", "a.safetensors", "x.jinja"]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error, sentence in (
        (LocalEntryNotFoundError("many\nlines"), "it is not in the cache and the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("one\ntwo"), "ValueError: one two"),
    ):

        def download(*arguments: Any, error: Exception = error, **more: Any) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(CheckpointError, match=f"cannot get a/b from the hub: .*{sentence}") as caught:
            resolve("a/b")
        assert "\n" not in str(caught.value)


def test_offline_cache(folder: Path, tmp_path: Path) -> None:
    """The hub's real cache layout, HF_HUB_OFFLINE set: found without a network; what is not there is one sentence."""
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    script = (
        "from sfumato.checkpoints.load import PLAIN, load\n"
        "from sfumato.errors import CheckpointError\n"
        "print(len(load('owner/name', PLAIN).state_dict()))\n"
        "try: load('owner/other', PLAIN)\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        str(len(make().state_dict())),
        "cannot get owner/other from the hub: it is not in the cache and the hub cannot be reached",
    ]
    assert out.stderr == ""
