"""Ids in, events out: the two loops.

The outer loop grows the text canvas by canvas, the inner one denoises a canvas step by step (`step.step_`). Every row
is at its own length, canvas and step: a row that stops commits and begins its next canvas while its neighbours go on.
What is committed waits, and is encoded in the same pass as the next canvas's first step; so is the last chunk of a
prompt. Nothing here knows text; what must look at text (stop strings) is asked through `watch`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.cache import KVCache
from sfumato.diffusion import CountedDice, Dice, Rules, accept
from sfumato.events import CapacityError, Commit, Done, Draft, Event, InputError, Options, Usage
from sfumato.guided import Span, Turn, project_
from sfumato.model import Model, Pass
from sfumato.offload import is_streamed
from sfumato.step import Canvases, Project, Projected, Recorded, step_

Watch = Callable[[int, list[int]], int | None]
"""(row, newly committed tokens) -> how many of them to keep if the answer ends here, None to go on."""

FIRST_ROOM = 4096
"""New tokens that a cache has room for at first; longer answers make it grow by doubling."""

DICE_AHEAD = 8
"""Steps whose dice are counted together: a count is forty small operations, however many numbers it makes."""

PREFILL_CHUNK = 2048
"""Prompt tokens per encode pass: bounds the memory of a long prompt; any value gives the same result."""


SHORT = 16
"""A canvas for a short budget is a multiple of this many positions."""


@dataclass
class Row:
    """One request under way."""

    prompt: list[int]
    options: Options
    rules: Rules
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Tokens that wait to be encoded in the next pass."""
    canvas: int = 0
    step: int = 0
    """Steps that were begun on this canvas."""
    steps: int = 0
    passes: int = 0
    first_commit: float | None = None
    finish_reason: str | None = None
    given: int = 0
    """Leading tokens of this canvas that were committed before the rest."""

    @property
    def room(self) -> int | None:
        """New tokens still allowed; None: as many as the context holds."""
        return None if self.options.max_tokens is None else self.options.max_tokens - len(self.tokens)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
    **more: object,
) -> Iterator[Event]:
    """Generate for one or more prompts (token ids); yields Draft (if asked for), Commit and, once a row, Done.

    `more` goes to `Run`. InputError and CapacityError before any work."""
    return iter(Run(model, prompts, options, **more))  # type: ignore[arg-type]


