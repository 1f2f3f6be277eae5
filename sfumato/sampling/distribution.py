"""What a row's options make of the distribution that its positions sample from.

Penalties and biases move logits; top-k, top-p and min-p leave words out. In this order, with the temperature between
them, as transformers' `generate` has it.

**On a canvas** what is left is sampled, and what is committed is its most likely word. Entropies, by which positions
are accepted and a canvas stops, are of the words that are left, renormalised: a word that is left out counts nothing.
The soft embedding sees moved logits, as it sees those that a grammar has masked, but never loses the words that
truncation leaves out. Penalties count what the row has committed, and on this canvas the words *before* a position, in
the argmax canvas of the last step. Were words behind it counted too, two positions with the same word would both give
way, come back together, and the canvas would never stand still.

Rows that ask for none of this are not looked at. It is plain PyTorch for any device, some positions at a time. It lacks
a kernel, and a form that a CUDA graph can hold: steps of such rows are not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.ops.contract import ReadOut
from sfumato.ops.reference import inverse_cdf
from sfumato.options import Options

SWEEP = 2**22
"""Elements of the float32 probabilities that exist at once: positions go in groups of this size."""

RANKED = (64, 4096)
"""So many of the likeliest words are put in order for top-p; where these have less than it together, more are."""


@dataclass(frozen=True)
class Truncation:
    """Which words may be sampled. The likeliest always may."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, options: Options) -> Truncation:
        """From options."""
        return cls(max(options.top_k, 0), options.top_p, options.min_p)

    @property
    def is_on(self) -> bool:
        """Whether any word may be left out."""
        return self != Truncation()

    def kept(self, p_NV: Tensor, argmax_N: Tensor) -> Tensor:
        """True for the words that may be sampled, [N, V]; of equally likely ones `argmax_N` goes first."""
        words = p_NV.shape[-1]
        top_k = min(self.top_k or words, words)
        if top_k == words and self.top_p >= 1:
            is_kept_NV = torch.ones_like(p_NV, dtype=torch.bool)
        else:
            is_kept_NV = self._ranked(p_NV, argmax_N, top_k)
        if self.min_p > 0:
            is_kept_NV &= p_NV >= self.min_p * p_NV.amax(-1, keepdim=True)
        return is_kept_NV.scatter_(-1, argmax_N[:, None], True)

    def _ranked(self, p_NV: Tensor, argmax_N: Tensor, top_k: int) -> Tensor:
        """What top-k leaves, and top-p of that."""
        words = p_NV.shape[-1]
        rungs = [top_k] if top_k < words else [*(count for count in RANKED if count < words), words]
        is_kept_NV = torch.zeros_like(p_NV, dtype=torch.bool)
        rest_M = torch.arange(len(p_NV), device=p_NV.device)  # positions with more to keep than the rungs before have
        for count in rungs:
            p_MV = p_NV[rest_M]
            order_MK = p_MV.scatter(-1, argmax_N[rest_M, None], 2.0).topk(count, -1).indices
            p_MK = p_MV.gather(-1, order_MK)
            whole_M1 = (p_MK if count == top_k else p_MV).sum(-1, keepdim=True)
            is_in_MK = p_MK.cumsum(-1) - p_MK < self.top_p * whole_M1
            is_kept_NV[rest_M] = torch.zeros_like(p_MV, dtype=torch.bool).scatter_(-1, order_MK, is_in_MK)
            rest_M = rest_M[is_in_MK[:, -1]]
            if not len(rest_M):
                break
        return is_kept_NV


