"""cli/hub.py, pull.py, listing.py, rm.py: a hub's cache with models of ours and of others."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from sfumato import cli
from sfumato.checkpoints.locate import NANO
from sfumato.cli import hub, loading, pull

Capture = pytest.CaptureFixture[str]
Fetched = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def fetch(cache: Path) -> Fetched:
    """Puts a model into the cache as the hub's library lays it out: blobs, and links to them in a snapshot."""

    def put(name: str, **files: bytes) -> Path:
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "abc123"
        for part in (folder / "refs", folder / "blobs", snapshot):
            part.mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc123")
        for number, (file, content) in enumerate(files.items()):
            (folder / "blobs" / str(number)).write_bytes(content)
            os.symlink(f"../../blobs/{number}", snapshot / file.replace("_DOT_", "."))
        return folder

    return put


@pytest.fixture
def cached(fetch: Fetched) -> None:
    """One model of each kind: ours in three formats, one without weights, two of others, one that is damaged."""
    config = {"model_type": "diffusion_gemma", "dtype": "bfloat16"}
    mlx = config | {"quantization": {"bits": 4, "group_size": 64}}
    awq = config | {"quantization_config": {"quant_method": "awq"}}
    fetch("b/plain", config_DOT_json=json.dumps(config).encode(), model_DOT_safetensors=b"x" * 3_000_000)
    fetch("a/mlx", config_DOT_json=json.dumps(mlx).encode(), model_DOT_safetensors=b"x")
    fetch("a/awq", config_DOT_json=json.dumps(awq).encode())
    head = b"GGUF\x03\0\0\0general.architecture\x08\0diffusion-gemma"
    fetch("c/one--two", **{"model-Q4_K_M_DOT_gguf": head})
    fetch("d/llama", config_DOT_json=b'{"model_type": "llama"}', model_DOT_safetensors=b"x")
    fetch("d/llama-gguf", **{"model-Q4_K_M_DOT_gguf": b"GGUF\x03\0\0\0general.architecture llama"})
    fetch("e/broken", config_DOT_json=b"\xff{")
    (hub.cache_folder() / "datasets--x--y").mkdir()
    (hub.cache_folder() / "models--f--empty" / "snapshots").mkdir(parents=True)


def test_list_shows_what_can_be_used(cached: None, capsys: Capture) -> None:
    assert cli.main(["list", "--json"]) == 0
    records = {record["id"]: record for record in json.loads(capsys.readouterr().out)}
    assert list(records) == ["nano", "nano-decide", "nano-skills", "a/awq", "a/mlx", "b/plain", "c/one--two"]
    formats = {name: record["format"] for name, record in records.items()}
    assert formats == {
        **{
            "nano": "float32",
            "nano-decide": "float32",
            "nano-skills": "float32",
            "a/awq": "awq",
            "a/mlx": "MLX 4 bits",
            "b/plain": "bfloat16",
        },
        "c/one--two": "GGUF Q4_K_M",
    }
    assert records["b/plain"]["size_bytes"] > 3_000_000 and not records["a/awq"]["is_whole"]
    assert records["nano"]["path"] == str(NANO)
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "b/plain" in out and "3.0 MB" in out and "configuration only" in out and "llama" not in out


def test_the_shell_is_offered_the_same_models(cached: None) -> None:
    assert loading.known_models("") == ["nano", "nano-decide", "nano-skills", "a/awq", "a/mlx", "b/plain", "c/one--two"]
    assert loading.known_models("b") == ["b/plain"]


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert loading.known_models("") == ["nano", "nano-decide", "nano-skills"]


def test_rm_removes_one_model_of_the_cache(cached: None, cache: Path, capsys: Capture) -> None:
    (cache / ".locks" / "models--b--plain").mkdir(parents=True)
    before = sorted(path.name for path in cache.iterdir())
    assert cli.main(["rm", "b/plain", "--yes"]) == 0
    assert capsys.readouterr().out == "removed b/plain, 3.0 MB\n"
    assert sorted(path.name for path in cache.iterdir()) == [name for name in before if name != "models--b--plain"]
    assert not (cache / ".locks" / "models--b--plain").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nano", "inside the package"),
        ("nano-decide", "inside the package"),
        ("b/plain", "give --yes"),
        ("d/llama", "no model that Sfumato reads"),
        ("g/none", "has no g/none"),
        (".", "has no ."),
        ("../../d/llama", "has no ../../d/llama"),
        ("b--plain", "has no b--plain"),
    ],
)
def test_rm_touches_nothing_else(
    name: str, part: str, cached: None, cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal: nobody is asked
    before = sorted(cache.rglob("*"))
    yes = [] if name == "b/plain" else ["--yes"]
    assert cli.main(["rm", name, *yes]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1 and sorted(cache.rglob("*")) == before


def test_rm_leaves_a_folder_that_the_cache_only_points_to(
    cache: Path, tmp_path: Path, fetch: Fetched, capsys: Capture
) -> None:
    folder = fetch("b/own", config_DOT_json=b'{"model_type": "diffusion_gemma"}')
    folder.rename(tmp_path / "mine")
    folder.symlink_to(tmp_path / "mine")
    assert cli.main(["rm", "b/own", "--yes"]) == 1
    assert "cannot remove" in capsys.readouterr().err and (tmp_path / "mine" / "refs").exists()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 1), ("no\n", 1)])
def test_rm_asks_on_a_terminal(
    answer: str, code: int, cached: None, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stdin = io.StringIO(answer)
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["rm", "a/mlx"]) == code
    assert (cache / "models--a--mlx").exists() == bool(code) and "Remove it?" in capsys.readouterr().out


def test_pull_says_what_came_and_where(fetch: Fetched, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    folder = fetch("b/plain", config_DOT_json=b"{}", model_DOT_safetensors=b"x" * 2_000_000)
    snapshot = folder / "snapshots" / "abc123"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(snapshot))
    assert cli.main(["pull", "b/plain"]) == 0
    assert capsys.readouterr().out == f"b/plain: 2.0 MB in {snapshot}\nsfumato run b/plain\n"
    assert cli.main(["pull", "b/plain", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {"id": "b/plain", "path": str(snapshot), "size_bytes": 2_000_002}


def test_a_split_file_is_all_its_parts(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n.gguf"]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in pull.files_of(tmp_path / names[0])] == names[:2]
    assert pull.files_of(tmp_path / "n.gguf") == [tmp_path / "n.gguf"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nano", "inside the package"),
        ("nano-decide", "inside the package"),
        (".", "is a file or folder here"),
        ("plain", "is no hub id"),
        ("a/b/c", "is no hub id"),
        ("a/b:", "is no hub id"),
    ],
)
def test_pull_fetches_hub_ids_alone(name: str, part: str, cache: Path, capsys: Capture) -> None:
    assert cli.main(["pull", name]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1
