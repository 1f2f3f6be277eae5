"""templates/scores.py, on nano: texts and ids, continuations, and where a token's text stands."""

from __future__ import annotations

import asyncio

import pytest

from sfumato import LLM, Likelihood, Scored
from sfumato.errors import CapacityError, InputError
from sfumato.events import ScoredToken

TEXT = "Solve 020 hé∀😀 | 5"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano", ops="fused")


def logprobs(scored: Scored) -> list[float | None]:
    return [one.logprob for one in scored.tokens]


def test_a_whole_text_begins_with_a_token_that_has_none(llm: LLM) -> None:
    scored = llm.score(TEXT, top_logprobs=3, temperature=0)
    first, *others = scored.tokens
    assert (first.logprob, first.top, first.piece, first.offset) == (None, {}, "<bos>", 0)
    assert scored.text == TEXT and [one.token for one in scored.tokens] == list(llm.encode(TEXT).tokens)
    assert all(one.logprob is not None and one.logprob < 0 and len(one.top) == 3 for one in others)
    assert scored.logprob == pytest.approx(sum(one.logprob or 0 for one in others)) and not scored.is_greedy
    for one in others:
        if "�" not in one.piece:
            assert TEXT[one.offset :].startswith(one.piece)
    assert scored.following.is_likeliest and scored.following.offset == len(TEXT)
    assert scored.usage.prompt_tokens == len(scored.tokens) and scored.usage.passes == 1


def test_a_continuation_is_the_end_of_the_whole(llm: LLM) -> None:
    whole = llm.score(TEXT)
    for cut in (1, 6, len(TEXT) - 1):
        scored = llm.score(TEXT[:cut], TEXT[cut:])
        count = len(scored.tokens)
        assert logprobs(scored) == pytest.approx(logprobs(whole)[-count:], abs=1e-4)
        assert scored.text.endswith(TEXT[cut:]) and scored.tokens[0].offset == 0
    ids = list(llm.encode(TEXT).tokens)
    assert logprobs(llm.score(ids[:4], ids[4:])) == pytest.approx(logprobs(whole)[4:], abs=1e-4)
    assert llm.score(ids[:4], ids[4:]).usage.reused_tokens == 3  # not the fourth: what follows it is scored


def test_greedy_is_what_greedy_sampling_writes(llm: LLM) -> None:
    written = llm.complete("Solve", mode="autoregressive", temperature=0, max_tokens=3, logprobs=True)
    prompt = list(llm.encode("Solve").tokens)
    scored = llm.score(prompt, written.tokens)
    assert scored.is_greedy and logprobs(scored) == pytest.approx(written.logprobs, abs=1e-4)
    assert not llm.score(prompt, [written.tokens[0], 300]).is_greedy
    assert ScoredToken(1, "a", 0, -1.0, {"b": -1.0}).is_likeliest  # as likely as another is likeliest


def test_it_is_awaited_and_run_like_every_query(llm: LLM) -> None:
    both = [llm.run(Likelihood(TEXT)), asyncio.run(llm.arun(Likelihood(TEXT)))]
    assert logprobs(both[0]) == pytest.approx(logprobs(both[1]), abs=1e-4)
    assert "logprob" in repr(both[0]) and "Scored" in repr(both[0])
    assert llm.score("").tokens == [ScoredToken(llm.encode("").tokens[0], "<bos>", 0)]


@pytest.mark.parametrize(
    ("prompt", "continuation", "why"),
    [
        ("a", "", "nothing to score"),
        ("a", [3], "continuation is"),
        ([3], "a", "continuation is"),
        ([3], [-1], "token -1"),
        ([3, 10**9], None, "token 1000000000"),
        ([], None, "empty list"),
        ([3], ["a"], "holds token 'a'"),
    ],
)
def test_what_is_wrong_is_one_sentence(llm: LLM, prompt: object, continuation: object, why: str) -> None:
    with pytest.raises(InputError, match=why):
        llm.score(prompt, continuation)  # type: ignore[arg-type]


def test_no_longer_than_the_context_and_no_constraint(llm: LLM) -> None:
    with pytest.raises(CapacityError, match="context"):
        llm.score([3] * (llm.model.config.max_position + 1))
    with pytest.raises(InputError, match="needs mode 'diffusion'"):
        llm.score("a", choices=("b", "c"))
