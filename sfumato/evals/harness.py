"""Tasks of lm-evaluation-harness, answered by a model here or behind a URL; the package comes with the extra `evals`.

Its multiple-choice and perplexity tasks ask how likely texts are, which one encode pass says; its text tasks are
continued as plain text, without a chat template. Each of its items becomes an answer like any other, right where the
task's first metric that is 0 or 1 says so, so that intervals and paired comparisons are the same. It lacks few-shot
options and chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.errors import InputError, missing_extra
from sfumato.evals.harness_requests import Advance, HarnessRequests
from sfumato.evals.tasks import TaskAnswer
from sfumato.events import Usage
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel


def check_installed() -> None:
    """InputError, which names the extra, where the package is not there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise missing_extra("lm-eval", "evals") from None


def harness_answers(
    llm: LanguageModel,
    name: str,
    options: Options,
    count: int | None = None,
    batch: int = 32,
    advance: Advance = lambda count: None,
) -> dict[str, list[TaskAnswer]]:
    """The answers to at most `count` items of a task, by the task's name; a group has several.

    `name` is the task's, or that of its YAML file. InputError where there is none, or where none of its metrics is 0 or
    1 for each item."""
    check_installed()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sfumato.evals.harness_model import harness_model

    requests = HarnessRequests(llm, options, batch, advance)
    seed = options.seed or 0
    try:
        loaded = TaskManager().load([name])
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"lm-eval has no task {name!r}: {error}") from None
    results = simple_evaluate(
        harness_model(requests),
        tasks=[*loaded["tasks"].values()],
        limit=count,
        bootstrap_iters=0,
        fewshot_random_seed=seed,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
    )
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = (results or {}).get("samples", {})
    groups = {task: answers_of(task, some, requests.usages) for task, some in samples.items()}
    passes = sum(answer.passes for answers in groups.values() for answer in answers)
    pace = requests.seconds / max(1, passes)
    return {task: [replace(one, cost_seconds=pace * one.passes) for one in some] for task, some in groups.items()}


def answers_of(
    task: str, samples: Sequence[Mapping[str, Any]], usages: Mapping[str, Usage] | None = None
) -> list[TaskAnswer]:
    """Answers from what lm-eval says of each item, in its order: those of its first filter alone.

    InputError where no metric is 0 or 1 for every item."""
    filters = [sample.get("filter") for sample in samples]
    some = [sample for sample, name in zip(samples, filters, strict=True) if name == filters[0]]
    names = (
        [name for name in some[0]["metrics"] if all(_is_verdict(sample.get(name)) for sample in some)] if some else []
    )
    if not names:
        metrics = ", ".join(some[0]["metrics"]) if some else "none"
        raise InputError(
            f"the task {task} says of no item that it is right or wrong ({metrics}); eval needs one that does"
        )
    answers = []
    for sample in sorted(some, key=lambda sample: int(sample["doc_id"])):
        texts = {str(arguments[0]) for arguments in sample["arguments"]}
        usage = Usage.total(usage for text in sorted(texts) if (usage := (usages or {}).get(text)) is not None)
        answers.append(
            TaskAnswer(
                json.dumps(sample["doc"], default=str),
                json.dumps(_rounded(sample["filtered_resps"]), default=str),
                bool(sample[names[0]]),
                usage.steps,
                usage.passes,
                usage.tokens,
                usage.seconds,
                measures={name: float(sample[name]) for name in names[1:]},
            )
        )
    return answers


def _is_verdict(value: Any) -> bool:
    return isinstance(value, int | float) and float(value) in (0.0, 1.0)


def _rounded(value: Any) -> Any:
    """Log-probabilities to three places, so that answers which differ by rounding alone are the same text."""
    if isinstance(value, list | tuple):
        return [*map(_rounded, value)]
    return round(value, 3) if isinstance(value, float) else value
