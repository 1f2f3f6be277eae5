"""A model behind a URL: the methods of `LLM`, and the same events, over HTTP.

`Remote` speaks to a Sfumato server, or to any other host with OpenAI's API or, for decisions, TypeSafe's System One.
Which it is, `GET /v1/models` says. A Sfumato server gets every option under its own name and sends drafts; another host
gets only the fields that OpenAI's API has, and an option that cannot be said there is an InputError. Answers are always
read as a stream, so that a long one is no silence. It deliberately lacks token ids (hosts send texts, so `tokens` stays
empty), and torch.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sfumato.engine.arguments import check_kind
from sfumato.errors import CheckpointError, InputError, WorkerError, contained
from sfumato.events import Commit, Completion, Draft, Event
from sfumato.model.purpose import Purpose
from sfumato.options import Options, differences
from sfumato.remote.bodies import (
    DECISIONS,
    answer_body,
    answer_route,
    option_refused,
    score_body,
    template_route_and_body,
)
from sfumato.remote.decisions import decide
from sfumato.remote.host import Host, NoSuchRoute
from sfumato.remote.results import AnswerReader, completion_of, result_of, scored_of, text_of
from sfumato.system.cancelling import Cancellation
from sfumato.templates.checks import check_query
from sfumato.templates.interface import LanguageModel
from sfumato.templates.outcomes import results_of
from sfumato.templates.requests import AnswerQuery, Chat, Complete, Decide, Likelihood, Query, QueryFor, Result
from sfumato.templates.systemone import JEV

AT_ONCE = 32
"""Requests under way of those that are awaited, or come in a list."""

_STANDARD = {
    *("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop", "seed"),
    *("logprobs", "top_logprobs", "drafts", "adapter"),
}
"""Options that any host takes under the same name; the adapter, which is a model there; drafts, which just do not come.
"""
_STANDARD_IN_CHAT = {*_STANDARD, "schema", "strict", "must_call"}
"""The last three in OpenAI's own words."""


