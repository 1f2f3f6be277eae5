"""What every test shares: one thread, no GPU test without a GPU, no slow test unless asked for."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

import pytest

# Before any test imports torch, and inherited by the processes that tests start. Tiny models gain nothing from a second
# thread, and on a busy machine threads that wait for each other lose much.
os.environ["OMP_NUM_THREADS"] = "1"

# The settings of whoever runs the tests are no part of them.
os.environ.pop("SFUMATO_MODEL", None)
os.environ["XDG_CONFIG_HOME"] = os.path.join(tempfile.gettempdir(), "sfumato-tests-config")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.slow and "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]

    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def pytest_collection_finish() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def has_cuda() -> bool:
    import torch  # here, so that tests without torch stay quick to start

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for torch is no CUDA, not an error
        return torch.cuda.is_available()


@pytest.fixture
def untidy() -> Iterator[None]:
    """For a client that leaves its own event loops and sockets unclosed: they go here, not amid a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()
