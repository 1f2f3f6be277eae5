"""server/openai/echo.py: lm-eval's own `local-completions` runs a multiple-choice task on a server."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato import LLM
from sfumato.checkpoints.locate import NANO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "fastapi", "transformers")),
        reason="needs lm-eval with its API extra (pip install 'lm-eval[api]') beside the extra serve",
    ),
]
TASK = Path(__file__).parents[1] / "lm_eval_task"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "OPENAI_API_KEY": "none"}


def expected(llm: LLM, document: dict[str, Any]) -> list[tuple[float, bool]]:
    """The log-probability of each choice, and whether it is what greedy sampling writes."""
    before = llm.tokenizer.encode(document["question"])
    scores = []
    for choice in document["choices"]:
        whole = llm.tokenizer.encode(document["question"] + choice)
        scored = llm.score(whole[: len(before)], whole[len(before) :])
        scores.append((scored.logprob, scored.is_greedy))
    return scores


def test_a_task_of_choices(tmp_path: Path) -> None:
    environment = os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    serve = [sys.executable, "-m", "sfumato", "serve", "-m", "nano", "--port", "0", "--ops", "fused"]
    with subprocess.Popen(
        serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            match = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert match
            arguments = f"model=nano,base_url={match[0]}/v1/completions,tokenizer={NANO},num_concurrent=2"
            arguments += ",tokenizer_backend=huggingface"
            command = [
                sys.executable,
                "-m",
                "lm_eval",
                "run",
                "--model",
                "local-completions",
                "--model_args",
                arguments,
            ]
            command += ["--tasks", "sfumato_digits", "--include_path", str(TASK), "--log_samples"]
            command += ["--output_path", str(tmp_path / "out")]
            ended = subprocess.run(command, cwd=TASK, env=environment, capture_output=True, text=True, timeout=600)
            assert ended.returncode == 0, ended.stderr[-3000:]
        finally:
            server.terminate()
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len((TASK / "digits.jsonl").read_text().splitlines())
    llm = LLM.load("nano", ops="fused")
    for line in lines:
        ours = expected(llm, line["doc"])
        theirs = [(float(value), str(is_greedy) == "True") for value, is_greedy in line["filtered_resps"]]
        assert [value for value, _ in theirs] == pytest.approx([value for value, _ in ours], abs=1e-4)
        assert [flag for _, flag in theirs] == [flag for _, flag in ours]
        assert line["acc"] == float(max(range(4), key=lambda n: ours[n][0]) == line["doc"]["answer"])