class Remote(LanguageModel):
    """A model at `url` ("/v1" at its end or not). `LLM.connect` makes one.

    Making one asks the host for its models: WorkerError where nobody answers, InputError for a wrong key, for a host
    of another kind, and where a host with several models gets no `model`. `timeout` is the longest silence, in
    seconds. It may be used from several threads. Where max_tokens is None, another host than Sfumato takes a length of
    its own; templates and drafts are a Sfumato server's only. Decisions are asked of any server that speaks System One
    (`POST /v1/systemone`); what is ours alone (`samples`, `think`, …) is sent behind `x_`, which others pass over."""

    has_token_ids = False
    """Whether results carry token ids beside the text: hosts send texts alone."""
    is_remote = True
    """Whether the model runs in another process or machine. Here True."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None, timeout: float = 600.0) -> None:
        self._host = Host(url, api_key, timeout)
        check_kind("model", model, (str, type(None)), "a model's name")
        self._is_closed = False
        self._threads = ThreadPoolExecutor(AT_ONCE, "sfumato remote")
        self._lock = threading.Lock()
        self._under_way: dict[Cancellation, Callable[[Any], None]] = {}
        """Queries that are awaited, each with its listener."""
        cards = self._cards(is_needed=model is None)
        is_sfumato = any(card.get("owned_by") == "sfumato" for card in cards)
        if model is None and not is_sfumato and JEV[0] in self._host.models:
            model = JEV[0]
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
        self.purpose = _purpose(card) if is_sfumato else None
        """What the model is for, where the host says that it is for one thing alone."""

    @property
    def url(self) -> str:
        """The host's URL, without "/v1"."""
        return self._host.url

    @property
    def is_key_exposed(self) -> bool:
        """Whether the key crosses a network in the clear, beyond this machine and private networks."""
        return self._host.is_key_exposed

    def check(self, options: Options, is_chat: bool = True) -> None:
        """InputError for an option that cannot be said to this host; drafts can be left away."""
        known = _STANDARD_IN_CHAT if is_chat else _STANDARD
        for name, value in differences(options).items():
            if not self.is_sfumato and (name not in known or (name == "schema" and isinstance(value, bool))):
                where = "in a chat" if is_chat else "with plain text"
                raise InputError(
                    f"{name} cannot be said {where} to {self.url}, which is no Sfumato server; leave it out",
                    option=name,
                )

    def forget(self) -> None:
        """Nothing is kept on this side; what stays encoded is the host's business."""

    def close(self) -> None:
        """Nothing is asked of the host any more: what is awaited ends, and what is asked later is an InputError."""
        with self._lock:
            self._is_closed = True
            under_way, self._under_way = self._under_way, {}
        error = InputError(f"the connection to {self.url} was closed while it answered; connect again")
        for cancellation, listener in under_way.items():
            cancellation.set()
            listener(error)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __repr__(self) -> str:
        kind = "a Sfumato server" if self.is_sfumato else "a host with OpenAI's API"
        return f"<Remote {self._host.clean(self.name)} at {self.url}, {kind}{', closed' if self._is_closed else ''}>"

    def run(self, query: QueryFor[Result]) -> Result:
        """Carry out any query (`templates.requests`) and return its result."""
        result: Result = self._answer(query) if isinstance(query, Complete | Chat) else self._result(query)
        return result

    # ---- over HTTP --------------------------------------------------------------------------------------------------

    def _answers(self, queries: Sequence[AnswerQuery]) -> list[Completion]:
        return results_of(self._begin, queries)

    def _begin(self, query: QueryFor[Any], listener: Callable[[Any], None]) -> Callable[[], None]:
        cancellation = Cancellation()
        with self._lock:  # or it is closed in between
            self._check_open()
            self._under_way[cancellation] = listener
            self._threads.submit(self._work, query, cancellation)

        def cancel() -> None:
            with self._lock:
                self._under_way.pop(cancellation, None)
            cancellation.set()

        return cancel

    def _work(self, query: QueryFor[Any], cancellation: Cancellation) -> None:
        """Carry out a query in a thread of its own, and tell its listener what comes, while it has one."""

        def tell(outcome: Any) -> None:
            is_last = not isinstance(outcome, Draft | Commit)
            with self._lock:
                get = self._under_way.pop if is_last else self._under_way.get
                listener = get(cancellation, None)
            if listener is not None:
                listener(outcome)

        with cancellation.applied():
            try:
                for outcome in self._stream(query) if isinstance(query, Complete | Chat) else [self._result(query)]:
                    if cancellation.is_set:
                        return
                    tell(outcome)
            except BaseException as error:
                tell(contained(error))

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError(f"the connection to {self.url} is closed; connect again")

    def _answer(self, query: AnswerQuery) -> Any:
        options = dataclasses.replace(query.options, drafts=False)
        return completion_of(self._stream(dataclasses.replace(query, options=options)))

    def _stream(self, query: AnswerQuery) -> Iterator[Event]:
        """The events of an answer. What cannot be sent is refused here, before the first event is asked for."""
        self._check_open()
        check_query(query)
        self.check(query.options, isinstance(query, Chat))
        body = answer_body(query, self.is_sfumato, self.has_drafts)
        return self._events(answer_route(query), {"model": self.name} | body, query.options)

    def _events(self, route: str, body: dict[str, Any], options: Options) -> Iterator[Event]:
        start, answer = time.perf_counter(), AnswerReader(options)
        with self._host.request("POST", route, body) as response:
            for payload in self._host.payloads(response):
                if isinstance(payload, dict) and payload.get("error"):
                    raise self._host.refusal(None, payload, route)
                with self._host.reading():
                    events = answer.read(payload, time.perf_counter() - start)
                yield from events
        if answer.finish_reason is None:
            raise WorkerError(f"{self.url} broke off in the middle of the answer; send the request again")
        with self._host.reading():
            ending = answer.end(time.perf_counter() - start)
        yield from ending

    def _result(self, query: QueryFor[Any]) -> Any:
        """The result of a query on a template, which comes as one body.

        InputError for an option that the server's route does not take, before anything is sent."""
        self._check_open()
        if isinstance(query, Query):
            check_query(query)
        if isinstance(query, Likelihood):
            return self._score(query)
        if isinstance(query, Decide):
            self._check_route(DECISIONS, query.options)
            return decide(self._host, self.name, query, self.is_sfumato)
        route, body = template_route_and_body(query)
        if not self.is_sfumato:
            raise InputError(f"{self.url} is no Sfumato server, so it has no /v1{route}; connect to one for that")
        self._check_route(route, query.options)
        payload = self._host.json("POST", route, {"model": self.name} | body)
        with self._host.reading():
            return result_of(query, payload)

    def _check_route(self, route: str, options: Options) -> None:
        if (name := option_refused(route, options)) is not None:
            message = f"{name} cannot be said with /v1{route} to {self.url}, which has no such field; leave it out"
            raise InputError(message, option=name)

    def _score(self, query: Likelihood) -> Any:
        self.check(query.options, is_chat=False)
        payload = self._host.json("POST", "/completions", {"model": self.name} | score_body(query))
        with self._host.reading():
            return scored_of(query, payload)

    def _cards(self, is_needed: bool) -> list[dict[str, Any]]:
        """What the host says of its models. A host that lists none is no reason to stop where one was named."""
        try:
            payload = self._host.json("GET", "/models")
        except NoSuchRoute:
            if is_needed:
                raise
            return []
        with self._host.reading():
            cards = list(payload["data"]) if "data" in payload else [{"id": card["name"]} for card in payload["models"]]
            self._host.models = [text_of(card["id"]) for card in cards]
        return cards


def _purpose(card: Mapping[str, Any]) -> Purpose | None:
    raw = card.get("purpose")
    try:
        return Purpose.of(raw, "the host") if isinstance(raw, Mapping) else None
    except CheckpointError:  # a hint less
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
