"""evals/harness.py, harness_requests.py and harness_model.py: what lm-eval asks, and its items as answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato import LLM, Options
from sfumato.errors import InputError
from sfumato.evals.harness import answers_of, check_installed, harness_answers
from sfumato.evals.harness_requests import HarnessRequests
from sfumato.evals.tasks import seeded

TASK = Path(__file__).parents[1] / "lm_eval_task"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def test_requests_are_answered_as_the_model_answers_them(llm: LLM) -> None:
    counts: list[int] = []
    requests = HarnessRequests(llm, Options(seed=3, max_steps=2), 2, counts.append)
    pairs = [("12", "34"), ("12", "43"), ("5", " 6")]
    scores = [llm.score(*pair) for pair in pairs]
    results = requests.likelihoods(pairs)
    assert [value for value, _ in results] == pytest.approx([one.logprob for one in scores], abs=1e-4)
    assert [is_greedy for _, is_greedy in results] == [one.is_greedy for one in scores]
    assert counts == [2, 1] and requests.seconds > 0 and requests.usages.keys() == {"12", "5"}
    assert requests.usages["12"].prompt_tokens == sum(one.usage.prompt_tokens for one in scores[:2])
    assert requests.text_likelihoods(["1234"]) == pytest.approx([llm.score("1234").logprob], abs=1e-4)


def test_texts_end_where_the_task_says(llm: LLM) -> None:
    options = Options(seed=3, max_steps=2)
    requests = HarnessRequests(llm, options, 8, lambda _: None)
    plain, cut, short = requests.texts(
        [("1", {}), ("1", {"until": ["3", ""]}), ("1", {"until": "3", "max_gen_toks": 4})]
    )
    assert plain == llm.complete("1", options=seeded(Options(seed=3, max_steps=2, max_tokens=256), "1")).text
    assert "3" in plain and "3" not in cut and plain.startswith(cut)
    assert len(short) <= 4


def sample(doc_id: int, acc: Any, filter_name: str = "none", **more: Any) -> dict[str, Any]:
    metrics = ["perplexity", "acc", *more]
    values = {"perplexity": 3.5, "acc": acc, **more}
    arguments = [(f"text {doc_id}", "a"), (f"text {doc_id}", "b")]
    return (
        {
            "doc_id": doc_id,
            "doc": {"q": doc_id},
            "arguments": arguments,
            "filtered_resps": [("x", -1.23456)],
            "filter": filter_name,
        }
        | {"metrics": metrics}
        | values
    )


def test_items_become_answers() -> None:
    samples = [sample(1, 0.0, acc_norm=1.0), sample(0, 1, acc_norm=0.0), sample(0, 0, "strict", acc_norm=0.0)]
    first, second = answers_of("digits", samples)
    assert (first.item, first.is_right, first.measures) == ('{"q": 0}', True, {"acc_norm": 0.0})
    assert (second.item, second.is_right, second.text) == ('{"q": 1}', False, '[["x", -1.235]]')
    with pytest.raises(
        InputError, match=r"the task digits says of no item that it is right or wrong \(perplexity, acc\)"
    ):
        answers_of("digits", [sample(0, 0.5)])
    with pytest.raises(InputError, match=r"of no item .* \(none\)"):
        answers_of("digits", [])


def test_without_the_package_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="lm-eval is not installed; it comes with the extra evals: pip install"):
        check_installed()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra evals")
def test_a_task_of_the_package_is_run(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DO_NOT_TRACK":
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(TASK)
    results = harness_answers(llm, "digits.yaml", Options(seed=1), count=4)
    [(name, answers)] = results.items()
    assert name == "sfumato_digits" and len(answers) == 4
    for answer in answers:
        document = json.loads(answer.item)
        scores = [llm.score(document["question"], choice).logprob for choice in document["choices"]]
        assert answer.is_right == (scores.index(max(scores)) == document["answer"])
        assert answer.measures.keys() == {"acc_norm"} and answer.passes == 4 and answer.cost_seconds > 0
    with pytest.raises(InputError, match="lm-eval has no task 'nothing'"):
        harness_answers(llm, "nothing", Options(seed=1))
