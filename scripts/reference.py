#!/usr/bin/env python3
"""Writes what the pages say of the code: docs/reference.md, and the parts of other pages between markers.

    .venv/bin/python scripts/reference.py           # writes
    .venv/bin/python scripts/reference.py --check   # writes nothing; exit code 1 where a page is not what it would be

docs/reference.md comes from the signatures and docstrings of the public names. In the other pages, a part between
`<!-- reference: NAME -->` and `<!-- /reference -->` is written anew: tables of options from their declarations and from
the bodies of the server's routes, the rows of tests/test_layering.py, and the number of lines of the files in the tour.
Sources are read, so that it needs no torch; only the options and the bodies are imported, which need none. It lacks on
purpose a documentation generator: the pages are read where they lie.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sfumato.constraints.values.formats import FORMAT_PATTERNS, WHOLE_FORMATS  # noqa: E402
from sfumato.options import FALLBACK_DEFAULTS, LOAD_OPTIONS, OPTIONS, Option  # noqa: E402
from sfumato.server.anthropic.bodies import MessagesRequest  # noqa: E402
from sfumato.server.canvas.bodies import DecisionsRequest, EditRequest, FillRequest, InfillRequest  # noqa: E402
from sfumato.server.http.bodies import Body  # noqa: E402
from sfumato.server.openai.bodies import ChatRequest, CompletionRequest  # noqa: E402
from sfumato.server.openai.items import ResponsesRequest  # noqa: E402
from sfumato.server.openai.unread import CHAT_NEUTRAL, CHAT_UNREAD, NEUTRAL, RESPONSES_NEUTRAL, RESPONSES_UNREAD  # noqa: E402

DOCS = ROOT / "docs"
PAGE = DOCS / "reference.md"
TOUR = DOCS / "tour.md"

WIDTH = 100
"""Columns of a signature on one line."""

RESULTS = ("Completion", "Filled", "Edited", "Decision", "Decisions", "Scored", "ScoredToken", "TokenCount")
QUERIES = ("Complete", "Chat", "Infill", "Edit", "Fill", "Decide", "Likelihood", "CountTokens")

SECTIONS: dict[str, tuple[str, list[str]]] = {
    "The model": (
        "`from sfumato import LLM`. Text in, text out. `LLM` and `Remote` are both a `LanguageModel`: what "
        "it offers, both do.",
        ["sfumato.templates.interface.LanguageModel", "sfumato.llm.LLM"],
    ),
    "Presets": (
        "Options in a file: `from sfumato import Preset`. [commands.md](commands.md#your-defaults) has an example.",
        ["sfumato.presets.Preset"],
    ),
    "Templates": ("`from sfumato import Slot`.", ["sfumato.templates.slots.Slot"]),
    "Questions": (
        "What `decide` asks: `from sfumato import Noul, Choice, …`. [decisions.md](decisions.md) is their page.",
        [f"sfumato.questions.{name}" for name in ("Noul", "Choice", "Score", "Span")],
    ),
    "Events": (
        "What `stream` yields, and what every event belongs to. `from sfumato import Draft, Commit, Done, Usage`; "
        "`Event` is any of the first three.",
        ["sfumato.events.Draft", "sfumato.events.Commit", "sfumato.events.Done", "sfumato.events.Usage"],
    ),
    "Results": (
        "What the other methods return. `from sfumato import Completion, Filled, …`.",
        [f"sfumato.events.{name}" for name in RESULTS],
    ),
    "Queries": (
        "What is asked of a model, as values to keep, compare and send: `from sfumato import Chat, Complete, …`. "
        "`run` and `arun` carry out any of them.",
        [f"sfumato.templates.requests.{name}" for name in QUERIES],
    ),
    "A model behind a URL": ("`LLM.connect(url)` makes one.", ["sfumato.remote.Remote"]),
    "Errors": (
        "`from sfumato import SfumatoError, …`. A command ends with exit code 2 for an `InputError`, else with 1.",
        [
            f"sfumato.errors.{name}"
            for name in (
                *("SfumatoError", "InputError", "CheckpointError", "CapacityError", "BusyError"),
                *("NumericError", "WorkerError"),
            )
        ],
    ),
}
"""Heading -> (what stands under it, the classes in order)."""


Function = ast.FunctionDef | ast.AsyncFunctionDef

# ---- the reference page ----------------------------------------------------------------------------------------------


def page() -> str:
    """docs/reference.md."""
    parts = [
        "# Reference",
        "The public names, from their signatures and docstrings. `scripts/reference.py` writes this page; "
        "[tour.md](tour.md) explains how the parts work together.",
    ]
    for heading, (line, names) in SECTIONS.items():
        parts += [f"## {heading}", line]
        parts += [part for name in names for part in class_parts(name)]
        if heading == "The model":
            parts += ["## How to generate", *record_parts("sfumato.options.Options", OPTIONS)]
            parts += ["## How to load", *record_parts("sfumato.options.LoadOptions", LOAD_OPTIONS)]
    return "\n\n".join(parts) + "\n"


def class_parts(name: str) -> list[str]:
    """A class: its signature, docstring, attributes and methods, as paragraphs."""
    module, _, last = name.rpartition(".")
    node = class_of(module, last)
    parts = [f"### {last}", text_of(node)]
    bases = [base for base in node.bases if isinstance(base, ast.Subscript) and ast.unparse(base.value) == "QueryFor"]
    parts += [f"It ends with `{ast.unparse(base.slice)}`." for base in bases]
    if fields := fields_of(node):
        parts.append("\n".join(fields))
    methods = [member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)]
    for method in methods:
        is_shown = method.name[0] != "_" or (method.name == "__init__" and not is_record(node))
        if not is_shown or decorators_of(method) & {"overload", "setter"}:
            continue
        forms = [other for other in methods if other.name == method.name and "overload" in decorators_of(other)]
        if "property" in decorators_of(method):
            kind = ast.unparse(method.returns or ast.Constant(None))
            parts.append(" – ".join(filter(None, [f"`{method.name}: {kind}`", text_of(method)])))
            continue
        owner = last if method.name == "__init__" or "classmethod" in decorators_of(method) else ""
        parts.append("```python\n" + "\n".join(signature(form, owner) for form in forms or [method]) + "\n```")
        if ast.get_docstring(method):
            parts.append(text_of(method))
    return [part for part in parts if part]


def record_parts(name: str, options: Mapping[str, Option]) -> list[str]:
    """A record of options: its docstring, and its table."""
    module, _, last = name.rpartition(".")
    return [f"### {last}", text_of(class_of(module, last)), option_table(options.values())]


@cache
def module_tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def class_of(module: str, name: str) -> ast.ClassDef:
    """The class of this name, as its source says it."""
    return next(node for node in module_tree(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def decorators_of(node: Function | ast.ClassDef) -> set[str]:
    names = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
    return {name.rpartition(".")[2] for name in names}


def is_record(node: ast.ClassDef) -> bool:
    return "dataclass" in decorators_of(node)


def text_of(node: Function | ast.ClassDef) -> str:
    """The docstring, wrapped as it is."""
    return ast.get_docstring(node) or ""


def fields_of(node: ast.ClassDef) -> list[str]:
    """The fields of a record, or the described attributes of a class, as lines of a list."""
    bodies = [node.body]
    if not is_record(node):
        functions = (member for member in node.body if isinstance(member, ast.FunctionDef))
        bodies = [function.body for function in functions if function.name == "__init__"]
    lines = []
    for body in bodies:
        for member, following in zip(body, [*body[1:], None], strict=True):
            sentence = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                sentence = " – " + " ".join(str(following.value.value).split())
            match member:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=value) if name[0] != "_":
                    default = "" if value is None else f" = {default_of(value)}"
                    lines.append(f"- `{name}: {ast.unparse(kind)}{default}`{sentence}")
                case ast.AnnAssign(target=ast.Attribute(attr=name)) | ast.Assign(targets=[ast.Attribute(attr=name)]):
                    if sentence and name[0] != "_":
                        lines.append(f"- `{name}`{sentence}")
    return lines


def default_of(value: ast.expr) -> str:
    """A field's default; field(default_factory=list) is []."""
    text = ast.unparse(value)
    factories = {"field(default_factory=list)": "[]", "field(default_factory=dict)": "{}"}
    return factories.get(text, text)


