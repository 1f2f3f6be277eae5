"""Which replica a job goes to: one that has read the beginning of its prompt, unless others have much less to do."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from sfumato.templates.requests import QueryFor

BEGINNING = 512
"""Characters, or tokens, of a prompt by which its replica is chosen."""


def key_of(query: QueryFor[Any]) -> str:
    """A digest of what a prompt begins with; "" where it begins with nothing.

    Of messages that is the system's and the first user's, of another prompt the first characters. Queries with the same
    key may share what has been encoded, which is never so of two adapters."""
    beginning = query.beginning
    if beginning and isinstance(beginning[0], Mapping) and "role" in beginning[0]:
        users = [place for place, message in enumerate(beginning) if message.get("role") == "user"]
        beginning = beginning[: users[0] + 1 if users else 1]
    else:
        beginning = beginning[:BEGINNING]
    if not beginning:
        return ""
    text = json.dumps([beginning, query.options.adapter], sort_keys=True, default=asdict)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def home(key: str, names: list[str]) -> str:
    """The replica for that beginning, by rendezvous hashing: it stays the same while it lives, whichever others go."""
    return max(names, key=lambda name: blake2b(f"{key} {name}".encode()).digest())


def ranks(key: str, queues: Mapping[str, int], bound: int) -> list[list[str]]:
    """Replicas to try, in groups of which the shortest queue is taken. `queues`: replica -> its jobs.

    That is the prompt's home, and if it is full, or has over `bound` more to do than another, two at random."""
    two = random.sample(sorted(queues), min(2, len(queues)))
    if not key:
        return [two]
    first = home(key, sorted(queues))
    return [two] if queues[first] - min(queues.values()) > bound else [[first], two]


class ReplicaRouter(RequestRouter):
    """Chooses a job's replica for Ray Serve, in the server's process."""

    bound: int

    def initialize_state(self, bound: int) -> None:  # type: ignore[override]
        """Set up by Ray Serve with `request_router_kwargs`."""
        self.bound = bound

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas to try, in order."""
        candidates = {one.replica_id.unique_id: one for one in candidate_replicas}
        if pending_request is None:
            return [list(candidates.values())]
        pending_request.routing_context.should_backoff = True  # when all are full: else Serve asks again at once
        job, avoid = pending_request.args
        if len(candidates) > 1:
            candidates.pop(avoid, None)
        if not candidates:
            return []
        lengths = self.replica_queue_len_cache
        queues = {name: lengths.get(one.replica_id) or 0 for name, one in candidates.items()}
        return [[candidates[name] for name in group] for group in ranks(key_of(job.query), queues, self.bound)]
