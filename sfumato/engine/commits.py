"""What becomes of rows after a step: canvases that have stopped are committed, cut and emitted as events.

A commit ends at an end token, a stop string, the token limit or the end of the context. Rows that go without a canvas
(the autoregressive baseline with the same weights) commit one token a pass; so do those that finish one which was
refused (`Options.finish`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.engine.request import Row
from sfumato.engine.seats import SeatTable
from sfumato.engine.stepper import HEAD, NAT, PendingRead, Stepper
from sfumato.engine.trials import CommitLikelihoods, Likeliest, Trial
from sfumato.events import Commit, Done, Usage
from sfumato.sampling.rules import pick_token


class StoppedCanvas(NamedTuple):
    """A canvas of which some tokens are final."""

    seat: int
    steps: int
    tokens: list[int]
    """The argmax canvas."""
    settled: int
    """Leading positions that are final; of a canvas that has stopped all are."""
    entropy: float = 0.0
    """The mean entropy of the canvas, in nats."""
    trial: Trial | None = None
    """Of several tries this one."""
    is_encoded: bool = False
    """The tokens of its try are in the cache."""
    is_cut: bool = False
    """These tokens are only the beginning: the rest of the canvas is written one token after another."""


class Commits:
    """Commits rows of a table of seats; rows that go on get their next canvas from the stepper."""

    def __init__(self, table: SeatTable, stepper: Stepper) -> None:
        self.table, self.stepper, self.config = table, stepper, table.config

    def collect(self, reads: Sequence[PendingRead]) -> Iterator[Commit | Done]:
        """Wait for these reads: rows that have stopped commit, and begin their next canvas if they go on."""
        for read in reads:
            values = read.copy.wait()
            is_done, steps, settled, is_finite, entropies = values[:, :HEAD].T.tolist()
            # A row that has left, or is on a later canvas by now, was answered before.
            current = [seat for seat, (row, draw) in read.rows.items() if self._is_current(seat, row, draw)]
            for seat in (seat for seat in current if not is_finite[seat]):
                where = f"in step {steps[seat]} of canvas {self.table.row(seat).canvas + 1}"
                self.table.fail_of_numbers(seat, where)
            current = [seat for seat in current if is_finite[seat]]
            if stopped := [seat for seat in current if is_done[seat]]:
                tokens = values[stopped, HEAD:].tolist()
                yield from self._commit_canvases(
                    [
                        StoppedCanvas(seat, steps[seat], own, len(own), entropies[seat] / NAT)
                        for seat, own in zip(stopped, tokens, strict=True)
                    ]
                )
                going_on = [seat for seat in stopped if not self.table.row(seat).is_over]
                self.stepper.begin([seat for seat in going_on if self.table.row(seat).is_on_canvas])
            # Of the others, what has settled ahead of the rest, unless it must wait for the whole.
            ahead = [seat for seat in current if not is_done[seat] and settled[seat] > self.table.row(seat).settled]
            if ahead := [seat for seat in ahead if not self.table.row(seat).commits_whole]:
                tokens = values[ahead, HEAD:].tolist()
                for seat, own in zip(ahead, tokens, strict=True):
                    yield from self._commit_prefix(StoppedCanvas(seat, steps[seat], own, settled[seat]))

    def _is_current(self, seat: int, row: Row, draw: int) -> bool:
        rows = self.table.rows
        return seat < len(rows) and rows[seat] is row and not row.is_over and row.draw == draw

    def _commit_canvases(self, stopped: list[StoppedCanvas]) -> Iterator[Commit | Done]:
        """Cut each canvas at its end.

        Where the row goes on it waits to be encoded with the next canvas's first step; where its log-probabilities are
        asked for it is encoded now."""
        stopped = self._standing(stopped)
        rows = [self.table.row(one.seat) for one in stopped]
        kept: list[list[int]] = []
        for one, row in zip(stopped, rows, strict=True):
            kept.append([])
            with self.table.isolating(one.seat):
                for span, _, _ in row.spans_here():
                    span.commit()
                kept[-1] = self._cut(row, one.tokens[row.settled :], is_whole=not one.is_cut)
        is_read = [one.trial is not None and one.trial.likelihoods is not None for one in stopped]
        encoding = [n for n, row in enumerate(rows) if row.options.logprobs and kept[n] and not is_read[n]]
        log_p = self._log_probabilities([stopped[n].seat for n in encoding], [kept[n] for n in encoding])
        read = {
            n: CommitLikelihoods.of(kept[n], log_p_TV, rows[n].options.top_logprobs)
            for n, log_p_TV in zip(encoding, log_p, strict=True)
        }
        for n, (one, row) in enumerate(zip(stopped, rows, strict=True)):
            if row.has_failed:
                continue
            steps = one.steps + sum(trial.steps for trial in row.refused)
            row.steps += steps
            row.pending = one.tokens[: row.settled] + kept[n]
            likelihoods = read.get(n)
            if one.trial is not None and one.trial.likelihoods is not None:
                likelihoods = one.trial.likelihoods.first(len(kept[n]))
            if n in read or one.is_encoded:
                row.pending = []
            if one.is_encoded and one.trial is not None:  # a stop string may have cut off some of it
                self._forget(one.seat, len(one.trial.tokens) - len(kept[n]))
            yield from self._emit(one.seat, kept[n], likelihoods, steps)
            if one.is_cut and not row.is_over:
                row.step, row.unwritten = 0, row.length - len(kept[n])
                if one.trial is not None:  # reads of this canvas that are under way are those of another try now
                    row.refused.append(one.trial)
            else:
                row.canvas, row.step, row.settled, row.refused = row.canvas + 1, 0, 0, []
        self._encode_beginnings([one.seat for one in stopped if self.table.row(one.seat).unwritten])

    def _encode_beginnings(self, seats: list[int]) -> None:
        """Encode what these rows keep of a refused canvas, for the tokens that follow from it one after another."""
        going_on = [seat for seat in seats if not self.table.row(seat).is_over]
        if going_on:
            self.table.encode([self.table.row(seat).pending for seat in going_on], going_on)
        for row in map(self.table.row, going_on):
            row.passes, row.pending = row.passes + 1, []

    def _standing(self, stopped: list[StoppedCanvas]) -> list[StoppedCanvas]:
        """Those that commit now. A try that does not stand begins again; after the last one the best commits."""
        commits = [one for one in stopped if not self.table.row(one.seat).options.is_judged]
        judged = [one for one in stopped if self.table.row(one.seat).options.is_judged]
        if not judged:
            return stopped
        rows = {one.seat: self.table.row(one.seat) for one in judged}
        trials: dict[int, Trial] = {}
        for one in judged:
            tokens = one.tokens[: self._end(rows[one.seat], one.tokens)]
            trials[one.seat] = Trial(tokens, one.steps, one.entropy)
        read = [one.seat for one in judged if rows[one.seat].options.verify is not None]
        before_BD = self.table.last_XD[read]
        for seat, log_p_TV in zip(
            read, self._log_probabilities(read, [trials[seat].tokens for seat in read]), strict=True
        ):
            trials[seat] = self._judged(rows[seat], trials[seat], log_p_TV)
        before = dict(zip(read, before_BD, strict=True))
        for one in judged:
            row, trial, is_encoded = rows[one.seat], trials[one.seat], one.seat in before
            if row.has_failed:
                continue
            stands = not row.is_unsure(trial) if row.options.verify is None else trial.gap <= row.options.verify
            is_last = len(row.refused) == row.options.redos
            best = max([trial, *row.refused], key=lambda other: other.rank)
            if stands or (is_last and best is trial and not row.options.finish):
                commits.append(one._replace(trial=trial, is_encoded=is_encoded))
                continue
            if is_encoded:
                self._forget(one.seat, len(trial.tokens))
                self.table.last_XD[one.seat] = before[one.seat]
            if is_last and row.options.finish and row.options.verify is not None:
                best = best.corrected(row.options.verify)
                commits.append(one._replace(tokens=best.tokens, trial=best, is_cut=len(best.tokens) < row.length))
            elif is_last:
                commits.append(one._replace(tokens=best.tokens, trial=best))
            else:
                row.refused.append(trial)
                row.step = 0
        return commits

    def _judged(self, row: Row, trial: Trial, log_p_TV: Tensor) -> Trial:
        """With what the log-probabilities of all tokens in its places say of a try."""
        likelihoods = CommitLikelihoods.of(trial.tokens, log_p_TV, row.options.top_logprobs)
        best = Likeliest.of(log_p_TV, [*self.config.eos_ids, *row.request.banned], row.lacking)
        return trial.judged(likelihoods, best, row.pinned_here)

    def _forget(self, seat: int, count: int) -> None:
        """Take so many tokens of a row out of the cache again."""
        if count:
            self.table.cache.truncate_(seat, self.table.cache.lengths[seat] - count)

    def _end(self, row: Row, tokens: list[int]) -> int:
        """How many of these tokens can count: up to the first end, and within the room."""
        ends = (n + 1 for n, token in enumerate(tokens) if token in self.config.eos_ids and n >= row.lacking)
        return min(next(ends, len(tokens)), len(tokens) if row.room is None else row.room)

    def _log_probabilities(self, seats: list[int], kept: list[list[int]]) -> Iterator[Tensor]:
        """Encode what these rows commit; the log-probabilities of all tokens in each place, [T, V] of each row.

        A row at a time: they may be 270 MB."""
        if not seats:
            return
        before_BD = self.table.last_XD[seats]
        hidden_BTD = self.table.encode(kept, seats)
        for n, (seat, tokens) in enumerate(zip(seats, kept, strict=True)):
            row = self.table.row(seat)
            row.passes += 1
            hidden_TD = torch.cat([before_BD[n : n + 1], hidden_BTD[n, : len(tokens) - 1]])
            log_p_TV = torch.log_softmax(self.table.model.logits(hidden_TD), -1)
            if not bool(torch.isfinite(hidden_TD.sum() + log_p_TV.sum())):
                self.table.fail_of_numbers(seat, f"in the encoding of canvas {row.canvas + 1}")
            yield log_p_TV

    def _commit_prefix(self, one: StoppedCanvas) -> Iterator[Commit | Done]:
        """What is pinned by now is final, though its canvas goes on; it is encoded with the whole canvas."""
        row = self.table.row(one.seat)
        kept: list[int] = []
        with self.table.isolating(one.seat):
            kept = self._cut(row, one.tokens[row.settled : one.settled], is_whole=False)
        if row.has_failed:
            return
        row.settled = one.settled
        if row.finish_reason is not None:  # a stop string, an end or the limit: the rest does not matter
            row.steps += one.steps
        yield from self._emit(one.seat, kept, None, one.steps)

    def decode(self, seats: list[int]) -> Iterator[Commit | Done]:
        """One token of rows that go without a canvas, or finish one so, from encode's own logits."""
        if not seats:
            return
        rows, model = [self.table.row(seat) for seat in seats], self.table.model
        hidden_BD = self.table.last_XD[seats]
        logits_BV = model.logits(hidden_BD)
        log_p_BV = torch.log_softmax(logits_BV, -1)
        is_finite = torch.isfinite(hidden_BD.sum(-1) + log_p_BV.sum(-1)).tolist()
        places = [row.seed for row in rows], [len(row.tokens) for row in rows]
        uniform_B = self.stepper.noise.token(seats, *places)
        for n, (seat, row) in enumerate(zip(seats, rows, strict=True)):
            if not is_finite[n]:
                self.table.fail_of_numbers(seat, f"before token {len(row.tokens) + 1} of the answer")
                continue
            if row.lacking > 0:
                logits_BV[n, [*self.config.eos_ids, *row.request.banned]] = -torch.inf
            token = self._next(row, logits_BV[n], uniform_B[n])
            row.steps, row.passes, row.unwritten = row.steps + 1, row.passes + 1, max(0, row.unwritten - 1)
            kept: list[int] = []
            with self.table.isolating(seat):
                kept = self._cut(row, [token], is_whole=not row.unwritten)
            if not row.has_failed:
                likelihoods = None
                if row.options.logprobs:
                    likelihoods = CommitLikelihoods.of(kept, log_p_BV[n : n + 1], row.options.top_logprobs)
                yield from self._emit(seat, kept, likelihoods, 1)
        going_on = [seat for seat in seats if not self.table.row(seat).is_over]
        if decoding := [seat for seat in going_on if self.table.row(seat).is_decoded]:
            self.table.encode([[self.table.row(seat).tokens[-1]] for seat in decoding], decoding)
        finished = [seat for seat in going_on if not self.table.row(seat).is_decoded]
        for row in map(self.table.row, finished):
            row.pending, row.canvas, row.refused = row.tokens[-1:], row.canvas + 1, []
        self.stepper.begin(finished)

    @staticmethod
    def _next(row: Row, logits_V: Tensor, uniform: Tensor) -> int:
        """The next token. A refused canvas is finished by its pins and what is likeliest, as that refused it."""
        if row.unwritten:
            return row.request.pins.get(len(row.tokens), int(logits_V.argmax()))
        if row.sampler is not None:
            logits_V = row.sampler.next_logits(logits_V, row.tokens)
        return pick_token(logits_V, row.options, uniform)

    def _cut(self, row: Row, tokens: list[int], is_whole: bool = True) -> list[int]:
        """The tokens that count: up to eos, a stop string, the token limit or the end of the context.

        `is_whole`: the canvas ends with them."""
        ends = [n for n, token in enumerate(tokens) if token in self.config.eos_ids and n >= row.lacking]
        if ends:
            tokens, row.finish_reason = tokens[: ends[0] + 1], "stop"
        if row.room is not None and len(tokens) >= row.room:
            if len(tokens) > row.room or row.finish_reason is None:
                row.finish_reason = "length"
            tokens = tokens[: row.room]
        if row.watch is not None and (keep := row.watch(tokens)) is not None:
            tokens, row.finish_reason = tokens[:keep], "stop"
        if any(span.width is None and span.is_complete for span in row.spans):
            row.finish_reason = "stop"  # complete, though there was no room for an end behind it
        need = row.length if row.request.is_diffusion else 1
        context = min(self.config.max_position, self.table.max_capacity)
        if is_whole and row.finish_reason is None and len(row.prompt) + len(row.tokens) + len(tokens) + need > context:
            row.finish_reason = "length"
        return tokens

    def _emit(
        self, seat: int, tokens: list[int], likelihoods: CommitLikelihoods | None, steps: int
    ) -> Iterator[Commit | Done]:
        """The commit of these tokens, and the end of the row if it comes with them."""
        row = self.table.row(seat)
        row.tokens += tokens
        row.first_commit = row.first_commit or time.perf_counter() - row.began
        is_last, request = row.finish_reason is not None, row.request.id
        logprobs, top = None, None
        if row.options.logprobs:
            logprobs, top = likelihoods or CommitLikelihoods([], None)
            row.logprobs += logprobs
        yield Commit(seat, row.canvas, steps, tokens, logprobs, top_logprobs=top, is_last=is_last, request=request)
        if row.finish_reason is not None:
            usage = Usage(
                prompt_tokens=len(row.prompt),
                tokens=len(row.tokens),
                canvases=row.canvas + 1 if row.request.is_diffusion else 0,
                steps=row.steps,
                passes=row.passes,
                seconds=time.perf_counter() - row.began,
                first_commit_seconds=row.first_commit,
                reused_tokens=row.reused,
            )
            logprobs = row.logprobs if row.options.logprobs else None
            yield Done(seat, row.finish_reason, row.tokens, usage, row.seed, logprobs=logprobs, request=request)
