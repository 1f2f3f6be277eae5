"""An adapter that is trained: its factors are parameters beside the frozen weights of a finished model.

Modules with a weight of base and factors take the place of the model's own, so that parameters have names, and whoever
shards or optimises them needs to know nothing more. All rows have the one lane that there is. It lacks several adapters
at once, and factors of denoise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, float32, nn

from sfumato.errors import InputError
from sfumato.model.adapters import Adapter, Factors, targeted
from sfumato.model.network import Experts, Model
from sfumato.ops.contract import Matrix, tensors_of
from sfumato.ops.lowrank import LanePair, LaneSwitch, LowRank


class AdaptedLinear(nn.Module):
    """A frozen weight with trainable factors, in the place of a linear layer."""

    def __init__(self, base: Matrix, factors: Factors, switch: LaneSwitch) -> None:
        super().__init__()
        self.base: Any = _frozen(base)
        self.a, self.b = _stacked(base, factors)
        self.switch, self.scale = switch, factors.scale

    @property
    def weight(self) -> LowRank:
        """Made anew each time: whoever shards parameters replaces them."""
        return LowRank(self.base, self.a, self.b, self.switch, self.scale)


class AdaptedExperts(nn.Module):
    """Frozen experts with trainable factors beside one or both of their stacks."""

    def __init__(self, experts: Experts, factors: Mapping[str, Factors], switch: LaneSwitch) -> None:
        super().__init__()
        self.ops, self.switch = experts.ops, switch
        self.scales = {leaf: own.scale for leaf, own in factors.items()}
        for leaf in ("gate_up_proj", "down_proj"):
            base = getattr(experts, leaf)
            setattr(self, f"{leaf}_base", _frozen(base))
            if leaf in factors:
                a, b = _stacked(base, factors[leaf])
                setattr(self, f"{leaf}_a", a)
                setattr(self, f"{leaf}_b", b)

    def forward(self, x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor) -> Tensor:
        """As `Experts.forward`."""
        return self.ops.experts(x_ND, index_NJ, weight_NJ, self.gate_up_proj, self.down_proj)

    def _weight(self, leaf: str) -> Matrix:
        base: Matrix = getattr(self, f"{leaf}_base")
        if leaf not in self.scales:
            return base
        return LowRank(base, getattr(self, f"{leaf}_a"), getattr(self, f"{leaf}_b"), self.switch, self.scales[leaf])

    @property
    def gate_up_proj(self) -> Matrix:
        """See `AdaptedLinear.weight`."""
        return self._weight("gate_up_proj")

    @property
    def down_proj(self) -> Matrix:
        """See `AdaptedLinear.weight`."""
        return self._weight("down_proj")


TRAINED = LanePair(0, 0)
"""The lane of every row of a model that is made trainable."""


def trainable_(model: Model, adapter: Adapter) -> Model:
    """Freeze the model, and put the adapter's factors beside its weights as parameters, which all rows then have.

    InputError for an adapter that does not fit, or that has factors of denoise alone."""
    adapter.check(model)
    if adapter.denoise is not None:
        raise InputError(f"{adapter.source} has factors of its own for denoise, which cannot be trained further here")
    model.requires_grad_(False)
    model.usual_lanes = TRAINED
    names = {module: name for name, module in model.named_modules()}
    stacks: dict[Experts, dict[str, Factors]] = {}
    for name, (owner, leaf) in targeted(model).items():
        if (own := adapter.factors.get(name)) is None:
            continue
        if isinstance(owner, Experts):
            stacks.setdefault(owner, {})[leaf] = own
        else:
            _set_module(model, names[owner], AdaptedLinear(getattr(owner, leaf), own, model.lane_switch))
    for experts, factors in stacks.items():
        _set_module(model, names[experts], AdaptedExperts(experts, factors, model.lane_switch))
    return model


def trained(model: Model, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Adapter:
    """The adapter that lies beside the weights of a model made `trainable_`, on the CPU in float32.

    `whole` makes a parameter whole that is shared among processes; then all of them must ask."""
    factors: dict[str, Factors] = {}
    for name, (owner, leaf) in targeted(model).items():
        weight = getattr(owner, leaf)
        if isinstance(weight, LowRank):
            a, b = (whole(part).detach()[0].float().cpu().clone() for part in (weight.a, weight.b))
            factors[name] = Factors(a, b, weight.scale)
    return Adapter(factors)


def _frozen(base: Matrix) -> Any:
    return nn.Parameter(base.detach(), requires_grad=False) if isinstance(base, Tensor) else base


def _stacked(base: Matrix, factors: Factors) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters of one lane, where the base lies."""
    device = tensors_of(base)[0].device
    a, b = (nn.Parameter(part.detach().to(device, float32, copy=True)[None]) for part in factors[:2])
    return a, b


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
