"""A model behind a URL: the methods of `LLM`, and the same events, over HTTP.

`Remote` speaks to a Sfumato server, or to any other host with OpenAI's API. Which of the two it is, `GET /v1/models`
says. A Sfumato server gets every option under its own name and sends drafts; another host gets only the fields that
OpenAI's API has, and an option that cannot be said there is an InputError. Answers are always read as a stream, so that
a long one is no silence. It lacks on purpose: token ids (hosts send texts, so `tokens` stays empty), and torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

from sfumato.errors import InputError, WorkerError
from sfumato.events import Completion, Decision, Edited, Event, Filled
from sfumato.options import Options
from sfumato.remote.answer import Answer, Messages, completion_of, given, messages_out, text_of, tools_out, usage_of
from sfumato.remote.host import Host, NoSuchRoute

AT_ONCE = 32
"""Requests under way for one list of prompts."""

_STANDARD = {"max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "top_logprobs", "drafts"}
"""Options that any host takes under the same name, and drafts, which just do not come."""
_STANDARD_IN_CHAT = {*_STANDARD, "schema", "strict", "must_call"}
"""The last three in OpenAI's own words."""


class Remote:
    """A model at `url` ("/v1" at its end or not). `LLM.connect` makes one.

    Making one asks the host for its models: WorkerError where nobody answers, InputError for a wrong key, for a host
    of another kind, and where a host with several models is given no `model`. `timeout` is the longest silence, in
    seconds. It may be used from several threads."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None, timeout: float = 600.0) -> None:
        self._host = Host(url, api_key, timeout)
        cards = self._cards(is_needed=model is None)
        is_sfumato = any(card.get("owned_by") == "sfumato" for card in cards)
        if model is None and len(cards) != 1 and not is_sfumato:
            raise InputError(f"{self.url} offers {len(cards)} models; name one{self._host.choice()}")
        named = [card for card in cards if card["id"] == model]
        card = (named or (cards if is_sfumato or model is None else []) or [{}])[0]  # a Sfumato server knows aliases
        self.name: str = model or card["id"]
        self.is_sfumato = is_sfumato
        """Whether the host is a Sfumato server: drafts, every option, and templates."""
        self.has_drafts = is_sfumato and card.get("is_diffusion") is True
        self.canvas_length = _whole(card.get("canvas_length"))
        """Positions of a canvas; None where the host does not say."""
        self.max_position = _whole(card.get("max_model_len"))
        """Tokens of prompt and answer together; None where the host does not say."""

    @property
    def url(self) -> str:
        return self._host.url

    @property
    def has_token_ids(self) -> bool:
        """Whether results carry token ids beside the text: hosts send texts alone."""
        return False

    @property
    def is_remote(self) -> bool:
        """Whether the model runs elsewhere: this one does."""
        return True

    @property
    def is_key_exposed(self) -> bool:
        """Whether the key crosses a network in the clear, beyond this machine and private networks."""
        return self._host.is_key_exposed

    # ---- answers ----------------------------------------------------------------------------------------------------

    @overload
    def complete(self, prompt: str, options: Options = ...) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], options: Options = ...) -> list[Completion]: ...
    def complete(
        self,
        prompt: str | list[str],
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion | list[Completion]:
        """Continue plain text; the texts of a list are requests at the same time. Where max_tokens is None, another
        host than Sfumato takes a length of its own."""
        if isinstance(prompt, str):
            return completion_of(self.stream(prompt, dataclasses.replace(options, drafts=False)))
        with ThreadPoolExecutor(max(1, min(AT_ONCE, len(prompt)))) as threads:
            return list(threads.map(lambda text: self.complete(text, options), prompt))

    def chat(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion:
        """Answer a conversation."""
        return completion_of(self.stream(messages, dataclasses.replace(options, drafts=False), tools))

    def stream(
        self,
        prompt: str | Messages,
        options: Options = Options(),  # noqa: B008 - frozen
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[Event]:
        """The events of one request: Draft (if options.drafts and the host offers them), Commit, Done. Closing the
        iterator ends the request at the host too."""
        is_chat = not isinstance(prompt, str)
        self.check(options, is_chat)
        body: dict[str, Any] = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        if isinstance(prompt, str):
            body["prompt"] = prompt
        else:
            body["messages"] = messages_out(prompt, self.is_sfumato)
        said = given(options)
        is_strict = said.pop("strict", False) or options.must_call
        if is_chat and tools:
            body["tools"] = tools_out(tools, is_strict)
        if is_chat and said.pop("must_call", False):
            body["tool_choice"] = "required"
        if options.logprobs and not is_chat:
            said["logprobs"] = said.pop("top_logprobs", 0)
        if not self.has_drafts:
            said.pop("drafts", None)
        if not self.is_sfumato and (schema := said.pop("schema", None)) is not None:
            form = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return self._events("/chat/completions" if is_chat else "/completions", body | said, options)

    def check(self, options: Options, is_chat: bool = True) -> None:
        """InputError for an option that cannot be said to this host. (Drafts can be left away.)"""
        known = _STANDARD_IN_CHAT if is_chat else _STANDARD
        for name, value in given(options).items():
            if not self.is_sfumato and (name not in known or (name == "schema" and isinstance(value, bool))):
                where = "in a chat" if is_chat else "with plain text"
                raise InputError(
                    f"{name} cannot be said {where} to {self.url}, which is no Sfumato server; leave it out"
                )

    def forget(self) -> None:
        """Nothing is kept on this side; what stays encoded is the host's business."""

    # ---- templates: Sfumato servers only ----------------------------------------------------------------------------

    def fill(
        self,
        template: Sequence[Any],
        prompt: str | Messages | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Filled:
        """Fill the slots of a template: texts, and slots as `Slot`s or as mappings with the same fields."""
        pieces = [given(piece) if dataclasses.is_dataclass(piece) else piece for piece in template]
        told = self._ask("/fill", {"template": pieces} | self._prompt(prompt), options)
        with self._host.reading():
            return Filled(
                text_of(told["text"]),
                {name: text_of(value) for name, value in told["values"].items()},
                usage_of(told["usage"]),
                int(told["seed"]),
                {name: int(length) for name, length in told["lengths"].items()},
            )

    def infill(
        self,
        prefix: str,
        suffix: str,
        length: int | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
        at_most: int | None = None,
    ) -> Filled:
        """Write what stands between two texts, in `length` tokens; None finds the length, up to `at_most` (64)."""
        body = {"prefix": prefix, "suffix": suffix, "length": length, "at_most": at_most}
        told = self._ask("/infill", body, options)
        with self._host.reading():
            values, lengths = {"middle": text_of(told["middle"])}, {"middle": int(told["length"])}
            return Filled(text_of(told["text"]), values, usage_of(told["usage"]), int(told["seed"]), lengths)

    def edit(
        self,
        text: str,
        instruction: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        strength: float | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Edited:
        """Rewrite a text where it stands: the `spans` of it, or wherever the `instruction` says."""
        body = {"text": text, "instruction": instruction, "spans": spans, "strength": strength}
        told = self._ask("/edit", body, options)
        with self._host.reading():
            return Edited(text_of(told["text"]), text, usage_of(told["usage"]), int(told["seed"]))

    def decide(
        self,
        prompt: str | Messages,
        fields: Mapping[str, Sequence[str]],
        steps: int = 1,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> dict[str, Decision]:
        """Answer questions with given choices: field -> choices in, field -> likeliest choice and probabilities out."""
        body = {"fields": {name: list(choices) for name, choices in fields.items()}, "steps": steps}
        told = self._ask("/decisions", body | self._prompt(prompt), options)
        with self._host.reading():
            return {
                name: Decision(text_of(one["choice"]), {choice: float(p) for choice, p in one["probabilities"].items()})
                for name, one in told["decisions"].items()
            }

    def _ask(self, path: str, body: dict[str, Any], options: Options) -> dict[str, Any]:
        if not self.is_sfumato:
            raise InputError(f"{self.url} is no Sfumato server, so it has no /v1{path}; connect to one for that")
        said = {name: value for name, value in body.items() if value is not None}
        options = dataclasses.replace(options, drafts=False)
        return self._host.json("POST", path, {"model": self.name} | said | given(options))

    def _prompt(self, prompt: str | Messages | None) -> dict[str, Any]:
        if prompt is None:
            return {}
        return {"prompt": prompt} if isinstance(prompt, str) else {"messages": messages_out(prompt, self.is_sfumato)}

    def _cards(self, is_needed: bool) -> list[dict[str, Any]]:
        """What the host says of its models. A host that lists none is no reason to stop where one was named."""
        try:
            told = self._host.json("GET", "/models")
        except NoSuchRoute:
            if is_needed:
                raise
            return []
        with self._host.reading():
            cards = list(told["data"])
            self._host.models = [text_of(card["id"]) for card in cards]
        return cards

    def _events(self, path: str, body: dict[str, Any], options: Options) -> Iterator[Event]:
        began, answer = time.perf_counter(), Answer(options)
        with self._host.request("POST", path, body) as response:
            for payload in self._host.payloads(response):
                if isinstance(payload, dict) and payload.get("error"):
                    raise self._host.refusal(None, payload, path)
                with self._host.reading():
                    events = answer.read(payload, time.perf_counter() - began)
                yield from events
        if answer.finish_reason is None:
            raise WorkerError(f"{self.url} broke off in the middle of the answer; send the request again")
        with self._host.reading():
            ending = answer.end(time.perf_counter() - began)
        yield from ending


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
