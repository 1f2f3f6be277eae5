"""training/loss.py, train.py: the objective against its definition; a training loop goes on where it was cut."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato import ops
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.shards import read_tensors, write_tensors
from sfumato.cli import main
from sfumato.errors import CheckpointError, InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.training.data import Source, SudokuSource
from sfumato.training.loss import IGNORE, Corruption, Examples, Problem, losses, problem
from sfumato.training.objective import Objective
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.train import StepReport, Trainer, recipe_of

L = 8
EOS = 1


def batch(
    counts: tuple[int, ...] = (14, 21), prompts: tuple[int, ...] = (5, 6), cut: tuple[bool, ...] = (False, False)
) -> Examples:
    draws = torch.Generator().manual_seed(3)
    tokens = torch.randint(6, 61, (len(counts), max(counts)), generator=draws)
    for row, count in enumerate(counts):
        tokens[row, count:] = 0
    return Examples(tokens, list(counts), list(prompts), list(cut))


def corruption_of(size: int, seed: int = 0, share: float = 0.5) -> Corruption:
    return Corruption.draw(size, L, 61, torch.Generator().manual_seed(seed), share)


def trainable() -> Model:
    return tiny_model().requires_grad_(True)


def test_the_chosen_canvas_is_filled_with_eos_and_its_start_counts_whole_canvases() -> None:
    examples = batch()
    corruption = dataclasses.replace(
        corruption_of(2), canvas_B=torch.tensor([0.9, 0.9]), level_B=torch.tensor([1e-9, 1e-9])
    )
    noisy = problem(examples, corruption, L, EOS)
    assert noisy.starts == [5 + L, 6 + L]  # 9 and 15 tokens of response: two canvases each, 0.9 picks the second
    assert noisy.canvas_BL[0].tolist() == [examples.tokens_BT[0, 13].item()] + [EOS] * 7
    assert noisy.target_BL.equal(noisy.canvas_BL)
    first = problem(examples, dataclasses.replace(corruption, canvas_B=torch.tensor([0.0, 0.49])), L, EOS)
    assert first.starts == [5, 6]
    assert first.canvas_BL[0].equal(examples.tokens_BT[0, 5:13])


def test_a_cut_example_has_no_target_behind_its_end() -> None:
    corruption = dataclasses.replace(corruption_of(2), canvas_B=torch.tensor([0.9, 0.9]))
    noisy = problem(batch(cut=(True, False)), corruption, L, EOS)
    assert noisy.target_BL[0].tolist()[1:] == [IGNORE] * 7
    assert (noisy.target_BL[1] != IGNORE).all()


def test_noise_replaces_about_the_share_of_positions_it_should() -> None:
    size = 400
    examples = batch(counts=(14,) * size, prompts=(5,) * size, cut=(False,) * size)
    corruption = dataclasses.replace(corruption_of(size), level_B=torch.full((size,), 0.7))
    noisy = problem(examples, corruption, L, EOS)
    changed = (noisy.canvas_BL != noisy.target_BL).float().mean().item()
    assert abs(changed - 0.7 * 60 / 61) < 0.03  # uniform noise hits the true token once in 61


def by_hand(model: Model, noised: Problem, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """The objective row by row, without batching, padding or a shared cache."""
    diffusion, encode, predicted = [], [], 0
    for n, (row, start) in enumerate(zip(noised.rows, noised.starts, strict=True)):
        cache = KVCache.allocate(model.config, 1, 64)
        model.encode(noised.tokens_BT[row : row + 1, :start], cache)
        soft = None
        canvas = noised.canvas_BL[n : n + 1]
        if n < noised.conditioned:
            logits = model.logits(model.denoise(canvas, cache)).detach()
            soft = torch.softmax(logits, -1) @ model.embed_tokens.weight * model.embed_scale
        logits = model.logits(model.denoise(canvas, cache, soft))[0]
        if leave_one_out:
            kept = 1 - noised.level_B[n]
            logits = logits + torch.log(1 + 61 * kept / (1 - kept)) * F.one_hot(canvas[0], 61)
        diffusion.append(F.cross_entropy(logits, noised.target_BL[n], ignore_index=IGNORE, reduction="none"))
    for row, count in enumerate(noised.counts):
        tokens = noised.tokens_BT[row : row + 1, :count]
        logits = model.logits(model.encode(tokens, KVCache.allocate(model.config, 1, 64)))[0, :-1]
        encode.append(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        predicted += count - 1
    known = (noised.target_BL != IGNORE).sum()
    return torch.stack(diffusion).sum() / known, torch.stack(encode).sum() / predicted


@pytest.mark.parametrize("encode_response", [True, False])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_losses_equal_the_objective_written_row_by_row(
    encode_response: bool, repeats: int, leave_one_out: bool
) -> None:
    model = tiny_model()
    noised = problem(batch(cut=(True, False)), corruption_of(2 * repeats, seed=5), L, EOS, encode_response)
    actual = losses(model, noised, Objective(leave_one_out))
    for ours, theirs in zip(actual, by_hand(model, noised, leave_one_out), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_gradients_flow_through_the_cache_and_not_through_the_first_pass() -> None:
    model = trainable()
    noised = problem(batch(), corruption_of(2, share=0.0), L, EOS)
    losses(model, noised)[0].backward()
    prompt_only = noised.tokens_BT[0, 0]
    grad = model.embed_tokens.weight.grad
    assert grad is not None and grad[prompt_only].abs().sum() > 0
    key = model.layers[0].get_parameter("self_attn.k_proj.weight")
    assert key.grad is not None and key.grad.abs().sum() > 0
    gate = model.get_parameter("self_conditioning.gate_proj.weight")
    assert gate.grad is not None and gate.grad.abs().sum() == 0  # no row is conditioned: zeros in, no gradient out
    model.zero_grad()
    losses(model, problem(batch(), corruption_of(2, share=1.0), L, EOS))[0].backward()
    assert gate.grad.abs().sum() > 0


def source_of(tokens: Examples) -> Source:
    class Random:
        def batch(self, step: int, size: int, device: torch.device) -> Examples:
            draws = torch.Generator().manual_seed(step)
            return dataclasses.replace(
                tokens, tokens_BT=torch.randint(6, 61, tokens.tokens_BT.shape, generator=draws).to(device)
            )

        def describe(self) -> dict[str, Any]:
            return {}

    return Random()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_continues_exactly(tmp_path: Path, optimizer: str) -> None:
    recipe = TrainingRecipe(steps=6, batch=2, lr=3e-3, warmup=2, optimizer=optimizer, encode_response_every=2)
    whole = trainable()
    log = list(Trainer(whole, source_of(batch()), recipe, tmp_path / "whole").run())
    first = Trainer(trainable(), source_of(batch()), recipe, tmp_path / "parts")
    for progress in first.run():
        if progress.step == 3:
            break
    again = Trainer(trainable().init_(9), source_of(batch()), recipe, tmp_path / "parts")
    assert again.step == 3
    rest = list(again.run())
    assert [p.step for p in rest] == [4, 5, 6]
    for name, value in again.model.state_dict().items():
        assert value.equal(whole.state_dict()[name]), name
    assert [p.diffusion_loss for p in rest] == [p.diffusion_loss for p in log[3:]]
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
    assert recipe_of(tmp_path / "parts") == recipe


def test_log_lines_past_the_last_save_are_forgotten(tmp_path: Path) -> None:
    recipe = TrainingRecipe(steps=3, batch=2)
    list(Trainer(trainable(), source_of(batch()), recipe, tmp_path).run())
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4}) + "\n")
    Trainer(trainable(), source_of(batch()), recipe, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_lines_that_a_kill_tore_or_doubled_are_forgotten(tmp_path: Path) -> None:
    """Also where it came before the first save, and of the checks too."""
    recipe = TrainingRecipe(steps=3, batch=2)
    list(Trainer(trainable(), source_of(batch()), recipe, tmp_path).run())
    log, evals = tmp_path / "log.jsonl", tmp_path / "evals.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b'{"step": 1, "old": 1}\n' + whole + b'\n[1]\n{"step": "4"}\n{"step": 4}\n\xff{"step": 2, "diff')
    evals.write_text('{"step": 2, "rate": 1}\n{"step": 9}\n{"st')
    Trainer(trainable(), source_of(batch()), recipe, tmp_path)
    assert log.read_bytes() == whole and evals.read_text() == '{"step": 2, "rate": 1}\n'
    before = log.stat().st_mtime_ns
    Trainer(trainable(), source_of(batch()), recipe, tmp_path)
    assert log.stat().st_mtime_ns == before
    (tmp_path / "state.safetensors").unlink()
    list(Trainer(trainable(), source_of(batch()), recipe, tmp_path).run())
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    assert evals.read_text() == ""


def test_a_step_that_is_half_taken_is_not_saved(tmp_path: Path) -> None:
    """Else some weights would take it twice."""
    recipe = TrainingRecipe(steps=3, batch=2, optimizer="muon")
    trainer = Trainer(trainable(), source_of(batch()), recipe, tmp_path)
    run = trainer.run()
    next(run)
    trainer.save()

    def stop() -> None:
        raise KeyboardInterrupt

    trainer.optimizers[1].step = stop  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        next(run)
    again = Trainer(trainable().init_(9), source_of(batch()), recipe, tmp_path)
    whole = trainable()
    list(Trainer(whole, source_of(batch()), recipe, tmp_path / "whole").run())
    list(again.run())
    assert again.step == 3 and all(whole.state_dict()[n].equal(t) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize("note", [{}, {"step": "1"}, {"step": "x", "recipe": "{}"}, {"step": "1", "recipe": "[1]"}])
def test_a_file_that_is_no_state_is_one_sentence(tmp_path: Path, note: dict[str, str]) -> None:
    model = trainable()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    write_tensors(tmp_path / "state.safetensors", tensors, note)
    for call in (lambda: recipe_of(tmp_path), lambda: Trainer(model, source_of(batch()), TrainingRecipe(), tmp_path)):
        with pytest.raises(CheckpointError, match="is not the state of a run; choose another folder or remove it"):
            call()


# ---- on the command line --------------------------------------------------------------------------------------------


def started(out: Path) -> subprocess.Popen[str]:
    """`sfumato finetune` on nano, small and long."""
    command = [sys.executable, "-c", "import sys; from sfumato.cli import main; sys.exit(main())", "finetune", str(out)]
    command += ["--pool", "60", "--eval-every", "0", "-s", "steps=500", "-s", "batch=2", "-s", "warmup=1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(out: Path) -> list[int]:
    log = out / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def _is_past(out: Path, count: int) -> bool:
    return len(lines_of(out)) > count


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    process = started(out)
    until(lambda: len(lines_of(out)) >= 3)
    second = started(out)
    _, output = second.communicate(timeout=120)
    assert second.returncode == 1 and f"another process is writing {out}; wait" in output
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    steps = lines_of(out)
    assert process.returncode == code and "saved; the same command goes on from here" in output
    assert recipe_of(out).steps == 500 and steps == list(range(1, len(steps) + 1))
    assert read_tensors(out / "state.safetensors")[1]["step"] == str(len(steps))
    assert (out / "checkpoint" / "model.safetensors").exists() and os.listdir(tmp_path) == ["run"]
    process = started(out)
    until(lambda: len(lines_of(out)) >= len(steps) + 2)
    process.send_signal(number)
    assert f"going on from step {len(steps)} of 500" in process.communicate(timeout=120)[1]
    assert lines_of(out) == list(range(1, len(lines_of(out)) + 1))


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_state_that_goes_on(tmp_path: Path) -> None:
    """SIGKILL, eight times: before the first save, and in the middle of saves, of which there is one a step."""
    out, draws, reached = tmp_path / "run", random.Random(1), 0
    code = "import sys; from sfumato.training.train import TrainerSetting; from sfumato.cli import main\n"
    code += "plain = TrainerSetting.__init__\n"
    code += "TrainerSetting.__init__ = lambda *a, **k: plain(*a, **{**k, 'checkpoint_seconds': 0.0})\nsys.exit(main())"
    arguments = ["finetune", str(out), "--pool", "60", "--eval-every", "0", "-s", "steps=500", "-s", "batch=2"]
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
        if turn:
            until(partial(_is_past, out, reached))
        time.sleep(draws.uniform(0, 0.3) if turn else 0.5)
        process.kill()
        output = process.communicate()[1]
        assert f"going on from step {reached} of 500" in output or not reached
        state = out / "state.safetensors"
        reached = int(read_tensors(state)[1]["step"]) if state.exists() else 0
    assert reached > 3
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    until(lambda: len(lines_of(out)) > reached + 1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] is not None and process.returncode == 143
    assert lines_of(out) == list(range(1, len(lines_of(out)) + 1))
    files = ["README.md", "checkpoint", "log.jsonl", "loss.png", "run.json", "samples.md", "state.safetensors"]
    assert sorted(os.listdir(out)) == files


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "log.jsonl").write_text("mine")
    assert main(["finetune", str(tmp_path)]) == 2
    assert "holds notes.txt and no run to go on with; give another folder, or --force" in capsys.readouterr().err
    arguments = ["finetune", str(tmp_path), "-s", "steps=1", "-s", "batch=2", "--pool", "60", "--eval-every", "0"]
    assert main([*arguments, "--force"]) == 0 and lines_of(tmp_path) == [1]
    assert main([*arguments]) == 0 and lines_of(tmp_path) == [1] and "going on from step 1" in capsys.readouterr().err
    assert (
        main([*arguments, "--force"]) == 0 and lines_of(tmp_path) == [1] and "going on" not in capsys.readouterr().err
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_quantised_checkpoint_is_trained_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it: codes would stay as they are, and could not be saved at the end."""
    quantised, out = str(tmp_path / "quantised"), tmp_path / "run"
    assert main(["quantize", "nano", "--to", "int8", "-o", quantised]) == 0
    arguments = ["-s", "steps=1", "-s", "batch=2", "--pool", "60", "--eval-every", "0"]
    assert main(["finetune", str(out), "-m", quantised, *arguments]) == 0
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    before, after = (open_checkpoint(place).entries[name] for place in (Path(quantised), out / "checkpoint"))
    assert after.stored == "F32" and not torch.equal(before.read(0, 8), after.read(0, 8))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert main(["finetune", str(tmp_path / "other"), "-m", str(tmp_path / "a.gguf")]) == 2
    assert "begins from a folder; write one: sfumato convert" in capsys.readouterr().err


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    recipe = TrainingRecipe(steps=1, batch=2)
    list(Trainer(trainable(), source_of(batch()), recipe, tmp_path).run())
    other = Model(tiny_config(hidden_size=32), ops.load("reference")).init_()
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(other, source_of(batch()), recipe, tmp_path)


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    class Same:
        def batch(self, step: int, size: int, device: torch.device) -> Examples:
            return batch()

        def describe(self) -> dict[str, Any]:
            return {}

    log = list(Trainer(trainable(), Same(), TrainingRecipe(steps=40, batch=2, lr=1e-2, warmup=4), tmp_path).run())

    def mean(part: Sequence[StepReport], name: str) -> float:
        return sum(float(getattr(report, name)) for report in part) / len(part)

    for name in ("diffusion_loss", "encode_loss"):
        assert mean(log[-8:], name) < 0.6 * mean(log[:8], name)


