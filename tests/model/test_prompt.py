"""model/prompt.py: when two prompts are alike, and beginnings of prompts."""

from __future__ import annotations

import subprocess
import sys

import torch

from sfumato.model.loaded import LoadedAdapter
from sfumato.model.prompt import Prompt
from sfumato.ops.lowrank import LanePair


def test_a_prompt_is_compared_by_tokens_and_content() -> None:
    one = Prompt((1, 2, 3, 4), content={1: b"cat", 3: b"dog"}, embeddings=torch.arange(4.0).view(2, 2))
    assert one == Prompt((1, 2, 3, 4), content={1: b"cat", 3: b"dog"}) and hash(one) == hash(one.first(9))
    assert one != Prompt.of([1, 2, 3, 4]) and one.first(1) == Prompt.of([1])
    part = one.first(2)
    assert (part.tokens, part.content) == ((1, 2), {1: b"cat"})
    assert part.embeddings is not None and part.embeddings.tolist() == [[0.0, 1.0]]
    assert list(one.extended([5])) == [1, 2, 3, 4, 5] and len(one) == 4 and Prompt.of(one) is one
    assert [one.shared(other) for other in (one, part, Prompt.of([1, 2, 3]), Prompt.of([1, 9]))] == [4, 2, 1, 1]


def test_a_block_that_the_other_has_not_is_alike_only_before_it() -> None:
    tokens = (1, 2, 3, 4, 5, 6)
    one, other, plain = Prompt(tokens, blocks=((1, 3), (4, 6))), Prompt(tokens, blocks=((1, 3),)), Prompt(tokens)
    assert one == Prompt(tokens, blocks=((1, 3), (4, 6))) and len({one, other, plain}) == 3
    assert one != other and one != plain and other != plain
    assert [one.shared(prompt) for prompt in (one, other, plain)] == [6, 4, 1]
    assert [prompt.shared(one) for prompt in (other, plain)] == [4, 1]
    assert one.shared(Prompt(tokens, blocks=((1, 3), (4, 5)))) == 4  # it ends elsewhere
    # A position of a block sees all of it, so one token that differs makes the whole block differ.
    assert one.shared(Prompt((1, 2, 9, 4, 5, 6), blocks=one.blocks)) == 1
    assert one.shared(Prompt(tokens, blocks=one.blocks, content={5: b"cat"})) == 4
    assert one.shared(Prompt((1, 2, 3, 9), blocks=((1, 3),))) == 3


def test_prompts_of_two_adapters_have_nothing_in_common() -> None:
    first, again = LoadedAdapter("a", LanePair(0, 0)), LoadedAdapter("a", LanePair(0, 0))  # loaded anew, on its lane
    plain = Prompt.of([1, 2, 3])
    one, other = plain.adapted(first), plain.adapted(again)
    assert len({plain, one, other, plain.adapted(first)}) == 3 and one == plain.adapted(first) != other
    assert [one.shared(prompt) for prompt in (plain, one, other)] == [0, 3, 0] and plain.shared(one) == 0
    assert {one.extended([4]).adapter, one.first(2).adapter, Prompt.of(one).adapter} == {first}
    assert one.adapted(None) == plain and one.adapted(first) is one


def test_a_beginning_does_not_cut_a_block() -> None:
    one = Prompt((1, 2, 3, 4), blocks=((0, 1), (1, 4)), content={1: b"cat", 3: b"dog"}, embeddings=torch.zeros(2, 2))
    for count in (1, 2, 3):
        part = one.first(count)
        assert (part.tokens, part.blocks, part.content) == ((1,), ((0, 1),), {})
        assert part.embeddings is not None and part.embeddings.shape == (0, 2)
    assert one.first(4) == one and one.first(9) == one and len(one.first(0)) == 0
    assert one.extended([5, 6]).first(5) == one.extended([5])


def test_it_imports_no_torch() -> None:
    code = "import sys, sfumato.model.prompt, sfumato.templates.requests; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