class Run:
    """A generation: iterate it for its events; `cache` afterwards holds what was encoded, `held` the tokens of it.

    Options left open (None) take the released model's defaults: callers with a checkpoint's own fill them in before.
    `pins` maps, for each row, positions of the answer to tokens that stay fixed there; `warm` positions to tokens that
    their canvas starts from instead of noise; `spans` keep positions to a grammar. `inspect` is shown every read-out:
    (rows, logits [B, L, V]). `banned` are tokens that may not stand, as ends may not, among the first `min_tokens`
    positions. `cache` continues from earlier work: row i of it must hold exactly the first
    cache.lengths[i] tokens of prompt i, and not all of them.
    `record` (default: on a CUDA device) replays steps as CUDA graphs; `lag` (default: 1 there, else 0) is how many
    steps late the host asks which rows have stopped. Neither changes an answer; a late question costs a canvas up to
    `lag` passes."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        *,
        dice: Dice | None = None,
        pins: Sequence[Mapping[int, int]] | None = None,
        warm: Sequence[Mapping[int, int]] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        inspect: Callable[[list[int], Tensor], None] | None = None,
        banned: Sequence[int] = (),
        watch: Watch | None = None,
        cache: KVCache | None = None,
        chunk: int = PREFILL_CHUNK,
        record: bool | None = None,
        lag: int | None = None,
    ) -> None:
        self.model, self.config, self.watch, self.chunk = model, model.config, watch, chunk
        each = [options] * len(prompts) if isinstance(options, Options) else list(options)
        if not prompts or len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts with {len(each)} sets of options; give one set for each prompt")
        own = {"mode": "diffusion" if self.config.is_diffusion else "autoregressive"}
        each = [o.with_defaults(own) for o in each]
        self.rows = [Row(list(p), o, Rules.of(o)) for p, o in zip(prompts, each, strict=True)]
        nothing: list[Any] = [{}] * len(prompts)
        self.pins, self.warm, self.spans = list(pins or nothing), list(warm or nothing), list(spans or nothing)
        self.inspect, self.banned = inspect, banned
        for what, given in ("pins", self.pins), ("warm starts", self.warm), ("spans", self.spans):
            if len(given) != len(prompts):
                raise InputError(
                    f"{len(prompts)} prompts came with {len(given)} sets of {what}; give one for each prompt"
                )
        if cache is not None and cache.batch != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts came with a cache of {cache.batch} rows; give one for each prompt"
            )
        self._check_canvas()
        self.length = self._canvas_length()
        for row in self.rows:
            if row.options.short:  # a step accepts one position at least, so more steps than positions are no use
                row.rules = replace(row.rules, max_steps=min(row.rules.max_steps, self.length))
        self._check_prompts()
        self._check_places()
        if dice is None:
            seeds = [o.seed or 0 for o in each]
            dice = CountedDice(seeds, [0] * len(seeds), self.length, self.config.vocab_size, model.device)
        self.dice = dice
        self.cache = self._room_for_all(cache)
        is_cuda = model.device.type == "cuda"
        asks_host = inspect is not None or any(self.spans)  # within the step
        is_hosted = asks_host or is_streamed(model)  # by the host, within the step
        self.record = (is_cuda if record is None else record) and isinstance(dice, CountedDice) and not is_hosted
        has_drafts = any(o.drafts for o in each)  # which show every step: the host is asked at once
        self.lag = 0 if has_drafts or is_hosted else int(is_cuda) if lag is None else lag
        self._recorded: dict[tuple[int, int, bool], Recorded] = {}
        self._counted: dict[int, tuple[Tensor, Tensor]] = {}
        self._pass: tuple[tuple[object, ...], Pass] | None = None

    @torch.inference_mode()  # as a decorator it holds while the loops run, and not in the caller between two events
    def __iter__(self) -> Iterator[Event]:
        began = time.perf_counter()
        self.last_XD = torch.zeros(
            len(self.rows), self.config.hidden_size, dtype=self.model.dtype, device=self.model.device
        )
        self._encode_prompts()
        is_diffusion = [row.options.mode == "diffusion" for row in self.rows]
        for mode, loop in ((True, self._denoise_rows), (False, self._decode_rows)):
            if rows := [i for i, flag in enumerate(is_diffusion) if flag is mode]:
                yield from loop(rows, began)

    # ---- the two loops ------------------------------------------------------------------------------------------

    def _denoise_rows(self, rows: list[int], began: float) -> Iterator[Event]:
        self.state = self._canvases()
        self._begin(rows)
        flights: deque[tuple[dict[int, int], tuple[Tensor, Any]]] = deque()
        while rows:
            # 1. One step of all live canvases; what waits to be encoded goes along in the same pass.
            for some in ([i for i in rows if self.rows[i].pending], [i for i in rows if not self.rows[i].pending]):
                if some:
                    self._step(some)
            for i in rows:
                self.rows[i].step, self.rows[i].passes = self.rows[i].step + 1, self.rows[i].passes + 1
            if any(self.rows[i].options.drafts for i in rows):
                yield from self._drafts(rows)
            # 2. Ask which rows have stopped: of this step, or of an earlier one while this one runs.
            asked = torch.stack([self.state.is_done_X.long(), self.state.step_X, self.state.settled_X])
            flights.append(({i: self.rows[i].canvas for i in rows}, _to_host(asked)))
            if len(flights) <= self.lag:
                continue
            canvases, answer = flights.popleft()
            is_done, steps, settled = _wait_for(answer)
            current = [i for i in rows if canvases.get(i) == self.rows[i].canvas]
            stopped = [i for i in current if is_done[i]]
            # 3. Commit the argmax canvas of those; who goes on begins the next canvas.
            if stopped:
                yield from self._commit_canvases(stopped, [steps[i] for i in stopped], began)
                self._begin([i for i in stopped if self.rows[i].finish_reason is None])
            # 4. Of the others, what has settled ahead of the rest.
            ahead = [i for i in current if not is_done[i] and settled[i] > self.rows[i].given]
            if ahead := [i for i in ahead if not self.rows[i].options.logprobs]:
                yield from self._commit_prefixes(ahead, [settled[i] for i in ahead], [steps[i] for i in ahead], began)
            rows = [i for i in rows if self.rows[i].finish_reason is None]

    def _decode_rows(self, rows: list[int], began: float) -> Iterator[Event]:
        """The autoregressive baseline with the same weights: one token a pass, from encode's own logits."""
        while rows:
            logits_BV = self.model.logits(self.last_XD[rows])
            log_p_BV = torch.log_softmax(logits_BV, -1)
            logits_BV = self._constrain(logits_BV, rows)
            uniform_B = self.dice.sample(rows, [len(self.rows[i].tokens) for i in rows], [0] * len(rows))
            chosen = [
                pick_token(logits_BV[n], self.rows[i].options, uniform_B["uniform_BL"][n, 0])
                for n, i in enumerate(rows)
            ]
            for n, (i, token) in enumerate(zip(rows, chosen, strict=True)):
                row = self.rows[i]
                row.steps, row.passes = row.steps + 1, row.passes + 1
                yield from self._take(i, [token], [float(log_p_BV[n, token])], 1, began)
            if rows := [i for i in rows if self.rows[i].finish_reason is None]:
                tokens = [[self.rows[i].tokens[-1]] for i in rows]
                self._encode(tokens, rows)

    # ---- steps of the loops -------------------------------------------------------------------------------------

    def _encode_prompts(self) -> None:
        """Encode every prompt behind what the cache holds of it, in chunks; the last chunk of those that go on to
        denoise waits for their first step."""
        todo = [row.prompt[held:] for row, held in zip(self.rows, self.cache.lengths, strict=True)]
        for row, rest in zip(self.rows, todo, strict=True):
            row.reused = len(row.prompt) - len(rest)
            if row.options.mode == "diffusion":
                row.pending = rest[(len(rest) - 1) // self.chunk * self.chunk :]
        todo = [rest[: len(rest) - len(row.pending)] for row, rest in zip(self.rows, todo, strict=True)]
        for start in range(0, max(map(len, todo)), self.chunk):
            rows = [i for i, rest in enumerate(todo) if len(rest) > start]
            self._encode([todo[i][start : start + self.chunk] for i in rows], rows)

    def _encode(self, tokens: list[list[int]], rows: list[int]) -> Tensor:
        """Encode ragged tokens; hidden states [B, T, D], and the last real one of each row goes into last_XD."""
        counts = self._make_room(tokens, rows)
        hidden_BTD = self.model.encode(self._padded(tokens, max(counts)), self.cache, rows, counts)
        self._keep_last(hidden_BTD, rows, counts)
        return hidden_BTD

    def _make_room(self, tokens: list[list[int]], rows: list[int]) -> list[int]:
        """The counts of these tokens; the cache has room for them: an answer without a limit makes it grow."""
        counts = [len(row) for row in tokens]
        need = max(self.cache.lengths[i] + count for i, count in zip(rows, counts, strict=True))
        if need > self.cache.capacity:
            grown = min(max(need, 2 * self.cache.capacity), self.config.max_position)
            self.cache = self.cache.fork(list(range(self.cache.batch)), grown)
            self._recorded.clear()
            self._pass = None
        return counts

    def _padded(self, tokens: list[list[int]], width: int) -> Tensor:
        padded = [row + [self.config.pad_id] * (width - len(row)) for row in tokens]
        return torch.tensor(padded, device=self.model.device)

    def _keep_last(self, hidden_BTD: Tensor, rows: list[int], counts: list[int]) -> None:
        last_B = torch.tensor(counts, device=hidden_BTD.device) - 1
        self.last_XD[rows] = hidden_BTD[torch.arange(len(rows), device=hidden_BTD.device), last_B]

    def _canvases(self) -> Canvases:
        dice = self.dice
        seeds, requests = ([0] * len(self.rows),) * 2
        if isinstance(dice, CountedDice):
            seeds, requests = list(dice.seeds), list(dice.requests)
        rules, early = [row.rules for row in self.rows], [row.options.early for row in self.rows]
        return Canvases.allocate(self.model, rules, seeds, requests, self.length, early, self.banned, any(self.pins))

    def _begin(self, rows: list[int]) -> None:
        """Give rows a fresh canvas of noise, pins in place."""
        if rows:
            canvases = [self.rows[i].canvas for i in rows]
            rooms = [min(self.length, self.length if (room := self.rows[i].room) is None else room) for i in rows]
            warm_BL, pin_BL = self._here(self.warm, rows), self._here(self.pins, rows)
            fresh_BL = torch.where(warm_BL >= 0, warm_BL, self.dice.canvas(rows, canvases))
            self.state.begin_(rows, fresh_BL, pin_BL, canvases, self._banned(rows), rooms)

    def _banned(self, rows: list[int]) -> Tensor:
        """Positions [B, L] that may not end the answer; a grammar knows by itself where its text may end."""
        position_L = torch.arange(self.length)
        lacking = [self.rows[i].options.min_tokens - len(self.rows[i].tokens) for i in rows]
        banned_BL = position_L < torch.tensor(lacking)[:, None]
        for n, i in enumerate(rows):
            for _, first, last in self._spans_here(i):
                banned_BL[n, first:last] = False
        return banned_BL.to(self.model.device)

    def _step(self, rows: list[int]) -> None:
        """One step of rows that either all have something to encode or all have nothing."""
        tokens, length = [self.rows[i].pending for i in rows], self.length
        counts = self._make_room(tokens, rows)
        width, lengths = max(counts), [self.cache.lengths[i] for i in rows]
        bans = any(self.rows[i].options.min_tokens > len(self.rows[i].tokens) for i in rows)
        if self.record and width <= length:
            batch, encode = 1 << (len(rows) - 1).bit_length(), length if width else 0
            key = (batch, encode, bans)
            if key not in self._recorded:
                is_cuda = self.model.device.type == "cuda"
                self._recorded[key] = Recorded(self.model, self.cache, self.state, *key, records=is_cuda)
            tokens_BT = self._padded(tokens, encode) if encode else None
            encoded_BTD = self._recorded[key](rows, lengths, counts, tokens_BT)
        else:
            if isinstance(self.dice, CountedDice):
                dice, noise_BL = self._dice_of(self.dice, rows)
            else:
                place = [self.rows[i].canvas for i in rows], [self.rows[i].step for i in rows]
                dice, noise_BL = self.dice.sample(rows, *place), self.dice.renoise(rows, *place)
            is_first = all(self.rows[i].step == 0 for i in rows)
            at_B = torch.tensor(rows, device=self.model.device)
            tokens_BT = self._padded(tokens, width) if width else None
            run = self._pass_of(rows, counts, width, lengths)
            encoded_BTD = step_(
                self.model, self.cache, self.state, at_B, run, tokens_BT, dice, noise_BL, is_first, bans,
                self._project(rows, at_B),
            )  # fmt: skip
        if encoded_BTD is not None:
            self.cache.advance(rows, counts)
            self._keep_last(encoded_BTD, rows, counts)
            for i in rows:
                self.rows[i].pending = []

    def _dice_of(self, dice: CountedDice, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """The dice of the step each row is at, some steps counted together."""
        due = [i for i in rows if self.rows[i].step % DICE_AHEAD == 0]
        if due:
            again = [i for i in due for _ in range(DICE_AHEAD)]
            place = (
                [self.rows[i].canvas for i in again],
                [self.rows[i].step + n for i in due for n in range(DICE_AHEAD)],
            )
            shape = len(due), DICE_AHEAD, -1
            counted = dice.sample(again, *place)["uniform_BL"].view(shape), dice.renoise(again, *place).view(shape)
            for n, i in enumerate(due):
                self._counted[i] = counted[0][n], counted[1][n]
        steps = [self.rows[i].step % DICE_AHEAD for i in rows]
        uniform_BL, noise_BL = (
            torch.stack([self._counted[i][side][step] for i, step in zip(rows, steps, strict=True)]) for side in (0, 1)
        )
        return {"uniform_BL": uniform_BL}, noise_BL

    def _pass_of(self, rows: list[int], counts: list[int], width: int, lengths: list[int]) -> Pass:
        """What the layers share, made once for all the steps of a canvas."""
        key = (tuple(rows), tuple(counts), tuple(lengths))
        if self._pass is None or self._pass[0] != key:
            self._pass = key, Pass(self.model, self.cache, rows, counts, width, self.length)
        return self._pass[1]

    def _drafts(self, rows: list[int]) -> Iterator[Event]:
        state = self.state
        shown = [x[rows].tolist() for x in (state.argmax_XL, state.entropy_XL, state.accepted_XL)]
        for i, tokens, entropies, accepted in zip(rows, *shown, strict=True):
            if self.rows[i].options.drafts:
                yield Draft(i, self.rows[i].canvas, self.rows[i].step, tokens, entropies, accepted)

    def _commit_canvases(self, rows: list[int], steps: list[int], began: float) -> Iterator[Event]:
        """Cut each canvas at its end. Where the row goes on it waits to be encoded with the next canvas's first step;
        where its log-probabilities are wanted it is encoded now."""
        canvases = self.state.argmax_XL[rows].tolist()
        for i in rows:
            for span, _, _ in self._spans_here(i):
                span.commit()
        kept = [self._cut(i, tokens[self.rows[i].given :]) for i, tokens in zip(rows, canvases, strict=True)]
        encoding = [n for n, i in enumerate(rows) if self.rows[i].options.logprobs and kept[n]]
        logprobs: dict[int, list[float]] = {}
        if encoding:
            inside = [rows[n] for n in encoding]
            before_BD = self.last_XD[inside]
            hidden_BTD = self._encode([kept[n] for n in encoding], inside)
            for place, n in enumerate(encoding):
                self.rows[rows[n]].passes += 1
                seen_TD = torch.cat([before_BD[place : place + 1], hidden_BTD[place, : len(kept[n]) - 1]])
                log_p_TV = torch.log_softmax(self.model.logits(seen_TD), -1)
                ids = torch.tensor(kept[n], device=log_p_TV.device)
                logprobs[n] = log_p_TV.gather(1, ids[:, None])[:, 0].tolist()
        for n, i in enumerate(rows):
            row = self.rows[i]
            row.steps += steps[n]
            row.pending = [] if n in logprobs else canvases[n][: row.given] + kept[n]
            yield from self._emit(i, kept[n], logprobs.get(n), steps[n], began)
            row.canvas, row.step, row.given = row.canvas + 1, 0, 0

    def _commit_prefixes(self, rows: list[int], settled: list[int], steps: list[int], began: float) -> Iterator[Event]:
        """What is pinned by now is final, though its canvas goes on; it is encoded with the whole canvas."""
        canvases = self.state.argmax_XL[rows].tolist()
        for i, tokens, until, taken in zip(rows, canvases, settled, steps, strict=True):
            row = self.rows[i]
            kept = self._cut(i, tokens[row.given : until], is_whole=False)
            row.given = until
            if row.finish_reason is not None:  # a stop string, an end or the limit: the rest does not matter
                row.steps += taken
            yield from self._emit(i, kept, None, taken, began)

    def _take(
        self, i: int, tokens: list[int], logprobs: list[float] | None, steps: int, began: float
    ) -> Iterator[Event]:
        kept = self._cut(i, tokens)
        yield from self._emit(i, kept, logprobs[: len(kept)] if logprobs is not None else None, steps, began)

    def _cut(self, i: int, tokens: list[int], is_whole: bool = True) -> list[int]:
        """The tokens that count: up to eos, a stop string, the token limit or the end of the context. `is_whole`: the
        canvas ends with them."""
        row = self.rows[i]
        lacking = row.options.min_tokens - len(row.tokens)
        ends = [n for n, token in enumerate(tokens) if token in self.config.eos_ids and n >= lacking]
        if ends:
            tokens, row.finish_reason = tokens[: ends[0] + 1], "stop"
        if row.room is not None and len(tokens) >= row.room:
            if len(tokens) > row.room or row.finish_reason is None:
                row.finish_reason = "length"
            tokens = tokens[: row.room]
        if self.watch is not None and (keep := self.watch(i, tokens)) is not None:
            tokens, row.finish_reason = tokens[:keep], "stop"
        if any(span.width is None and span.guide.is_over for span in self.spans[i]):
            row.finish_reason = "stop"  # complete, though there was no room for an end behind it
        need = self.length if row.options.mode == "diffusion" else 1
        if (
            is_whole
            and row.finish_reason is None
            and len(row.prompt) + len(row.tokens) + len(tokens) + need > self.config.max_position
        ):
            row.finish_reason = "length"
        return tokens

    def _emit(
        self, i: int, tokens: list[int], logprobs: list[float] | None, steps: int, began: float
    ) -> Iterator[Event]:
        row = self.rows[i]
        row.tokens += tokens
        row.first_commit = row.first_commit or time.perf_counter() - began
        wanted = (logprobs or []) if row.options.logprobs else None
        row.logprobs += wanted or []
        yield Commit(i, row.canvas, steps, tokens, wanted)
        if row.finish_reason is not None:
            canvases = row.canvas + 1 if row.options.mode == "diffusion" else 0
            usage = Usage(
                prompt_tokens=len(row.prompt),
                tokens=len(row.tokens),
                canvases=canvases,
                steps=row.steps,
                passes=row.passes,
                seconds=time.perf_counter() - began,
                first_commit_seconds=row.first_commit,
                reused_tokens=row.reused,
            )
            yield Done(
                i,
                row.finish_reason,  # type: ignore[arg-type]
                row.tokens,
                usage,
                row.options.seed or 0,
                logprobs=row.logprobs if row.options.logprobs else None,
            )

    # ---- small helpers ------------------------------------------------------------------------------------------

    def _here(self, places: Sequence[Mapping[int, int]], rows: list[int]) -> Tensor:
        """What these say of the canvas each row is on: tokens [B, L], -1 for nothing."""
        table = torch.full((len(rows), self.length), -1)
        for n, i in enumerate(rows):
            first = self.rows[i].canvas * self.length
            for position, token in places[i].items():
                if 0 <= position - first < self.length:
                    table[n, position - first] = token
        return table.to(self.model.device)

    def _spans_here(self, i: int) -> list[tuple[Span, int, int]]:
        """The spans of row i on its canvas: from position, to position."""
        first, found = self.rows[i].canvas * self.length, []
        for span in self.spans[i]:
            last = self.length if span.width is None else min(self.length, span.start + span.width - first)
            if span.start - first < self.length and last > 0:
                found.append((span, max(0, span.start - first), last))
        return found

    def _project(self, rows: list[int], at_B: Tensor) -> Project | None:
        """What grammars and `inspect` do with these rows' read-outs; None where there is nothing to do."""
        turns = []
        for n, i in enumerate(rows):
            row = self.rows[i]
            is_last, bound = row.step + 1 >= row.rules.max_steps, row.rules.entropy_bound
            turns += [Turn(n, first, last, span, bound, is_last) for span, first, last in self._spans_here(i)]
        if not turns and self.inspect is None:
            return None

        def project(logits_BLV: Tensor, argmax_BL: Tensor, entropy_BL: Tensor) -> Projected:
            if self.inspect is not None:
                self.inspect(rows, logits_BLV)
            is_sure_BL = accept(entropy_BL, self.state.bound_X[at_B])
            return project_(turns, self.config, logits_BLV, argmax_BL, entropy_BL, is_sure_BL)

        return project

    def _constrain(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        for n, i in enumerate(rows):
            if len(self.rows[i].tokens) < self.rows[i].options.min_tokens:
                logits_BV[n, list(self.config.eos_ids)] = -torch.inf
        return logits_BV

    def _check_canvas(self) -> None:
        asked = {
            "mode 'diffusion'": any(row.options.mode == "diffusion" for row in self.rows),
            "a draft": any(row.options.drafts for row in self.rows),
            "a pin": any(self.pins),
            "a warm token": any(self.warm),
            "a span": any(self.spans),
        }
        for what in (what for what, is_asked in asked.items() if is_asked):
            self.config.check_canvas(what)

    def _check_prompts(self) -> None:
        for i, row in enumerate(self.rows):
            if not row.prompt:
                raise InputError(f"prompt {i} is empty; give at least one token (the begin-of-text token, say)")
            bad = next((t for t in row.prompt if not 0 <= t < self.config.vocab_size), None)
            if bad is not None:
                raise InputError(
                    f"prompt {i} holds token {bad}; the vocabulary has ids from 0 to {self.config.vocab_size - 1}"
                )
            need = len(row.prompt) + (self.length if row.options.mode == "diffusion" else 1)
            if need > self.config.max_position:
                raise CapacityError(
                    f"prompt {i} has {len(row.prompt)} tokens and a canvas needs {need - len(row.prompt)} more, beyond "
                    f"the context of {self.config.max_position}; shorten the prompt"
                )

    def _canvas_length(self) -> int:
        """The model's own, or less for short rows without room for so much: a length that follows from a row alone, so
        that its text does not hang on its neighbours."""
        whole, found = self.config.canvas_length, set()
        for row, pins in zip(self.rows, self.pins, strict=True):
            need = max(row.room or whole, max(pins, default=-1) + 1) if row.options.short else whole
            found.add(min(whole, -(-need // SHORT) * SHORT))
        if len(found) > 1:
            raise InputError(
                f"the rows need canvases of {' and '.join(map(str, sorted(found)))} positions; short rows of one run "
                "take one length, run them apart"
            )
        return found.pop()

    def _check_places(self) -> None:
        for name, places in ("pin", self.pins), ("warm token", self.warm):
            for i, row in enumerate(places):
                if row and self.rows[i].options.mode != "diffusion":
                    raise InputError(
                        f"prompt {i} has {name}s in mode {self.rows[i].options.mode!r}; they need 'diffusion'"
                    )
                most = self.config.max_position - len(self.rows[i].prompt)
                for position, token in row.items():
                    if not 0 <= position < most or not 0 <= token < self.config.vocab_size:
                        raise InputError(
                            f"{name} {token} at position {position} of prompt {i} does not fit; positions go to "
                            f"{most - 1}, tokens to {self.config.vocab_size - 1}"
                        )

    def _room_for_all(self, cache: KVCache | None) -> KVCache:
        """A cache with room for prompts and the beginning of long answers; it grows with the text."""
        config, need = self.config, 0
        for row in self.rows:
            new = min(row.options.max_tokens or FIRST_ROOM, FIRST_ROOM)
            need = max(need, len(row.prompt) + -(-new // self.length) * self.length)
        need = min(need, config.max_position)
        if cache is None:
            return KVCache.allocate(config, len(self.rows), need, self.model.device, self.model.dtype)
        for row, held in zip(self.rows, cache.lengths, strict=True):
            if held >= len(row.prompt):
                raise InputError(
                    f"the cache holds {held} tokens of a prompt of {len(row.prompt)}; truncate it to fewer first"
                )
        return cache if cache.capacity >= need else cache.fork(list(range(cache.batch)), need)


def _to_host(x: Tensor) -> tuple[Tensor, Any]:
    """Begin to copy; `_wait_for` ends it. On a CPU there is nothing to wait for."""
    if x.device.type == "cpu":
        return x, None
    target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    target.copy_(x, non_blocking=True)
    event = torch.Event(x.device)
    event.record()
    return target, event


def _wait_for(copy: tuple[Tensor, Any]) -> list[Any]:
    target, event = copy
    if event is not None:
        event.synchronize()
    return target.tolist()


def pick_token(logits_V: Tensor, options: Options, uniform: Tensor) -> int:
    """One token by temperature, top-k and top-p, from a uniform number in [0, 1); temperature 0 is greedy."""
    if options.temperature < 1e-6:  # lower ones would overflow float32, and are greedy anyway
        return int(logits_V.argmax())
    p_V, order_V = torch.softmax(logits_V / options.temperature, -1).sort(descending=True, stable=True)
    if options.top_k:
        p_V = p_V[: options.top_k]
    before_V = p_V.cumsum(-1) - p_V
    p_V = p_V * (before_V < options.top_p * p_V.sum())
    chosen = int(torch.searchsorted(p_V.cumsum(-1), uniform * p_V.sum(), right=True))
    return int(order_V[min(chosen, int((p_V > 0).sum()) - 1)])
