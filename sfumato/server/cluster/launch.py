"""`sfumato serve --ray`: the server in this process, and copies of the model on a cluster of Ray's.

Routes, keys, limits and signals are those of `http.listen`, which serves a `RayBackend` as it would a `Worker`. Without
an address the cluster is this machine alone. It lives as long as the server, and only processes that have its token may
speak to its ports: all but those of the replicas, which Ray binds everywhere, are on local addresses too.
"""

from __future__ import annotations

import os
import secrets
from importlib import import_module
from importlib.util import find_spec

from sfumato.errors import missing_extra
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.server.http import listen as http
from sfumato.server.settings import Settings

if find_spec("ray") is None:  # it is imported later, when its environment is set
    raise ModuleNotFoundError(name="ray")


def run(plan: ClusterPlan, settings: Settings, port: int, ready: http.OnReady) -> None:
    """Serve as `http.listen.run` does, and raise as it does; InputError where a part of Ray is not installed."""
    _set_up(is_private=plan.address is None)
    try:
        module = import_module("sfumato.server.cluster.backend")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name, "ray") from None
    http.run(module.RayBackend(plan, settings.drain), settings, port, ready)


def _set_up(is_private: bool) -> None:
    """Set the environment of Ray, which it reads when it is imported and passes to the processes that it starts."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call never starts another cluster by itself
    if is_private:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on every system: no clusters, only local addresses
