"""Assets: images that a System One request brings, as base64 or as parts of a multipart body.

Their shape is checked, so that a client's fault is told as such; then all of them are refused, as no model here reads
images yet. One that no text refers to is refused too: whoever sends an image means it to be looked at.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Literal, NoReturn

from pydantic import Field

from sfumato.server.http.bodies import Body
from sfumato.server.http.errors import BodyPlace
from sfumato.server.systemone.multipart import FormPart
from sfumato.server.systemone.questions import refused

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""What PNG and JPEG files begin with."""


class AssetBody(Body):
    """An image: its data, or the name of its part in a multipart body."""

    is_open = True

    type: Literal["image"] | None = None
    format: Literal["png", "jpg", "jpeg"] | None = Field(None, description="Needed with data_base64.")
    data_base64: str | None = Field(None, description="The file; without effect where there is a part.")
    part: str | None = Field(None, description="The name of the part with the file, in a multipart body.")


def check_assets(assets: Mapping[str, AssetBody] | None, parts: Mapping[str, FormPart] | None) -> None:
    """Refusal for the first asset that is wrong, and for a part that is not one asset's own."""
    owners: dict[str, str] = {}
    for name, asset in (assets or {}).items():
        place: BodyPlace = ("assets", name)
        if not name.strip():
            raise refused(place, "the placeholder of an asset is empty; give it a name")
        if asset.part is not None:
            data = _part_of(asset.part, (*place, "part"), parts, owners)
            owners[asset.part] = name
        else:
            data = _data_of(asset, place)
        if not data.startswith(SIGNATURES):
            raise refused(place, "the image is neither PNG nor JPEG; convert it", "image_format")
    for name in parts or {}:
        if name not in owners:
            message = f"no asset has the part {name!r}; name it in assets, or leave it out"
            raise refused(("assets",), message, "part_unclaimed")


def _part_of(name: str, place: BodyPlace, parts: Mapping[str, FormPart] | None, owners: Mapping[str, str]) -> bytes:
    if parts is None:
        message = "a part needs a body of multipart/form-data; send data_base64 and format"
        raise refused(place, message, "part_missing")
    if name not in parts:
        raise refused(place, f"there is no part {name!r} in the body; send it", "part_missing")
    if name in owners:
        message = f"the part {name!r} belongs to the asset {owners[name]!r} already; send the file twice"
        raise refused(place, message, "part_claimed")
    return parts[name].data


def _data_of(asset: AssetBody, place: BodyPlace) -> bytes:
    if asset.data_base64 is None:
        raise refused((*place, "data_base64"), "the asset has neither data_base64 nor part; give one", "missing")
    if asset.format is None:
        raise refused((*place, "format"), "format is missing; choose png, jpg, jpeg", "missing")
    try:
        return base64.b64decode("".join(asset.data_base64.split()), validate=True)
    except (binascii.Error, ValueError):
        message = "data_base64 is not base64; encode the file's bytes"
        raise refused((*place, "data_base64"), message, "base64_invalid") from None


def refuse_images(place: BodyPlace) -> NoReturn:
    """Refuse what only a model that reads images could answer."""
    raise refused(place, "this server's model reads no images; ask about text alone", "images_not_supported")
