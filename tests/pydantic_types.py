"""Pydantic's types, each with its schema and the adapter that reads its JSON, for tests of constraints."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Optional, TypeVar, Union

import pydantic
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, computed_field
from typing_extensions import TypedDict

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 10


class Flavour(enum.StrEnum):
    SWEET = "sweet"
    SOUR = "sour"


class Point(NamedTuple):
    x: int
    y: float


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


@dataclass
class Spot:
    name: str
    size: float = 1.0


class Address(BaseModel):
    street: str
    zip_code: str = Field(pattern=r"^\d{5}(-\d{4})?$")


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=80)
    age: Optional[int] = Field(default=None, ge=0, le=150)  # noqa: UP045 - as people write it
    address: Address
    tags: set[str] = set()


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    breed: str


class Owner(BaseModel):
    pet: Annotated[Union[Cat, Dog], Field(discriminator="kind")]  # noqa: UP007


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: Union[str, None] = None  # noqa: UP007


class Rectangle(BaseModel):
    width: float = Field(gt=0)
    height: float = Field(gt=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> float:
        return self.width * self.height


class Numbers(pydantic.RootModel[list[int]]):
    pass


TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "str": str, "bytes": bytes, "None": type(None), "Any": Any,
    "Decimal": decimal.Decimal, "Fraction": fractions.Fraction, "complex": complex,
    "date": datetime.date, "datetime": datetime.datetime, "time": datetime.time, "timedelta": datetime.timedelta,
    "UUID": uuid.UUID, "UUID1": pydantic.UUID1, "UUID3": pydantic.UUID3, "UUID4": pydantic.UUID4,
    "UUID5": pydantic.UUID5, "Path": pathlib.Path, "Pattern": re.Pattern[str],
    "IPv4Address": ipaddress.IPv4Address, "IPv6Address": ipaddress.IPv6Address,
    "IPv4Network": ipaddress.IPv4Network, "IPv6Network": ipaddress.IPv6Network,
    "IPv4Interface": ipaddress.IPv4Interface, "IPv6Interface": ipaddress.IPv6Interface,
    "IPvAnyAddress": pydantic.IPvAnyAddress, "AnyUrl": pydantic.AnyUrl, "HttpUrl": pydantic.HttpUrl,
    "SecretStr": pydantic.SecretStr, "SecretBytes": pydantic.SecretBytes, "ByteSize": pydantic.ByteSize,
    "Json": pydantic.Json, "Json[list[int]]": pydantic.Json[list[int]],
    "Base64Bytes": pydantic.Base64Bytes, "Base64UrlStr": pydantic.Base64UrlStr,
    "PositiveInt": pydantic.PositiveInt, "NegativeInt": pydantic.NegativeInt,
    "NonNegativeInt": pydantic.NonNegativeInt, "NonPositiveInt": pydantic.NonPositiveInt,
    "PositiveFloat": pydantic.PositiveFloat, "NegativeFloat": pydantic.NegativeFloat,
    "NonNegativeFloat": pydantic.NonNegativeFloat, "FiniteFloat": pydantic.FiniteFloat,
    "StrictInt": pydantic.StrictInt, "StrictStr": pydantic.StrictStr,
    "PastDate": pydantic.PastDate,
    "conint": pydantic.conint(ge=3, lt=50, multiple_of=7), "confloat": pydantic.confloat(gt=0.5, le=2.25),
    "condecimal": pydantic.condecimal(max_digits=6, decimal_places=2),
    "constr": pydantic.constr(min_length=2, max_length=8, pattern="^[a-z]+$"),
    "conlist": pydantic.conlist(int, min_length=1, max_length=4), "conset": pydantic.conset(int, max_length=4),
    "list[str]": list[str], "set[str]": set[str], "frozenset[int]": frozenset[int],
    "tuple[int, str]": tuple[int, str], "tuple[int, ...]": tuple[int, ...], "deque[int]": collections.deque[int],
    "Sequence[float]": Sequence[float], "Iterable[int]": Iterable[int], "dict[str, int]": dict[str, int],
    "dict[int, str]": dict[int, str], "Mapping[str, Any]": Mapping[str, Any],
    "dict[Colour, int]": dict[Colour, int], "Counter": collections.Counter[str],
    "Literal": Literal["a", 3, None, True], "Enum": Colour, "IntEnum": Level, "StrEnum": Flavour,
    "int | None": int | None, "int | str | list[int]": int | str | list[int],
    "NamedTuple": Point, "TypedDict": Movie, "dataclass": Spot, "BaseModel": Person, "recursive": Tree,
    "discriminated": Owner, "generic": Page[Address], "computed": Rectangle, "RootModel": Numbers,
    "set[Colour]": set[Colour],
}  # fmt: skip
"""By name."""

SAY_LESS = {"complex", "Decimal", "Base64UrlStr", "PastDate", "condecimal", "dict[int, str]"}
"""Types that say less in their schema than they ask for."""


def adapter_of(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(TYPES[name])


def schema_of(name: str) -> dict[str, Any]:
    return adapter_of(name).json_schema()
