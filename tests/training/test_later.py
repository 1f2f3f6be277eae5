"""training/later.py, objective.py: a penalty on revisions, and predictions drawn towards later ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import RaggedSource, model_of, recipe_of
from tiny import one_thread, tiny_model
from torch import Tensor

from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.loss import IGNORE, Corruption, Examples, LossSums, Problem, loss_sums, losses, problem
from sfumato.training.objective import PLAIN, Objective
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.train import Trainer

L, V, EOS, STEPS = 8, 61, 1, 2
BOTH = Objective(revision_penalty=2.0, self_distillation=0.5, distillation_steps=STEPS)


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def examples() -> Examples:
    tokens = torch.randint(6, V, (3, 30), generator=torch.Generator().manual_seed(3))
    return Examples(tokens, [14, 30, 12], [5, 3, 11], [False, True, False])


def dice(steps: int = STEPS, canvases: int = 6) -> Corruption:
    return Corruption.draw(canvases, L, V, torch.Generator().manual_seed(1), 0.5, steps)


def noised() -> Problem:
    return problem(examples(), dice(), L, EOS)


def sure_model(name: str = "reference") -> Model:
    """Sure enough for a step to accept several positions, and right at some of them."""
    return tiny_model(name=name, sharp=5.0, mix=0.4)


def logits_of(model: Model, hidden_LD: Tensor, canvas_L: Tensor, kept: Tensor | None) -> Tensor:
    """In float64, from the hidden states on."""
    cap = model.config.softcap
    logits = cap * torch.tanh(hidden_LD.double() @ model.head_VD.double().mT / cap)
    if kept is not None:
        logits = logits + torch.log(1 + V * kept / (1 - kept)) * F.one_hot(canvas_L, V)
    return logits


def soft_of(model: Model, logits_LV: Tensor) -> Tensor:
    embedded: Tensor = logits_LV.detach().softmax(-1).float() @ model.embed_tokens.weight * model.embed_scale
    return embedded


def accepted(logits_LV: Tensor) -> Tensor:
    """The longest run of lowest entropies of which all but the last sum to 0.1 nats at most."""
    entropies = torch.distributions.Categorical(logits=logits_LV).entropy().tolist()
    is_accepted, total = [False] * L, 0.0
    for place in sorted(range(L), key=lambda place: entropies[place]):
        if total > 0.1:
            break
        is_accepted[place] = True
        total += entropies[place]
    return torch.tensor(is_accepted)


def by_hand(model: Model, batch: Problem, corruption: Corruption, objective: Objective) -> dict[str, Tensor]:
    """The terms of the denoise passes row by row, without batching, from the definition; and the steps' acceptances."""
    terms: dict[str, list[Tensor]] = {"diffusion": [], "revision": [], "distillation": [], "accepted": []}
    for n, (row, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
        cache = KVCache.allocate(model.config, 1, 64)
        model.encode(batch.tokens_BT[row : row + 1, :start], cache)

        def denoise(canvas: Tensor, soft: Tensor | None, cache: KVCache = cache) -> Tensor:
            return model.denoise(canvas[None], cache, None if soft is None else soft[None])[0]

        canvas, target, level = batch.canvas_BL[n], batch.target_BL[n], batch.level_B[n]
        is_target = target != IGNORE
        x = target.clamp_min(0)[:, None]
        kept = 1 - level if objective.leave_one_out else None
        first = logits_of(model, denoise(canvas, None), canvas, None)
        hidden = denoise(canvas, soft_of(model, first) if n < batch.conditioned else None)
        plain = logits_of(model, hidden, canvas, None)
        logits = logits_of(model, hidden, canvas, kept)
        log_p = logits.log_softmax(-1)
        terms["diffusion"].append(-log_p.gather(1, x)[is_target].sum())

        clean = torch.where(corruption.keep_BL[n] < level, target.masked_fill(~is_target, EOS), canvas)
        later_level = level * corruption.later_B[n]
        later_canvas = torch.where(corruption.keep_BL[n] < later_level, corruption.noise_BL[n], clean)
        later_kept = 1 - later_level if objective.leave_one_out else None
        later = logits_of(model, denoise(later_canvas, soft_of(model, plain)), later_canvas, later_kept)
        loss = (log_p.detach() - later.log_softmax(-1)).gather(1, x)[:, 0].clamp_min(0)
        terms["revision"].append(loss[is_target & (logits.argmax(-1) == target)].sum())

        with torch.no_grad():
            state = plain
            for step in range(objective.distillation_steps):
                is_accepted = accepted(state)
                terms["accepted"].append(is_accepted.sum())
                following = torch.where(is_accepted, state.argmax(-1), corruption.renoise_BKL[n, step])
                state = logits_of(model, denoise(following, soft_of(model, state)), following, None)
        terms["distillation"].append(-(state.softmax(-1) * log_p).sum(-1)[is_target].sum())
    return {name: torch.stack(values) if name == "accepted" else torch.stack(values).sum()
            for name, values in terms.items()}  # fmt: skip


@pytest.mark.parametrize("objective", [BOTH, Objective(leave_one_out=True, revision_penalty=3.0)])
def test_values_and_gradients_are_those_of_the_definition(objective: Objective) -> None:
    batch, corruption, gradients = noised(), dice(), []
    model = sure_model().requires_grad_(True)
    expected = by_hand(model, batch, corruption, objective)
    assert expected["revision"] > 0 and 1 < expected["accepted"].double().mean() < L
    weights = {"diffusion": 1.0, "revision": objective.revision_penalty, "distillation": objective.self_distillation}
    whole = torch.stack([weight * expected[name] for name, weight in weights.items()]).sum()
    sums = loss_sums(model, batch, objective)
    for name, weight in weights.items():
        if weight:
            torch.testing.assert_close(getattr(sums, name).double(), expected[name], rtol=1e-4, atol=1e-4)
        else:
            assert getattr(sums, name) == 0
    for total in (whole, sums.denoise):
        model.zero_grad()
        total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=2e-3, atol=2e-4 * float(grad.abs().max() + 1))


