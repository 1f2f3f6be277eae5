"""checkpoints/locate.py: folders, files, the hub and its offline cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_split
from small_checkpoints import make, same

import sfumato
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats.gguf_writer import write_gguf
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


# ---- GGUF files, in folders and on the hub --------------------------------------------------------------------------


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """The small model as one GGUF file."""
    write_gguf(open_checkpoint(folder), tmp_path / "it.gguf", "BF16")
    return tmp_path / "it.gguf"


def test_a_folder_of_ggufs(folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "ggufs"
    (place / "BF16").mkdir(parents=True)
    assert resolve(place) == place  # and what lacks there, who opens it says
    for name in ("x-Q4_K_M.gguf", "mmproj-x-F16.gguf", "config.json"):
        (place / name).touch()
    assert resolve(place) == resolve(f"{place}:q4_k_m") == resolve(place / "x-Q4_K_M.gguf") == place / "x-Q4_K_M.gguf"
    parts = write_split(file, place / "BF16", "x-BF16", 3)
    with pytest.raises(
        CheckpointError, match=r"holds 2 models: BF16/x-BF16\.gguf, x-Q4_K_M\.gguf; name one, as .*:BF16"
    ):
        resolve(place)
    assert resolve(f"{place}:BF16") == resolve(f"{place}:x-bf16") == parts[0]
    assert open_checkpoint(resolve(f"{place}:x-BF16-00002-of-00003.gguf")).format == "GGUF"
    with pytest.raises(CheckpointError, match=r"holds no GGUF 'Q8_0'; it has BF16/x-BF16\.gguf, x-Q4_K_M\.gguf"):
        resolve(f"{place}:Q8_0")
    (place / "model.safetensors").touch()
    assert resolve(place) == place and resolve(f"{place}:BF16") == parts[0]
    with pytest.raises(CheckpointError, match="holds no GGUF file of a model"):
        resolve(f"{folder}:Q4_K_M")
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(f"{place}/none:Q4_K_M")


def test_a_gguf_of_any_name(file: Path, tmp_path: Path) -> None:
    """Other programs keep it under its hash."""
    blob = tmp_path / "sha256-0123"
    file.rename(blob)
    assert resolve(blob) == blob and open_checkpoint(resolve(blob)).format == "GGUF"
    upper = tmp_path / "It.GGUF"
    blob.rename(upper)
    assert open_checkpoint(resolve(str(upper))).path == upper


class Hub:
    """A repository, and what is fetched of it."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root, self.names, self.is_offline = root, list(names), False
        self.fetched: list[str] = []

    def list_repo_files(self, name: str) -> list[str]:
        assert name == "owner/name"
        if self.is_offline:
            raise ConnectionError("no net")
        return self.names

    def snapshot_download(
        self,
        name: str,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        for one in self.names if not self.is_offline and not local_files_only else ():
            if any(fnmatch(one, pattern) for pattern in allow_patterns) and not (ignore_patterns and "/" in one):
                (self.root / one).parent.mkdir(parents=True, exist_ok=True)
                (self.root / one).touch()
                self.fetched.append(one)
        return str(self.root)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """A hub with one repository of these files."""

    def of(*names: str) -> Hub:
        hub = Hub(tmp_path / "snapshot", names)
        monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
        return hub

    return of


SPLIT = [f"Q8_0/x [v1]-Q8_0-{at:05}-of-00002.gguf" for at in (1, 2)]


def test_a_hub_id_of_ggufs(hub: Callable[..., Hub], tmp_path: Path) -> None:
    there = hub("README.md", "params.json", "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "mmproj-F16.gguf", "imatrix.gguf", *SPLIT)
    assert resolve("owner/name:q4_k_m") == tmp_path / "snapshot" / "x-Q4_K_M.gguf"
    assert there.fetched == ["params.json", "x-Q4_K_M.gguf"]
    assert resolve("owner/name:Q8_0") == tmp_path / "snapshot" / SPLIT[0]
    assert there.fetched[2:] == ["params.json", *SPLIT]
    assert resolve("owner/name:x-Q4_K_S.gguf") == tmp_path / "snapshot" / "x-Q4_K_S.gguf"
    with pytest.raises(
        CheckpointError, match=r"owner/name holds 3 models: .*x-Q4_K_S\.gguf; name one, as owner/name:Q8_0"
    ):
        resolve("owner/name")
    with pytest.raises(
        CheckpointError, match=r"owner/name holds no GGUF 'Q4_K'; it has Q8_0/x \[v1\]-Q8_0\.gguf, x-Q4"
    ):
        resolve("owner/name:Q4_K")


def test_a_hub_id_of_one_gguf(hub: Callable[..., Hub], tmp_path: Path) -> None:
    there = hub("README.md", "mmproj-F16.gguf", *SPLIT)
    with pytest.raises(CheckpointError, match=r"holds its description within; get it first: sfumato pull owner/name:x"):
        resolve("owner/name", weights=False)
    assert there.fetched == []
    assert resolve("owner/name") == resolve("owner/name", weights=False) == tmp_path / "snapshot" / SPLIT[0]
    assert there.fetched == SPLIT
    there.is_offline = True
    assert resolve("owner/name") == resolve("owner/name:q8_0") == tmp_path / "snapshot" / SPLIT[0]
    with pytest.raises(CheckpointError, match=r"owner/name holds no GGUF 'Q4_0'; it has Q8_0/x"):
        resolve("owner/name:Q4_0")


def test_a_hub_id_of_both(hub: Callable[..., Hub], tmp_path: Path) -> None:
    there = hub("config.json", "model.safetensors", "x-Q4_0.gguf")
    assert resolve("owner/name") == tmp_path / "snapshot"
    assert there.fetched == ["config.json", "model.safetensors"]
    assert resolve("owner/name:Q4_0") == tmp_path / "snapshot" / "x-Q4_0.gguf"
    assert "x-Q4_0.gguf" in there.fetched


def test_offline_cache_of_parts(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own library on its own layout: names are links, and what they lead to has no name."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    for place in (cache / "refs", cache / "blobs", snapshot / "BF16"):
        place.mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    for at, part in enumerate(write_split(file, snapshot / "BF16", "x-BF16", 2)):
        blob = part.rename(cache / "blobs" / f"{at:064}")
        part.symlink_to(os.path.relpath(blob, part.parent))
    for name in ("owner/name", "owner/name:bf16", "owner/name:x-BF16-00002-of-00002.gguf"):
        assert len(open_checkpoint(resolve(name)).entries) == len(make().state_dict())
    with pytest.raises(CheckpointError, match=r"owner/name holds no GGUF 'Q4_0'; it has BF16/x-BF16\.gguf"):
        resolve("owner/name:Q4_0")
    with pytest.raises(CheckpointError, match="cannot get owner/other from the hub: it is not in the cache"):
        resolve("owner/other:Q4_0")
