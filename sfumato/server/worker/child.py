"""The worker process: it opens the model, then runs the worker loop until its parent ends.

Torch is imported only where the model is opened: the server's process imports this file too, for `main`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.engine.limits import BatchLimits
from sfumato.errors import InputError, SfumatoError
from sfumato.options import LoadOptions
from sfumato.server.backend import ModelCard
from sfumato.server.worker import loop as worker_loop
from sfumato.server.worker.loop import Lane, WorkerLoop, start_thread
from sfumato.server.worker.messages import in_full, plain

if TYPE_CHECKING:
    from sfumato.llm import LLM

PREPARING = 2
"""Threads that prepare jobs, in each lane."""
SWITCH_SECONDS = 0.0005
"""After which a thread that prepares hands the interpreter to the engine's, which asks for it many times a turn."""
PROGRESS_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that end the server; it ends the worker itself, after the drain."""

Send = Callable[[Any], None]
"""Sends a message to the parent."""


def main(connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """The worker process on a model."""

    def open_jobs(send: Send) -> tuple[worker_loop.JobRunner, ModelCard]:
        from sfumato.constraints.forms import llguidance
        from sfumato.engine.jobs import Jobs
        from sfumato.llm import LLM

        def notice(text: str) -> None:
            print(f"sfumato: {text}", file=sys.stderr, flush=True)

        llm = LLM.open(replace(load, adapters=None), notice=notice, progress=ProgressSender(send))
        for name, folder in (load.adapters or {}).items():
            try:
                llm.adapters.load(name, folder)
            except Exception as error:  # the parent says whether the others are enough
                send(("left out", name, plain(error)))
        with suppress(InputError):
            llguidance()  # now rather than between two turns, where it is installed
        if limits.context is not None:
            llm.planner.context = min(limits.context, llm.planner.context)
        return Jobs(llm, limits), card_of(llm, load.quantize)

    run(connection, open_jobs)


def run(connection: Connection, open_jobs: Callable[[Send], tuple[worker_loop.JobRunner, ModelCard]]) -> None:
    """Open the model, then run jobs until the parent says stop or closes the connection."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the thread that calls it, which may have stepped aside
    sys.setswitchinterval(SWITCH_SECONDS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the parent blocked them until they are ignored
    loop = WorkerLoop(connection)
    start_thread(loop.read)
    try:
        loop.jobs, card = open_jobs(loop.send)
    except SfumatoError as error:
        return loop.send(("failed", plain(error)))
    except BaseException as error:
        return loop.send(("failed", SfumatoError(f"the model cannot be loaded: {in_full(error)}")))
    gc.collect()
    gc.freeze()  # a third of a million objects of libraries that will stay: the collector need not visit them again
    loop.send(("ready", card))
    for lane in Lane:
        for _ in range(PREPARING):
            start_thread(loop.prepare, lane)
    try:
        loop.serve()
    except BaseException as error:
        print(f"sfumato: the engine failed: {in_full(error)}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: other threads may stand in the engine


class ProgressSender:
    """Called by the loader with bytes done and bytes in all; sends them to the parent now and then."""

    def __init__(self, send: Send) -> None:
        self.send, self.last = send, 0.0

    def __call__(self, done: int, total: int) -> None:
        """Send a message, unless the last one is recent."""
        if done == total or time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.last = time.monotonic()
            self.send(("loading", done, total))


def card_of(llm: LLM, quantize: str | None) -> ModelCard:
    """What clients may know of a loaded model. A folder's name stands for its path, which clients must not see."""
    from sfumato.measure.work import Parameters
    from sfumato.model.network import products

    model, config = llm.model, llm.model.config
    kinds = {getattr(getattr(owner, name), "kind", None) for owner, name in products(model)}
    is_local = os.path.exists(llm.name)
    return ModelCard(
        name=Path(llm.name).resolve().name if is_local else llm.name,
        canvas_length=config.canvas_length,
        max_position=config.max_position,
        vocab_size=config.vocab_size,
        is_diffusion=config.is_diffusion,
        has_chat=llm.template is not None,
        parameters=Parameters.of(config).total,
        dtype=str(model.dtype).removeprefix("torch."),
        ops=model.ops.name,
        quantised=quantize or ", ".join(sorted(kind for kind in kinds if isinstance(kind, str))) or None,
        defaults=llm.defaults,
        purpose=llm.purpose,
        adapters=llm.bank.listed().adapters,
    )
