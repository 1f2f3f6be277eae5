"""pyproject.toml, MANIFEST.in: the wheel, alone in a fresh environment, and the source distribution that builds it.

The fresh environment finds torch and the other dependencies in the site-packages of this one, by a plain path, so that
this environment's own (editable) Sfumato stays out of it. Nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from pathlib import Path

import pytest

import sfumato

ROOT = Path(__file__).parents[1]
PUZZLE = "534678912672195348198342567859761423426853791713924856961537284287419635345286170"
"""One blank: the last cell is 9."""

NOT_PYTHON = {".cpp", ".h", ".json", ".typed", ".jinja", ".md", ".safetensors", ".js", ".css", ".html", ".svg"}
"""The suffixes of the package's data."""


def run(*command: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """A command's output; the test fails with its errors where it does."""
    process = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def sources(folder: Path) -> Path:
    """What is built from: the package and the files beside it that a build reads, copied."""
    folder.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "sfumato", folder / "sfumato", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return folder


def tracked() -> list[str]:
    """The files of the repository, as git knows them; what is not committed yet too."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout, which says what the repository holds")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def build(kind: str, folder: Path, target: Path) -> Path:
    """Build a "wheel" or an "sdist" as a front end does, with the setuptools that is here."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-W", "ignore", "-c", code, cwd=folder)
    (path,) = target.iterdir()
    return path


