"""training/vocabulary.py: losses and soft embeddings in groups of positions, against the whole computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.model.network import Model
from sfumato.training import vocabulary
from sfumato.training.loss import Corruption, Examples, losses, problem
from sfumato.training.objective import PLAIN, Objective
from sfumato.training.vocabulary import (
    LossTerms,
    ObservedTokens,
    Teacher,
    cross_entropies,
    cross_entropy_sum,
    read_out,
    soft_embedding,
)

V, D, N = 509, 24, 21
CONFIG = tiny_config(vocab_size=V)


class WidestLogits(TorchDispatchMode):
    """The most numbers of a tensor whose last axis is the vocabulary, the read-out matrix left aside."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.dim() and one.shape[-1] == V and one.shape != (D, V):
                self.most = max(self.most, one.numel())
        return out


def whole(model: Model, hidden: Tensor, target: Tensor, observed: ObservedTokens | None) -> Tensor:
    logits = model.logits(hidden)
    if observed is not None:
        logits = logits.scatter_add(1, observed.token_N[:, None], observed.bonus_N[:, None])
    return F.cross_entropy(logits, target, reduction="sum", ignore_index=-100)


def grouped(model: Model, hidden: Tensor, target: Tensor, observed: ObservedTokens | None) -> Tensor:
    return cross_entropies(model, hidden, target, LossTerms(observed)).objective


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("is_observed", [False, True])
@pytest.mark.parametrize("group", [1, 4, N, 100])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, has_head: bool, is_observed: bool, group: int) -> None:
    monkeypatch.setattr(vocabulary, "GROUP", group * V)
    model = tiny_model(tiny_config(vocab_size=V, has_head=has_head), name="fused").requires_grad_(True)
    draws = torch.Generator().manual_seed(1)
    hidden = (torch.randn(N, D, generator=draws) * 20).requires_grad_()
    target = torch.randint(V, (N,), generator=draws)
    target[::5] = -100
    observed = ObservedTokens(torch.randint(V, (N,), generator=draws), torch.rand(N, generator=draws) * 9)
    results: list[tuple[Tensor, ...]] = []
    for run in (grouped, whole):
        hidden.grad = model.head_VD.grad = None
        total = run(model, hidden, target, observed if is_observed else None)
        (3 * total).backward()
        assert hidden.grad is not None and model.head_VD.grad is not None
        results.append((total.detach(), hidden.grad.clone(), model.head_VD.grad.clone()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize("has_floor", [False, True])
@pytest.mark.parametrize("group", [4, 100])
def test_further_terms(monkeypatch: pytest.MonkeyPatch, has_teacher: bool, has_floor: bool, group: int) -> None:
    """Values and gradients against float64."""
    monkeypatch.setattr(vocabulary, "GROUP", group * V)
    model, draws = tiny_model(CONFIG, name="fused").requires_grad_(True), torch.Generator().manual_seed(1)
    hidden, teacher = (torch.randn(N, D, generator=draws) * 20 for _ in range(2))
    target, floor = torch.randint(V, (N,), generator=draws), torch.rand(N, generator=draws) * 12
    target[::5], floor[1::4] = -100, torch.inf
    terms = LossTerms(None, Teacher(teacher, 0.7) if has_teacher else None, floor if has_floor else None)
    hidden.requires_grad_()
    ours = cross_entropies(model, hidden, target, terms)

    double, head = hidden.detach().double().requires_grad_(), model.head_VD.detach().double().requires_grad_()
    cap = CONFIG.softcap
    log_p = (cap * torch.tanh(double @ head.mT / cap)).log_softmax(-1)
    nats = F.nll_loss(log_p, target, reduction="none", ignore_index=-100)
    q = (cap * torch.tanh(teacher.double() @ head.detach().mT / cap)).softmax(-1)
    soft = -(q * log_p).sum(-1)[target >= 0].sum() if has_teacher else torch.tensor(0.0).double()
    is_counted = (target >= 0) & ((nats > floor) if has_floor else True)
    targets = (nats - floor if has_floor else nats)[is_counted].sum()
    assert (target >= 0).sum() > is_counted.sum() > 0 or not has_floor
    for actual, expected in (
        (ours.targets, targets),
        (ours.teachers, soft),
        (ours.objective, targets + 0.7 * soft),
        (ours.nats_N, nats),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert ours.is_right_N.equal(log_p.argmax(-1) == target)
    for actual, expected in zip(
        torch.autograd.grad(ours.objective, (hidden, model.head_VD)),
        torch.autograd.grad(targets + 0.7 * soft, (double, head)),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [4, 100])
def test_read_out(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(vocabulary, "GROUP", group * V)
    model, hidden = tiny_model(CONFIG, name="fused").requires_grad_(True), torch.randn(N, D)
    logits = model.logits(hidden)
    read = read_out(model, hidden)
    soft = model.ops.soft_embedding(logits, model.embed_tokens.weight, model.embed_scale)
    torch.testing.assert_close(read.soft_ND, soft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.entropy_N, torch.distributions.Categorical(logits=logits).entropy())
    assert read.argmax_N.equal(logits.argmax(-1)) and not read.soft_ND.requires_grad


def test_what_needs_no_gradient_gets_none() -> None:
    model = tiny_model(CONFIG, name="fused")
    hidden, target = torch.randn(N, D), torch.zeros(N, dtype=torch.long)
    assert not cross_entropy_sum(model, hidden, target).requires_grad
    assert not soft_embedding(model, hidden.view(3, 7, D).requires_grad_()).requires_grad
    hidden.requires_grad_()
    cross_entropy_sum(model, hidden, target).backward()
    assert hidden.grad is not None and model.head_VD.grad is None


@pytest.mark.parametrize("group", [4, 100])
def test_soft_embedding(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Its gradient is that of the embedding which the probabilities mix, not of the logits."""
    monkeypatch.setattr(vocabulary, "GROUP", group * V)
    model = tiny_model(CONFIG, name="fused").requires_grad_(True)
    hidden, slope = torch.randn(3, 7, D), torch.randn(3, 7, D)
    expected = model.ops.soft_embedding(model.logits(hidden).detach(), model.embed_tokens.weight, model.embed_scale)
    (expected_grad,) = torch.autograd.grad(expected, model.embed_tokens.weight, slope)
    soft = soft_embedding(model, hidden)
    (grad,) = torch.autograd.grad(soft, model.embed_tokens.weight, slope)
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "objective", [PLAIN, Objective(leave_one_out=True), Objective(revision_penalty=1.0, self_distillation=1.0)]
)
def test_the_logits_of_a_batch_never_exist_whole(monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    monkeypatch.setattr(vocabulary, "GROUP", 5 * V)
    examples = Examples(torch.randint(6, V, (2, 30)), [30, 25], [4, 6], [False, True])
    dice = Corruption.draw(2, CONFIG.canvas_length, V, torch.Generator().manual_seed(1), steps=1)
    batch = problem(examples, dice, CONFIG.canvas_length, eos=1)
    model = tiny_model(CONFIG, name="fused").requires_grad_(True)
    with WidestLogits() as widest:  # type: ignore[no-untyped-call]
        sum(losses(model, batch, objective)).backward()  # type: ignore[union-attr]
    assert 0 < widest.most <= 5 * V
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_in_bfloat16_it_is_no_further_from_float32_than_the_whole_computation() -> None:
    model = tiny_model(CONFIG, name="fused").requires_grad_(True)
    hidden, target = (torch.randn(N, D) * 5).requires_grad_(), torch.randint(V, (N,))
    exact = torch.autograd.grad(whole(model, hidden, target, None), (hidden, model.head_VD))
    actual = []
    for run in (whole, grouped):
        with torch.autocast("cpu", torch.bfloat16):
            total = run(model, hidden, target, None)
        actual.append(torch.autograd.grad(total, (hidden, model.head_VD)))
    for plain, ours, right in zip(*actual, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).norm() <= 1.5 * (plain - right).norm()
