"""Every error as an answer: a body in its dialect's form (OpenAI's, if no other), and a status: whose fault it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sfumato.errors import BusyError, CapacityError, InputError, NumericError, SfumatoError, WorkerError


def short(text: str, most: int) -> str:
    """A text cut to so many characters: what repeats a request's words does not repeat megabytes of them."""
    return text if len(text) <= most else text[:most] + "…"


BodyPlace = tuple[str | int, ...]
"""Where something stands in a body: names of fields and numbers of items, from the outside in."""


class Refusal(SfumatoError):
    """An error with the status and the words it is answered with. `place`: where in the body, `param` in words."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        place: BodyPlace | None = None,
    ) -> None:
        message = short(message, 2000)
        super().__init__(message, option=param)
        self.status, self.headers, self.place = status, headers, place
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": self.error}

    def response(self, form: ErrorForm | None = None) -> JSONResponse:
        """The answer, in OpenAI's form unless another is named."""
        return JSONResponse(*((self.body, self.status) if form is None else form(self)), self.headers)


def place_name(place: BodyPlace) -> str:
    """A place in words, such as messages[0].role."""
    name = ""
    for step in place:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


ErrorForm = Callable[[Refusal], tuple[dict[str, Any], int]]
"""The body and the status of an error in one dialect."""


class ClientGone(Exception):
    """Nobody waits for the answer: the client closed the connection, or does not read."""


RETRY = {"retry-after": "1"}
CLOSE = {"connection": "close"}
"""For a body that is not read to its end: what follows is no request."""


def refusal(error: Exception) -> Refusal:
    """Any error as an answer. An unexpected one is a 500 that shows nothing of the inside."""
    match error:
        case Refusal():
            return error
        case CapacityError(option=None):  # clients shorten their conversation
            return Refusal(400, str(error), code="context_length_exceeded")
        case InputError():
            return Refusal(400, str(error), param=error.option)
        case NumericError():
            return Refusal(500, str(error), "server_error", code="numeric_error")
        case BusyError():
            return Refusal(503, str(error), "overloaded_error", headers=RETRY)
        case WorkerError():
            return Refusal(503, str(error), "worker_error", headers=RETRY)
        case HTTPException():
            return Refusal(error.status_code, _WORDS.get(error.status_code, error.detail), headers=error.headers)
        case _:
            return Refusal(500, "the server failed at this request; its log says how", "server_error")


_WORDS = {
    404: "there is nothing at this address; /openapi.json lists what there is",
    405: "this address does not take that method; the header Allow names what it takes",
}