def names_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", sources(folder / "source"), folder / "dist")


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and nothing else; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    binaries = folder / "venv" / "bin"
    install = ("-m", "pip", "--python", binaries / "python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=folder)
    site = run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path in a .pth is appended as it is: a .pth file that lies there, such as an editable install's, has no effect.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return binaries


def surroundings(binaries: Path, path: str, cache: str | None = None) -> dict[str, str]:
    """The environment of a command in the fresh installation, with this PATH and this cache folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PATH": f"{binaries}{os.pathsep}{path}", "OMP_NUM_THREADS": "1"}
    return environment | ({} if cache is None else {"XDG_CACHE_HOME": cache})


def solve(binaries: Path, path: str, folder: Path, cache: str | None = None) -> None:
    environment = surroundings(binaries, path, cache)
    answer = run(binaries / "sfumato", "sudoku", PUZZLE, "--seed", "1", cwd=folder, environment=environment)
    board, _, rest = answer.rpartition("solved in ")
    assert "".join(filter(str.isdigit, board)) == PUZZLE[:-1] + "9" and "steps" in rest


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "sfumato"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name and not name.endswith(".pyc")}
    assert {Path(name).suffix for name in expected} == {".py", *NOT_PYTHON}
    information = f"sfumato-{sfumato.__version__}.dist-info"
    assert {name for name in names_of(wheel) if not name.startswith(information)} == expected
    about = {name.removeprefix(f"{information}/") for name in names_of(wheel) if name.startswith(information)}
    assert about == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


def test_the_version_has_one_place(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"sfumato-{sfumato.__version__}.dist-info/METADATA"))
    assert metadata["Version"] == sfumato.__version__
    labels = {line.partition(",")[0] for line in metadata.get_all("Project-URL", [])}
    assert labels == {"Repository", "Documentation", "Changelog", "Issues"}


def test_the_sdist_holds_the_repository_and_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    names = tracked()
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    sdist = build("sdist", tmp_path / "source", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(names) - files == {".gitignore"}
    extra = {name for name in files - set(names) if not name.startswith("sfumato.egg-info/")}
    assert extra == {"PKG-INFO", "setup.cfg"}
    again = build("wheel", folder, tmp_path / "dist")
    assert again.name == wheel.name and names_of(again) == names_of(wheel)
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        # The record lists what the others are extra of, the metadata among them.
        assert all(one.read(name) == other.read(name) for name in names_of(wheel))


WHERE = "import sfumato; print(sfumato.__file__, sfumato.__version__)"


def test_a_clone_of_the_same_name_does_not_hide_an_installed_package(fresh: Path, tmp_path: Path) -> None:
    """A folder `sfumato` beside the program is no package, and one that is installed comes before it."""
    (tmp_path / "sfumato" / "sfumato").mkdir(parents=True)
    (tmp_path / "sfumato" / "pyproject.toml").touch()
    place = run(fresh / "python", "-c", WHERE, cwd=tmp_path, environment=surroundings(fresh, os.environ["PATH"]))
    assert place.startswith(str(fresh.parent))


def test_a_clone_of_the_same_name_does_not_hide_an_editable_install_of_itself(tmp_path: Path) -> None:
    """What `make setup` does, in a clone called sfumato, and then `import sfumato` in the folder that holds it."""
    clone = sources(tmp_path / "sfumato")
    editable = build("editable", clone, tmp_path / "dist")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    site = Path(
        run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    environment = surroundings(binaries, os.environ["PATH"])
    for folder in (tmp_path, clone):
        place = run(binaries / "python", "-c", WHERE, cwd=folder, environment=environment)
        assert place.split()[0] == str(clone / "sfumato" / "__init__.py")
    assert run(binaries / "python", "-m", "sfumato", "--version", cwd=tmp_path, environment=environment)


def test_the_wheel_alone_solves_a_sudoku_without_a_compiler(fresh: Path, tmp_path: Path) -> None:
    code = "import sfumato, shutil; print(sfumato.__file__, shutil.which('g++'))"
    nowhere = surroundings(fresh, str(tmp_path))
    place = run(fresh / "python", "-c", code, cwd=tmp_path, environment=nowhere)
    assert place.startswith(str(fresh.parent)) and place.endswith(" None\n")
    solve(fresh, str(tmp_path), tmp_path, cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache" / "sfumato").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_wheel_alone_solves_a_sudoku_with_a_compiler(fresh: Path, tmp_path: Path) -> None:
    """The library that it compiles is the one that this machine keeps, where an earlier test has built it."""
    solve(fresh, os.environ["PATH"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_wheel_alone_compiles_its_operations(fresh: Path, tmp_path: Path) -> None:
    solve(fresh, os.environ["PATH"], tmp_path, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "sfumato").glob("cpu-*.so"))


CONSUMER = '''
"""A program of a user who checks types strictly."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from sfumato import LLM, Chat, Commit, Complete, Completion, Decisions, Done, Draft, Edited, Event, Fill, Filled
from sfumato import InputError, LanguageModel, LoadOptions, Options, Remote, SfumatoError, Slot, Usage
from sfumato.options import LOAD_OPTIONS, OPTIONS, Option


def answer(llm: LLM, question: str) -> str:
    options = Options(max_tokens=40, stop=("END",), seed=1)
    completion: Completion = llm.chat([{"role": "user", "content": question}], options=options)
    completion = llm.chat(question, options={"max_tokens": 5}, seed=1, stop="END", choices=["a", "b"])
    completion = llm.run(Chat({"role": "user", "content": question}))
    usage: Usage = completion.usage
    return f"{completion.text} ({usage.tokens_per_pass:.1f} tokens a pass)"


def texts(events: Iterator[Event]) -> Iterator[str]:
    for event in events:
        match event:
            case Draft():
                yield f"{event.step}: {event.text}"
            case Commit() | Done():
                yield event.text


def templates(llm: LLM) -> tuple[Filled, Edited, Decisions]:
    filled = llm.fill(["Seats: ", Slot("seats", regex="[1-9]")], "Ticket: ")
    edited = llm.edit("one two", spans=[(0, 3)])
    return filled, edited, llm.decide("Red or blue?", {"colour": ["red", "blue"]})


def completions(llm: LLM) -> list[Completion]:
    return llm.complete(["one", "two"])


async def awaited(model: LanguageModel) -> list[Completion]:
    events: AsyncIterator[Event] = model.astream(Complete("one"))
    async for event in events:
        print(event.row)
    filled: Filled = await model.arun(fill())
    first: Completion = await model.achat(str(filled), max_tokens=5)
    return [first, await model.acomplete("two", options=Options(seed=1)), *model.chat_many(["a", "b"])]


def fill() -> Fill:
    return Fill(["a", Slot("b"), {"name": "c"}], "Ticket: ")


def closed(url: str) -> str:
    with LLM.load("nano", progress=False) as llm, LLM.connect(url) as remote:
        other: Remote = remote
        asyncio.run(awaited(other))
        return repr(llm)


def kinds() -> dict[str, type]:
    declared: dict[str, Option] = {**OPTIONS, **LOAD_OPTIONS}
    return {name: option.kind for name, option in declared.items()}


def main() -> int:
    try:
        print(answer(LLM.load("nano", dtype="float32"), "?"), LoadOptions(model="nano"))
    except InputError as error:
        print(error.option)
    except SfumatoError as error:
        return len(str(error))
    return 0
'''

WRONG = """
from sfumato import LLM, Options

Options(max_tokens="many")
LLM.load("nano").chat("?", max_new_tokens=5)
answer: int = LLM.load("nano").chat([{"role": "user", "content": "?"}]).text
"""


def mypy(fresh: Path, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    # The dependencies' types are not read, which would take a minute: Sfumato's are what is tested.
    others = "[mypy-torch.*,numpy.*,jinja2.*,tokenizers.*,safetensors.*,huggingface_hub.*,llguidance.*]"
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{others}\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(fresh / "python"), "program.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_strictly_typed_program_passes(fresh: Path, tmp_path: Path) -> None:
    checked = mypy(fresh, tmp_path, CONSUMER)
    assert (checked.stdout, checked.returncode) == ("Success: no issues found in 1 source file\n", 0)
    checked = mypy(fresh, tmp_path, WRONG)
    assert checked.returncode == 1 and checked.stdout.count("error:") == 3
    assert all(f"[{kind}]" in checked.stdout for kind in ("arg-type", "call-arg", "assignment"))
