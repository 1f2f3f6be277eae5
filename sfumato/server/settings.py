"""How the server is set up: who may call it, its names, and how much one request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import InputError

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. How many requests may wait is a limit of the backend."""

    max_head: int = 32 << 10
    """Bytes of a request's line and headers."""
    max_connections: int = 1024
    """Connections at once; fewer where the process may not open so many files."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    max_bodies: int = 1 << 30
    """Bytes of the bodies of all requests under way, which are kept until they are answered."""
    max_depth: int = 64
    """Nesting of a request's JSON."""
    max_values: int = 400_000
    """Values in a request's JSON, text not counted: ids of the longest context are fewer."""
    max_n: int = 16
    """Answers to one prompt."""
    max_prompts: int = 64
    """Answers to one request, all its prompts together."""
    max_stops: int = 16
    """Strings that end an answer."""
    max_tools: int = 128
    """Tools of a request, and calls of one message."""
    max_messages: int = 4096
    """Messages of a conversation, or items of /v1/responses."""
    max_parts: int = 1024
    """Parts of one message."""
    max_pieces: int = 4096
    """Texts and slots of a template."""
    max_slots: int = 1024
    """Slots of a template."""
    max_spans: int = 1024
    """Passages of a text to edit."""
    max_fields: int = 256
    """Fields of /v1/decisions."""
    max_choices: int = 1024
    """Texts among which one answer, slot or field may choose."""
    max_questions: int = 1024
    """Questions of /v1/systemone and /v1/decisions."""
    max_options: int = 1024
    """Options, levels or passages of one question."""
    max_all_options: int = 1 << 16
    """Of all questions of a request."""
    max_ids: int = 1 << 20
    """Token ids of a prompt; the model's context bounds them too."""
    max_metadata: int = 64
    """Entries of `metadata`."""
    timeout: float = 600.0
    """Seconds from a request's last byte to its answer's."""


@dataclass(frozen=True)
class Settings:
    """How one server is set up. InputError for one that would be open to others without a key."""

    host: str = "127.0.0.1"
    """The address it binds to. On a local one it answers only to local names."""
    keys: tuple[str, ...] = ()
    """API keys; a request needs one of them, but for health and the page. (): no key is needed."""
    name: str | None = None
    """The model's name to clients; None: its own."""
    aliases: tuple[str, ...] = ()
    """More names by which the model may be asked for."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; "*": any."""
    log_prompts: bool = False
    """Write what requests say to the log."""
    strict_params: bool = False
    """Refuse fields that have no effect, rather than leave them out and say so in a header."""
    adapter_folder: str | None = None
    """The folder from which clients may load adapters, and unload any; None: they may not."""
    kept_responses: int = 256
    """Answers of /v1/responses that are kept in memory, for `previous_response_id`; the oldest goes first."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Values of options that requests leave open, by name: those of a `Preset`."""
    write_timeout: float = 60.0
    """Seconds for which a client may neither read its answer nor go on sending its body."""
    keep_alive: float = 15.0
    """Seconds of silence in a stream after which a comment is sent, so that the connection stays open."""
    head_timeout: float = 10.0
    """Seconds that a client has to send a request's head, from the connection or the head's first byte on."""
    body_timeout: float = 30.0
    """Seconds that it has to send the body, and one more for every `body_rate` bytes."""
    body_rate: int = 64 << 10
    stall_limit: float = 10.0
    """Seconds that preparing a job may take before GET /ready says that the worker is stalled."""
    drain: float = 30.0
    """Seconds that requests under way have to finish when the server stops."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.is_local and not self.keys:
            raise InputError(
                f"the server would be open to others on {self.host}; give an API key, or bind to 127.0.0.1"
            )
        for key in self.keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError("an API key is empty, or holds a space or what is not ASCII; use letters and digits")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOCAL
