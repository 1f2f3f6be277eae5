"""How likely a text is: what is scored of a prompt and its continuation, and the result of that.

Where a continuation's first letters belong to a token of the prompt, as they may once both stand together, that token
is scored with it: the text is encoded as a whole, and what differs from the prompt alone is the continuation.
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.engine.scores import PromptScores
from sfumato.events import Done, Scored, ScoredToken
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.templates.prompts import PromptEncoder
from sfumato.templates.requests import Likelihood
from sfumato.text.tokenizer import Detokeniser, Tokenizer


def prompt_of(query: Likelihood, prompts: PromptEncoder) -> tuple[Prompt, int]:
    """All that is encoded, and the place of the first token that is scored, at least 1."""
    if isinstance(query.prompt, str):
        before = prompts.encode(query.prompt)
        more = query.continuation if isinstance(query.continuation, str) else ""
        whole = prompts.encode(query.prompt + more) if more else before
        first = min(whole.shared(before), len(whole) - 1) if more else 0
    else:
        before = Prompt.of(query.prompt)
        whole = before.extended([one for one in query.continuation or () if isinstance(one, int)])
        first = len(before) if query.continuation else 0
    return whole, max(1, first)


def following_options(options: Options) -> Options:
    """The options of the token behind a text that is scored. InputError for those that need a canvas."""
    quiet = replace(options, min_tokens=0, stop=(), drafts=False, logprobs=True)
    return replace(quiet, mode="autoregressive", max_tokens=1)


def scored_of(query: Likelihood, prompt: Prompt, scores: PromptScores, done: Done, tokenizer: Tokenizer) -> Scored:
    """The result of a prompt that was encoded with these scores, before the one token of `done`."""
    start = 0 if query.continuation is None else scores.first
    unscored = scores.first - start
    values = [*[None] * unscored, *scores.logprobs]
    tops = [*[dict[int, float]()] * unscored, *scores.likeliest]
    detokeniser, offset, tokens = Detokeniser(tokenizer), 0, []
    for token, value, top in zip(prompt.tokens[start:], values, tops, strict=True):
        own, more = tokenizer.piece(token), detokeniser.push([token])
        before = max(0, len(more) - len(own))  # bytes that were held back until now
        tokens.append(ScoredToken(token, own, offset + before, value, tokenizer.by_piece(top)))
        offset += len(more)
    offset += len(detokeniser.flush())
    (last,), (logprob,) = done.tokens, done.logprobs or [0.0]
    logprob = scores.following.get(last, logprob)  # the very same number as among the likeliest
    following = ScoredToken(last, tokenizer.piece(last), offset, logprob, tokenizer.by_piece(scores.following))
    text, answer = tokenizer.decode(prompt.tokens[start:]), tokenizer.decode([last])
    return Scored(tokens, text, following, answer, done.usage, done.seed)
