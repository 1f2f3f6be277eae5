"""What is to run on a cluster, as plain values: nothing here imports Ray, nor torch."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.engine.limits import BatchLimits
from sfumato.errors import InputError
from sfumato.options import LoadOptions


@dataclass(frozen=True)
class ClusterPlan:
    """Copies of a model on a cluster. `load` and `limits` are each copy's own, as for `Worker`."""

    load: LoadOptions
    limits: BatchLimits
    replicas: int = 1
    """Copies at the start, and at least."""
    max_replicas: int | None = None
    """Copies at most, while requests wait; None: as many as at the start."""
    address: str | None = None
    """A running cluster's address; "auto": this machine's; None: a cluster of its own, which is this machine alone."""

    def __post_init__(self) -> None:
        if self.most < self.replicas:
            raise InputError(
                f"max-replicas is {self.most}, below replicas {self.replicas}; give at least {self.replicas}",
                option="max-replicas",
            )

    @property
    def most(self) -> int:
        """Copies at most."""
        return self.replicas if self.max_replicas is None else self.max_replicas