def test_the_schedule_warms_up_holds_and_decays() -> None:
    recipe = TrainingRecipe(steps=100, lr=1.0, warmup=10, hold=50, floor=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[49] == 1.0
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("wrong", [{"optimizer": "sgd"}, {"precision": "int8"}, {"steps": 0}, {"batch": 0}])
def test_an_impossible_recipe_is_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainingRecipe(**wrong)


def test_the_sudoku_source_gives_prompt_and_solution_as_the_chat_does() -> None:
    from sfumato.checkpoints.locate import resolve
    from sfumato.tasks.sudoku import is_solved, prompt
    from sfumato.text.template import ChatTemplate
    from sfumato.text.tokenizer import Tokenizer

    folder = resolve("nano")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer.special)
    source = SudokuSource(tokenizer, template, pool=4)
    examples = source.batch(3, 5, torch.device("cpu"))
    for row in range(5):
        ids = examples.tokens_BT[row].tolist()
        text = tokenizer.decode(ids[: examples.prompts[row]])
        puzzle = "".join(c for c in text if c.isdigit())
        assert ids[: examples.prompts[row]] == template.encode(tokenizer, [{"role": "user", "content": prompt(puzzle)}])
        assert is_solved(tokenizer.decode(ids[examples.prompts[row] :]), puzzle)
        assert ids[-1] == tokenizer.id("<turn|>")
    assert examples.tokens_BT.equal(source.batch(3, 5, torch.device("cpu")).tokens_BT)
    assert not examples.tokens_BT.equal(source.batch(4, 5, torch.device("cpu")).tokens_BT)


def test_a_precision_is_a_dtype_in_any_spelling() -> None:
    assert TrainingRecipe(precision="bf16") == TrainingRecipe(precision="bfloat16")