@dataclass(frozen=True)
class Penalties:
    """By how much logits move."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""

    @classmethod
    def of(cls, options: Options) -> Penalties:
        """From options."""
        bias = {token: number for token, number in (options.logit_bias or {}).items() if number}
        return cls(
            options.presence_penalty, options.frequency_penalty, options.repetition_penalty, tuple(sorted(bias.items()))
        )

    @property
    def counts(self) -> bool:
        """Whether it matters which words there are already."""
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)

    @property
    def is_on(self) -> bool:
        """Whether any logit may move."""
        return self.counts or bool(self.bias)

    def moved(self, logits_NV: Tensor, count_NV: Tensor, is_written_NV: Tensor, temperature: Tensor | float) -> Tensor:
        """Logits that were divided by `temperature`, moved.

        `count_NV` is how often the answer has each word; `is_written_NV` whether prompt or answer do."""
        if self.repetition != 1:
            less_NV = torch.where(logits_NV > 0, logits_NV / self.repetition, logits_NV * self.repetition)
            logits_NV = torch.where(is_written_NV, less_NV, logits_NV)
        loss_NV = self.frequency * count_NV + self.presence * (count_NV > 0)
        return logits_NV - loss_NV / temperature


class RowSampler:
    """The sampling options of one row, and how often it has each word. `of` gives None where all of them are off."""

    def __init__(self, truncation: Truncation, penalties: Penalties, prompt: Sequence[int]) -> None:
        self.truncation, self.penalties, self._prompt = truncation, penalties, prompt
        self._counted = 0
        self._count_V: Tensor | None = None
        self._is_written_V: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, options: Options, prompt: Sequence[int]) -> RowSampler | None:
        """From a row's options and its prompt."""
        truncation, penalties = Truncation.of(options), Penalties.of(options)
        return cls(truncation, penalties, prompt) if truncation.is_on or penalties.is_on else None

    @property
    def moves_logits(self) -> bool:
        """Whether logits change, and so the soft embedding; a read-out's tiles are of no use then."""
        return self.penalties.is_on

    def next_logits(self, logits_V: Tensor, answer: Sequence[int]) -> Tensor:
        """The logits of the token behind this answer, moved; before any temperature."""
        if not self.moves_logits:
            return logits_V
        return self._moved(logits_V[None], answer, None, 1.0)[0]

    def apply_(
        self,
        read: ReadOut,
        place: int,
        temperature: Tensor,
        noise: tuple[Tensor | None, Tensor | None],
        written: tuple[Sequence[int], Tensor],
    ) -> None:
        """Change one row of a read-out in place: its sample, argmax and entropy, and logits that move.

        `noise` is uniform_L, or gumbel_LV, as of the read-out; `written` what the row has committed before this canvas,
        and the last step's argmax canvas (-1 where there is none), [L]."""
        answer, canvas_L = written
        uniform_L, gumbel_LV = noise
        logits_LV = read.logits_BLV[place]
        length, words = logits_LV.shape
        size = max(1, SWEEP // words)
        for start in range(0, length, size):
            part = slice(start, start + size)
            logits_PV, argmax_P = logits_LV[part].float(), read.argmax_BL[place, part]
            if self.moves_logits:
                logits_PV = self._moved(logits_PV, answer, (canvas_L, start), temperature)
                logits_LV[part] = logits_PV
                best_P1 = logits_PV.gather(-1, argmax_P[:, None])
                is_best_P = best_P1[:, 0] >= logits_PV.amax(-1)  # of equals, the one that the read-out chose
                argmax_P = torch.where(is_best_P, argmax_P, logits_PV.argmax(-1))
            p_PV = torch.softmax(logits_PV, -1)
            if self.truncation.is_on:
                p_PV = p_PV * self.truncation.kept(p_PV, argmax_P)
                p_PV = p_PV / p_PV.sum(-1, keepdim=True)
            if gumbel_LV is not None:
                sample_P = (p_PV.log() + gumbel_LV[part]).argmax(-1)
            else:
                sample_P = argmax_P if uniform_L is None else inverse_cdf(p_PV, uniform_L[part])
            read.sample_BL[place, part], read.argmax_BL[place, part] = sample_P, argmax_P
            read.entropy_BL[place, part] = torch.special.entr(p_PV).sum(-1)

    def _moved(
        self, logits_NV: Tensor, answer: Sequence[int], canvas: tuple[Tensor, int] | None, temperature: Tensor | float
    ) -> Tensor:
        """Logits behind this answer; of a canvas's positions from a number on, behind those before them too."""
        if self.penalties.counts:
            count_V, is_written_V = self._update(answer, logits_NV)
            count_NV = count_V.expand_as(logits_NV)
            if canvas is not None:
                count_NV = _with_earlier(count_NV, *canvas)
            is_written_NV = is_written_V | (count_NV > 0)
            logits_NV = self.penalties.moved(logits_NV, count_NV, is_written_NV, temperature)
        if self.penalties.bias:
            if self._bias is None:
                ids, numbers = zip(*self.penalties.bias, strict=True)
                self._bias = torch.tensor(ids), torch.tensor(numbers)
                self._bias = self._bias[0].to(logits_NV.device), self._bias[1].to(logits_NV.device)
            ids_J, bias_J = self._bias
            logits_NV = logits_NV.index_add(-1, ids_J, (bias_J / temperature).expand(len(logits_NV), -1))
        return logits_NV

    def _update(self, answer: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """How often the answer has each word, and whether the prompt or it do, [V] each."""
        if self._count_V is None or self._is_written_V is None:
            self._count_V = like.new_zeros(like.shape[-1])
            self._is_written_V = torch.zeros_like(self._count_V, dtype=torch.bool)
            self._is_written_V[torch.tensor(self._prompt, dtype=torch.long, device=like.device)] = True
        if new := list(answer[self._counted :]):
            token_T = torch.tensor(new, device=like.device)
            self._count_V.index_add_(0, token_T, self._count_V.new_ones(len(new)))
            self._is_written_V[token_T] = True
            self._counted = len(answer)
        return self._count_V, self._is_written_V


class Observed(NamedTuple):
    """What the tokens that a canvas holds say of themselves, as a leave-one-out model needs it (`rules`)."""

    token_BL1: Tensor
    bonus_BL1: Tensor
    """What the logit of each gains, over the temperature."""

    def add_(self, read: ReadOut, noise: Mapping[str, Tensor]) -> ReadOut:
        """The read-out with it, its logits changed in place; for any operations."""
        logits_BLV = self._moved_(read.logits_BLV, 1.0)
        words, at = logits_BLV.shape[-1], logits_BLV.shape[:2]
        uniform_N, gumbel_NV = (noise[name].flatten(0, 1) if name in noise else None for name in _NOISE)
        parts, size = [], max(1, SWEEP // words)
        for start in range(0, read.argmax_BL.numel(), size):
            part = slice(start, start + size)
            logits_PV, argmax_P = logits_BLV.flatten(0, 1)[part].float(), read.argmax_BL.flatten()[part]
            is_best_P = logits_PV.gather(-1, argmax_P[:, None])[:, 0] >= logits_PV.amax(-1)
            argmax_P = torch.where(is_best_P, argmax_P, logits_PV.argmax(-1))
            p_PV = torch.softmax(logits_PV, -1)
            sample_P = argmax_P
            if gumbel_NV is not None:
                sample_P = (p_PV.log() + gumbel_NV[part]).argmax(-1)
            elif uniform_N is not None:
                sample_P = inverse_cdf(p_PV, uniform_N[part])
            parts.append((sample_P, argmax_P, torch.special.entr(p_PV).sum(-1)))
        sample_BL, argmax_BL, entropy_BL = (torch.cat(column).view(at) for column in zip(*parts, strict=True))
        return ReadOut(sample_BL, argmax_BL, entropy_BL, logits_BLV)

    def take_back_(self, logits_BLV: Tensor) -> Tensor:
        """Logits without it, in place: the soft embedding is that of the model's own, as in training."""
        return self._moved_(logits_BLV, -1.0)

    def _moved_(self, logits_BLV: Tensor, sign: float) -> Tensor:
        own_BL1 = logits_BLV.gather(-1, self.token_BL1).float() + sign * self.bonus_BL1
        return logits_BLV.scatter_(-1, self.token_BL1, own_BL1.to(logits_BLV.dtype))


_NOISE = "uniform_BL", "gumbel_BLV"


def _with_earlier(count_PV: Tensor, canvas_L: Tensor, start: int) -> Tensor:
    """Counts of words of the positions from `start` on, with the words of a canvas before each; -1 is no word."""
    word_L = canvas_L.clamp_min(0)
    is_same_LL = canvas_L[:, None] == word_L  # [earlier, word]
    earlier_LL = is_same_LL.long().cumsum(0) - is_same_LL.long()
    earlier_PL = earlier_LL[start : start + len(count_PV)]
    word_PL = word_L.expand_as(earlier_PL)
    return count_PV.scatter(-1, word_PL, count_PV.gather(-1, word_PL) + earlier_PL)
