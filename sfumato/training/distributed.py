"""Several processes that train one model, each a share of its weights and of every batch: FSDP2 under torchrun.

The whole batch and its random numbers are the same in every process; each takes its part, and sums and counts of all
parts make the losses, so that a run's figures do not depend on how many processes share it. Plain weights, trained or
frozen, are sharded over the processes: a block is whole while it runs, and what lies outside the blocks, the embedding
that is the head too among it, from a step's first pass to its last gradient. Packed weights are whole in every process.
It lacks tensor and pipeline parallelism, and machines that come and go.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sfumato.errors import InputError, SfumatoError
from sfumato.model.network import Model


class Ranks:
    """This process among those of its run: number `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, mesh: Any = None) -> None:
        self.rank, self.size, self._mesh = rank, size, mesh

    @classmethod
    def join(cls, device: str) -> tuple[Ranks, str]:
        """The processes that torchrun has started, of which this is one, and the device of this one.

        Without torchrun: one process, and the device as it is."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not distributed.is_torchelastic_launched():
            return cls(), device
        kind = torch.device(device).type
        if kind == "cuda":
            place = distributed.get_node_local_rank(0)
            if place >= torch.cuda.device_count():
                raise InputError(
                    f"process {place} of this machine has no GPU, of which there are {torch.cuda.device_count()}; "
                    "start as many with --nproc-per-node"
                )
            device = f"cuda:{place}"
            torch.cuda.set_device(place)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        size = distributed.get_world_size()
        mesh = distributed.device_mesh.init_device_mesh(kind, (size,)) if size > 1 else None
        return cls(distributed.get_rank(), size, mesh), device

    def leave(self) -> None:
        """End what `join` has begun."""
        if distributed.is_available() and distributed.is_initialized():
            gc.collect()  # what refers to itself in a circle would outlive the group that it belongs to
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """This one writes and prints."""
        return self.rank == 0

    def shard_(self, model: Model) -> Model:
        """Give each process its share of the model's parameters; optimisers are made afterwards."""
        if self.size == 1:
            return model
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # Blocks give views, which nobody changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        size = self.size

        def place(parameter: nn.Parameter) -> Any:
            from torch.distributed.tensor import Shard

            is_lane = parameter.ndim > 2 and parameter.shape[0] == 1 and parameter.shape[1] % size == 0
            return Shard(1 if is_lane else 0)

        for block in model.layers:
            fully_shard(block, mesh=self._mesh, shard_placement_fn=place)
        root: Any = fully_shard(model, mesh=self._mesh, shard_placement_fn=place, reshard_after_forward=False)
        # No tensor may pass through what makes the root whole: its gradients are complete with the last of all alone,
        # and FSDP would take them for that where one reaches an input, such as the soft embedding.
        root.gather_ = MethodType(lambda self: None, root)
        register_fsdp_forward_method(root, "gather_")
        for name in ("encode", "denoise", "encode_and_denoise"):
            setattr(root, name, _gathering(root, getattr(root, name)))
        for part in (root, *model.layers):
            part.set_gradient_divide_factor(1.0)  # losses are shares of the global mean already
            part.set_force_sum_reduction_for_comms(True)
        return model

    def release_(self, model: Model) -> None:
        """Let go of what is whole, so that weights may be changed."""
        if self.size > 1:
            for part in (*model.layers, model):
                part.reshard()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, number: int) -> int:
        """The largest of the numbers that the processes bring: all must ask at the same place."""
        if self.size == 1:
            return number
        kind = "cpu" if self._mesh.device_type == "cpu" else "cuda"
        largest = torch.tensor(number, device=kind)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return int(largest)

    def lead(self, work: Callable[[], object]) -> None:
        """Have the first process do it, before all go on; what it cannot do is an error in all."""
        message = ""
        try:
            if self.is_first:
                work()
        except SfumatoError as error:
            if self.size == 1:
                raise
            message = str(error)
        if self.size > 1:
            messages = [message]
            distributed.broadcast_object_list(messages, src=0)
            if messages[0]:
                raise InputError(messages[0])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block before all others."""
        if not self.is_first:
            self.wait()
        try:
            yield
        finally:
            if self.is_first:
                self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


def _gathering(root: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def gathering(*arguments: Any, **named: Any) -> Any:
        root.gather_()
        return call(*arguments, **named)

    return gathering


ALONE = Ranks()


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be shared among processes, as a whole in each; all must ask."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()