def test_off_it_takes_the_same_passes_and_draws_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    denoise = Model.denoise

    def counting(self: Model, *arguments: object, **named: object) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return denoise(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "denoise", counting)
    costs = {
        PLAIN: [False, True],
        Objective(revision_penalty=1.0): [False, True, True],
        Objective(self_distillation=1.0, distillation_steps=STEPS): [False, True, *[False] * STEPS],
    }
    model = tiny_model(name="fused").requires_grad_(True)
    for objective, expected in costs.items():
        passes.clear()
        loss_sums(model, noised(), objective)
        assert passes == expected, objective
    some, none = dataclasses.asdict(dice()), dataclasses.asdict(dice(steps=0))
    assert some.pop("renoise_BKL").shape == (6, STEPS, L) and none.pop("renoise_BKL").shape == (6, 0, L)
    assert all(torch.equal(torch.as_tensor(some[name]), torch.as_tensor(none[name])) for name in none)
    plain, (denoise_loss, _) = loss_sums(model, noised()), losses(model, noised())
    assert plain.denoise.equal(plain.diffusion) and plain.revision == plain.distillation == 0
    assert denoise_loss.equal(plain.diffusion / plain.diffusion_count)


def test_the_later_canvas_has_the_same_noise_at_fewer_positions() -> None:
    corruption = dataclasses.replace(dice(), level_B=torch.full((6,), 0.9), later_B=torch.full((6,), 0.4))
    batch, clean = problem(examples(), corruption, L, EOS), dataclasses.replace(corruption, level_B=torch.zeros(6))
    clean_BL = problem(examples(), clean, L, EOS).canvas_BL
    is_changed = batch.later.canvas_BL != batch.canvas_BL
    torch.testing.assert_close(batch.later.level_B, torch.full((6,), 0.36))
    assert is_changed.any() and (batch.later.canvas_BL == clean_BL)[is_changed].all()
    is_kept = corruption.keep_BL >= batch.later.level_B[:, None]
    assert (batch.later.canvas_BL == torch.where(is_kept, clean_BL, corruption.noise_BL)).all()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_a_batch_add_up_to_it(ranks: int) -> None:
    model, corruption = sure_model("fused"), dice(canvases=6)
    whole = loss_sums(model, problem(examples(), corruption, L, EOS), BOTH)
    one = examples()
    both = Examples(torch.cat([one.tokens_BT, one.tokens_BT]), 2 * one.counts, 2 * one.prompts, 2 * one.is_cut)
    parts = [
        loss_sums(model, problem(both.part(rank, ranks), corruption.part(rank, ranks), L, EOS), BOTH)
        for rank in range(ranks)
    ]
    for name in ("denoise", "diffusion", "revision", "distillation"):
        total = torch.stack([getattr(one, name) for one in parts]).sum()
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-4, atol=1e-4)


