"""`sfumato serve --ray`: the server in this process, and copies of the model on a cluster of Ray's.

Routes, keys, limits and signals are those of `http.run`, which serves `replicas.RayBackend` as it would a `Worker`.
Without an address the cluster is this machine alone. It lives as long as the server, and only who has its token may
speak to its ports: all but those of the replicas, which Ray binds everywhere, are on local addresses too.
"""

from __future__ import annotations

import os
import secrets
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sfumato.errors import InputError
from sfumato.server.http import listen as http
from sfumato.server.settings import Settings

if find_spec("ray") is None:  # it is imported later, when its environment is set
    raise ModuleNotFoundError(name="ray")


def run(
    load: dict[str, Any],
    limits: dict[str, Any],
    settings: Settings,
    port: int,
    replicas: int,
    ready: http.Ready,
    max_replicas: int | None = None,
    address: str | None = None,
) -> None:
    """Serve as `http.run` does. `load` and `limits` are each copy's, as for `Worker`; from `replicas` copies
    their number grows to `max_replicas` as requests wait. `address`: a running cluster's; "auto": this machine's.

    Raises as `http.run` does, and InputError where a part of Ray is not installed."""
    most = replicas if max_replicas is None else max_replicas
    if most < replicas:
        raise InputError(f"max-replicas is {most}, below replicas {replicas}; give at least {replicas}")
    _set_up(is_private=address is None)
    try:
        module = import_module("sfumato.server.cluster.replicas")
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'sfumato[ray]'") from None
    plan = module.Plan(load, limits, replicas, most, settings.drain, address)
    http.run(module.RayBackend(plan), settings, port, ready)


def _set_up(is_private: bool) -> None:
    """Ray takes these from the environment when it is imported, and hands them to the processes that it starts."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call never starts another cluster by itself
    if is_private:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on every system: no clusters, only local addresses
