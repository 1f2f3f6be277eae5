"""server/http/options.py: the fields of requests that set options follow from the declaration of each option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fake_backend import CARD
from pydantic import ValidationError

from sfumato.errors import InputError
from sfumato.options import BIG, OPTIONS, About, Option, Options, Use, declared
from sfumato.server.anthropic.bodies import MessagesRequest
from sfumato.server.canvas.bodies import DecisionsRequest, EditRequest, FillRequest, InfillRequest
from sfumato.server.http import bodies as http_bodies
from sfumato.server.http import options as http_options
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import SET_BY_OTHERS, OptionsBody, listed, range_of
from sfumato.server.openai.bodies import ChatRequest, CompletionRequest, Sampled
from sfumato.server.openai.items import ResponsesRequest
from sfumato.server.settings import Limits


@dataclass(frozen=True)
class More(Options):
    """Options, and one more of each kind, as if `sfumato.options` declared them."""

    patience: Annotated[int, About("Steps to wait.", ("canvas", "chat", "templates"), 0, 9)] = 3
    share: Annotated[float | None, About("A share.", ("canvas", "chat"), 0.0, 0.5)] = None
    shape: Annotated[Literal["round", "square"] | None, About("A form.", ("canvas", "chat"))] = None
    words: Annotated[tuple[str, ...], About("Texts.", ("canvas", "chat"))] = ()
    is_loud: Annotated[bool, About("Loud.", ("autoregressive", "chat"))] = False


@pytest.fixture
def more_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, option in declared(More).items():
        if name not in OPTIONS:
            monkeypatch.setitem(OPTIONS, name, option)
    monkeypatch.setattr(http_options, "Options", More)
    yield


def read(body: type[OptionsBody], **fields: Any) -> OptionsBody:
    """The body with these fields, checked as a request's is."""
    return body.model_validate(fields, context=http_bodies.BodyReading(Limits()))


def test_a_new_option_is_a_field_and_is_listed_with_no_change_here(more_options: None) -> None:
    class Chat(Sampled, uses=("chat",)):
        pass

    class Template(OptionsBody, uses=("canvas", "templates")):
        pass

    options = read(Chat, patience=5, share=0.25, shape="round", words=["a"], seed=1).options(CARD)
    assert options == More(patience=5, share=0.25, shape="round", words=("a",), seed=1)
    assert read(Template, patience=5, seed=1).options(CARD) == More(patience=5, seed=1)
    assert "share" not in Template.model_fields and "patience" in Template.model_fields
    with pytest.raises(InputError, match="is_loud is True; it applies to mode 'autoregressive' alone") as refused:
        read(Chat, is_loud=True).options(CARD)
    assert refused.value.option == "is_loud"
    assert read(Chat, is_loud=True, mode="autoregressive", seed=1).options(CARD) == More(
        is_loud=True, mode="autoregressive", seed=1
    )
    entry = next(entry for entry in listed({"patience": 4}) if entry["name"] == "patience")
    assert entry == {
        "name": "patience",
        "type": "integer",
        "default": 4,
        "minimum": 0,
        "maximum": 9,
        "choices": None,
        "doc": "Steps to wait.",
    }
    field = Chat.model_json_schema()["properties"]["patience"]
    assert field["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 9}
    assert field["description"] == "Steps to wait."


@pytest.mark.parametrize(
    ("name", "value"),
    [("patience", 10), ("patience", 1.5), ("share", 0.6), ("shape", "long"), ("words", ["a"] * 1025), ("is_loud", 1)],
)
def test_a_new_option_is_checked_by_its_declaration(more_options: None, name: str, value: Any) -> None:
    class Chat(Sampled, uses=("chat",)):
        pass

    body = (f'{{"{name}": ' + str(value).replace("'", '"') + "}").encode()
    if isinstance(value, str):
        body = f'{{"{name}": "{value}"}}'.encode()
    with pytest.raises(Refusal) as refused:
        http_bodies.read(body, Chat, http_bodies.BodyReading(Limits()))
    assert refused.value.option == name and name in str(refused.value)


@pytest.mark.parametrize(
    ("body", "uses", "others"),
    [
        (ChatRequest, {"chat"}, {"must_call", "adapter"}),
        (CompletionRequest, {"complete"}, {"top_logprobs", "adapter"}),
        (ResponsesRequest, {"chat"}, {"must_call", "max_tokens", "logprobs", "adapter"}),
        (InfillRequest, {"canvas", "templates"}, {"early", "short", "adapter"}),
        (EditRequest, {"canvas", "templates"}, {"early", "short", "adapter"}),
        (FillRequest, {"canvas", "templates"}, {"early", "short", "adapter"}),
    ],
)
def test_a_body_has_the_options_of_its_uses(body: type[OptionsBody], uses: set[Use], others: set[str]) -> None:
    names = {info.alias or name for name, info in body.model_fields.items()}
    expected = {name for name, option in OPTIONS.items() if uses <= set(option.about.uses)} - others
    assert names & OPTIONS.keys() == expected


ROUTES: dict[str, type[http_bodies.Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/infill": InfillRequest,
    "/v1/edit": EditRequest,
    "/v1/fill": FillRequest,
    "/v1/decisions": DecisionsRequest,
}


def other_value(option: Option) -> Any:
    """A value that is not the option's default, as JSON has it."""
    values = {bool: True, int: 1, float: 0.5, tuple: ["a"], dict: {"type": "object"}, str: "a"}
    return option.choices[-1] if option.choices else values[option.kind]


def takes(body: type[http_bodies.Body], name: str, value: Any) -> bool:
    """Whether a body has no fault to find with this field, and reads it, whatever else is missing."""
    try:
        body.model_validate({name: value}, context=http_bodies.BodyReading(Limits(), is_strict=True))
    except ValidationError as error:
        return name not in [one["loc"][0] for one in error.errors() if one["loc"]]
    return True


def test_the_page_of_the_server_says_which_options_a_route_takes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`/v1/[\w/]+`(?:, )?)+) \| (all but )?(.*) \|$", page, re.MULTILINE)
    table: dict[str, set[str]] = {}
    for routes, all_but, names in rows:
        listed_names = set(re.findall(r"`(\w+)`", names))
        for route in re.findall(r"`([^`]+)`", routes):
            table[route] = OPTIONS.keys() - listed_names if all_but else listed_names
    assert table.keys() == ROUTES.keys()
    for route, body in ROUTES.items():
        values = {name: other_value(option) for name, option in OPTIONS.items()}
        if body is CompletionRequest:
            values["logprobs"] = 1
        if body is MessagesRequest:
            values["thinking"] = {"type": "adaptive"}
        assert {name for name, value in values.items() if takes(body, name, value)} == table[route], route


def test_ranges_are_the_declared_ones_but_for_openais_temperature() -> None:
    properties = ChatRequest.model_json_schema()["properties"]
    for name, option in OPTIONS.items():
        if option.kind in (int, float):
            minimum, maximum = range_of(option)
            kind = properties[name]["anyOf"][0]
            assert (kind["minimum"], kind["maximum"]) == (minimum, maximum), name
            declared_range = (option.about.minimum, option.about.maximum)
            assert (minimum, maximum) == ((0.0, 2.0) if name == "temperature" else declared_range)
    assert {entry["maximum"] for entry in listed({}) if OPTIONS[entry["name"]].about.maximum == BIG} == {None}


def test_every_option_has_its_field() -> None:
    names = {info.alias or name for name, info in ChatRequest.model_fields.items()}
    assert OPTIONS.keys() - names == {"must_call", "adapter"} == set(SET_BY_OTHERS)