def gradients_of(model: Model, sums: LossSums) -> list[Tensor]:
    grads = torch.autograd.grad(sum(sums.means()), [p for p in model.parameters() if p.requires_grad])  # type: ignore[arg-type]
    return list(grads)


@pytest.mark.parametrize("kind", ["full", "packed"])
def test_checkpointed_and_in_bfloat16(kind: str) -> None:
    """Gradients of all that is trained: the same bits where blocks run again, the same direction in half precision."""
    plain, again = model_of(kind), checkpoint_(model_of(kind))
    expected = gradients_of(plain, loss_sums(plain, noised(), BOTH))
    for one, other in zip(expected, gradients_of(again, loss_sums(again, noised(), BOTH)), strict=True):
        assert one.equal(other)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        sums = loss_sums(plain, noised(), BOTH)
    half = gradients_of(plain, sums)
    assert all(grad.dtype == torch.float32 for grad in half)
    one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (expected, half))
    assert F.cosine_similarity(one, other, dim=0) > 0.85  # a rounding may accept, or be right, elsewhere


def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    later = {"revision_penalty": 1.0, "self_distillation": 0.5, "distillation_steps": 2}
    recipe = dataclasses.replace(recipe_of("full", 4), **later)  # type: ignore[arg-type]
    whole = Trainer(model_of("full"), RaggedSource(), recipe, tmp_path / "whole")
    reports = list(whole.run())
    first = Trainer(model_of("full"), RaggedSource(), recipe, tmp_path / "cut")
    run = first.run()
    next(run), next(run)
    run.close()
    rest = Trainer(model_of("full"), RaggedSource(), recipe, tmp_path / "cut")
    for one, other in zip(reports[2:], rest.run(), strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    for name, value in whole.model.state_dict().items():
        assert value.equal(rest.model.state_dict()[name]), name
    with pytest.raises(InputError, match=r"revision_penalty is 0\.0 and this run began with 1\.0; leave it out"):
        Trainer(model_of("full"), RaggedSource(), recipe_of("full", 4), tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["revision_loss"] for line in lines] == [report.revision_loss for report in reports]
    plain = next(Trainer(model_of("full"), RaggedSource(), recipe_of("full", 1), tmp_path / "plain").run())
    assert plain.revision_loss is None and "revision_loss" not in (tmp_path / "plain" / "log.jsonl").read_text()


def test_the_command_line(tmp_path: Path) -> None:
    """Three steps of nano with everything that changes how a step is computed."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}", "response": f"{n}{n}"}) + "\n" for n in range(4)))
    sizes = ["--data", str(data), "-s", "steps=3", "-s", "batch=2", "--eval-every", "0", "--threads", "1"]
    terms = ["-s", "revision_penalty=0.5", "-s", "self_distillation=2"]
    saving = ["--lora", "2", "--accumulate", "2", "--precision", "bf16", "--checkpointing"]
    assert main(["finetune", "-m", "nano", "-o", str(tmp_path / "run"), *sizes, *terms, *saving]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["distillation_loss"] > 0 and line["revision_loss"] >= 0 for line in lines)
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (card["recipe"]["revision_penalty"], card["recipe"]["self_distillation"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision_penalty": -1.0}, r"revision_penalty is -1\.0; give a number from 0 to 1000"),
        ({"self_distillation": "much"}, "self_distillation is 'much'; give a number from 0 to 1000"),
        ({"distillation_steps": 0}, "distillation_steps is 0; give a whole number from 1 to 16"),
        ({"distillation_steps": 1.5}, r"distillation_steps is 1\.5; give a whole number from 1 to 16"),
        (
            {"self_distillation": 0.5, "leave_one_out": True},
            r"self_distillation is 0\.5 and leave_one_out true, .*; set self_distillation to 0, or leave_one_out to",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingRecipe(**changes)  # type: ignore[arg-type]