def signature(node: Function, owner: str) -> str:
    """`name(parameters) -> result`, without self; on several lines where it is long."""
    arguments = node.args
    name = node.name
    if owner and name == "__init__":
        name, result = owner, ""
    else:
        name, result = f"{owner}.{name}" if owner else name, f" -> {ast.unparse(node.returns)}" if node.returns else ""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(plain, defaults, strict=True))
    if plain and plain[0].arg in ("self", "cls"):
        pairs = pairs[1:]
    words = [parameter(argument, default) for argument, default in pairs]
    if arguments.vararg:
        words.append(f"*{parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        words.append("*")
    words += [parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        words.append(f"**{parameter(arguments.kwarg, None)}")
    name = f"async {name}" if isinstance(node, ast.AsyncFunctionDef) else name
    line = f"{name}({', '.join(words)}){result}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + ("" if default is None else f" = {ast.unparse(default)}")


# ---- options ---------------------------------------------------------------------------------------------------------


def option_table(options: Iterable[Option]) -> str:
    """A table of options: their values, defaults and sentences."""
    lines = ["| option | values | default | what it does |", "| --- | --- | --- | --- |"]
    for option in options:
        cells = [f"`{option.name}`", values_of(option), default_in_words(option), option.about.sentence]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def values_of(option: Option) -> str:
    """What an option can be: its choices, or its type and range."""
    if option.choices:
        return " or ".join(f"`{choice}`" for choice in option.choices)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", tuple: "texts"}
    words[dict] = "a JSON Schema, or true" if option.name == "schema" else "numbers by token id"
    words[Mapping] = "folders by name"
    kind = words[option.kind]
    return f"{kind} {option.range}".strip()


def default_in_words(option: Option) -> str:
    if option.name in FALLBACK_DEFAULTS:
        return f"the checkpoint's, else {FALLBACK_DEFAULTS[option.name]}"
    if option.default is None or option.default == ():
        return "none"
    return str(option.default).lower() if isinstance(option.default, bool) else f"{option.default}"


def options_block(words: list[str]) -> str:
    """`options all`, or the names of some, or `options load`."""
    if words == ["load"]:
        return option_table(LOAD_OPTIONS.values())
    return option_table(OPTIONS[name] for name in (OPTIONS if words == ["all"] else words))


ROUTES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/infill": InfillRequest,
    "/v1/edit": EditRequest,
    "/v1/fill": FillRequest,
    "/v1/decisions": DecisionsRequest,
}
"""Route -> its body."""


def routes_block(words: list[str]) -> str:
    """Which options each route of the server takes under their own names: those that its body has a field for.

    A field of any type (`only` in openai/bodies.py) is there to be refused, and sets nothing."""
    routes: dict[tuple[str, ...], list[str]] = {}
    for route, body in ROUTES.items():
        fields = {info.alias or name for name, info in body.model_fields.items() if info.annotation is not Any}
        routes.setdefault(tuple(name for name in OPTIONS if name in fields), []).append(route)
    lines = ["| route | options |", "| --- | --- |"]
    for names, paths in routes.items():
        missing = [name for name in OPTIONS if name not in names]
        is_short = len(missing) < len(names)
        text = ", ".join(f"`{name}`" for name in (missing if is_short else names))
        lines.append(f"| {', '.join(f'`{path}`' for path in paths)} | {'all but ' if is_short else ''}{text} |")
    return "\n".join(lines)


def unread_block(words: list[str]) -> str:
    """What OpenAI's routes leave out, by the reason why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (CHAT_UNREAD | RESPONSES_UNREAD).items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines = ["| left out | because |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items())])


def neutral_block(words: list[str]) -> str:
    """What OpenAI's routes refuse, unless its value asks for nothing."""
    lines = ["| field | may be null, or |", "| --- | --- |"]
    for name, values in sorted((RESPONSES_NEUTRAL | CHAT_NEUTRAL | NEUTRAL).items()):
        lines.append(f"| `{name}` | {', '.join(f'`{json.dumps(value)}`' for value in values) or '–'} |")
    return "\n".join(lines)


def formats_block(words: list[str]) -> str:
    """The formats of strings and whole numbers that a schema's text keeps."""
    names = [f"`{name}`" for name in (*sorted(FORMAT_PATTERNS), *WHOLE_FORMATS)]
    return textwrap.fill(f"{', '.join(names)}.", 120, break_on_hyphens=False)


# ---- the tour --------------------------------------------------------------------------------------------------------


def rows_block(words: list[str]) -> str:
    """Who may import whom, as tests/test_layering.py has it: the rows, the highest first."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    rows = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROWS"
    )
    lines = ["| row | folders and files |", "| ---: | --- |"]
    lines += [
        f"| {number} | {', '.join(f'`{name}`' for name in sorted(rows[number]))} |" for number in range(len(rows))
    ]
    return "\n".join([*lines[:2], *reversed(lines[2:])])


FILE = re.compile(r"^(\d+)\. \*\*`([\w/.]+)`\*\*(?: \([\d,]+ lines?\))?", re.MULTILINE)
"""A numbered item of the tour: its number and its file."""


def reading_list(text: str) -> list[str]:
    """The files that the tour reads, in order."""
    return [match[2] for match in FILE.finditer(text)]


def lines_of(name: str) -> int:
    path = ROOT / "sfumato" / name
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0  # a test names it


def counted(text: str) -> str:
    """A page with the lines of each numbered file."""
    return FILE.sub(lambda match: f"{match[1]}. **`{match[2]}`** ({lines_of(match[2]):,} lines)", text)


def total_of(text: str) -> str:
    """How much there is to read, for the head of the tour."""
    names = reading_list(text)
    return f"{len(names)} files, {sum(map(lines_of, names)):,} lines."


# ---- pages -----------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[list[str]], str]] = {
    "options": options_block,
    "routes": routes_block,
    "unread": unread_block,
    "neutral": neutral_block,
    "rows": rows_block,
    "formats": formats_block,
}

BLOCK = re.compile(r"(<!-- reference: ([\w ]+) -->\n).*?(<!-- /reference -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with each part between markers written anew."""

    def write(match: re.Match[str]) -> str:
        name, *words = match[2].split()
        return f"{match[1]}{total_of(text) if name == 'total' else BLOCKS[name](words)}\n{match[3]}"

    return BLOCK.sub(write, text)


def pages() -> dict[Path, str]:
    """Every page that says something of the code, and what it should be."""
    texts = {PAGE: page()}
    for path in sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]):
        if path != PAGE and path.name != "LOG.md":
            text = path.read_text(encoding="utf-8")
            texts[path] = filled(counted(text) if path == TOUR else text)
    return texts


def main() -> int:
    """Write the pages, or with --check say which are out of date."""
    texts = pages()
    stale = [path for path in texts if not path.exists() or path.read_text(encoding="utf-8") != texts[path]]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says; run scripts/reference.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
