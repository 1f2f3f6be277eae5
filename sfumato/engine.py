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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.cache import KVCache
from sfumato.diffusion import CountedDice, Dice, Rules
from sfumato.events import CapacityError, Commit, Done, Draft, Event, InputError, Options, Usage
from sfumato.model import Model, Pass
from sfumato.step import Canvases, Recorded, step_

Watch = Callable[[int, list[int]], int | None]
"""(row, newly committed tokens) -> how many of them to keep if the answer ends here, None to go on."""

FIRST_ROOM = 4096
"""New tokens that a cache has room for at first; longer answers make it grow by doubling."""

DICE_AHEAD = 8
"""Steps whose dice are counted together: a count is forty small operations, however many numbers it makes."""

PREFILL_CHUNK = 2048
"""Prompt tokens per encode pass: bounds the memory of a long prompt; any value gives the same result."""


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
    `pins` maps, for each row, positions of the first canvas to tokens that stay fixed there. `cache` continues from
    earlier work: row i of it must hold exactly the first cache.lengths[i] tokens of prompt i, and not all of them.
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
        self.rows = [Row(list(p), o, Rules.of(o)) for p, o in zip(prompts, each, strict=True)]
        self._check_prompts()
        pins = pins or [{}] * len(prompts)
        if len(pins) != len(prompts) or (cache is not None and cache.batch != len(prompts)):
            held = "" if cache is None else f" and a cache of {cache.batch} rows"
            raise InputError(
                f"{len(prompts)} prompts came with {len(pins)} sets of pins{held}; give one for each prompt"
            )
        self.pins = self._pin_table(pins)
        if dice is None:
            seeds = [o.seed or 0 for o in each]
            dice = CountedDice(seeds, [0] * len(seeds), self.config.canvas_length, self.config.vocab_size, model.device)
        self.dice = dice
        self.cache = self._room_for_all(cache)
        is_cuda = model.device.type == "cuda"
        self.record = (is_cuda if record is None else record) and isinstance(dice, CountedDice)
        has_drafts = any(o.drafts for o in each)  # which show every step: the host is asked at once
        self.lag = 0 if has_drafts else int(is_cuda) if lag is None else lag
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
            asked = torch.stack([self.state.is_done_X.long(), self.state.step_X])
            flights.append(({i: self.rows[i].canvas for i in rows}, _to_host(asked)))
            if len(flights) <= self.lag:
                continue
            canvases, answer = flights.popleft()
            is_done, steps = _wait_for(answer)
            stopped = [i for i in rows if is_done[i] and canvases.get(i) == self.rows[i].canvas]
            # 3. Commit the argmax canvas of those; who goes on begins the next canvas.
            if stopped:
                yield from self._commit_canvases(stopped, [steps[i] for i in stopped], began)
                self._begin([i for i in stopped if self.rows[i].finish_reason is None])
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
        has_pins = bool((self.pins >= 0).any())
        return Canvases.allocate(self.model, [row.rules for row in self.rows], seeds, requests, has_pins)

    def _begin(self, rows: list[int]) -> None:
        """Give rows a fresh canvas of noise, pins in place."""
        if rows:
            canvases = [self.rows[i].canvas for i in rows]
            lacking = [self.rows[i].options.min_tokens - len(self.rows[i].tokens) for i in rows]
            self.state.begin_(rows, self.dice.canvas(rows, canvases), self._pins_now(rows), canvases, lacking)

    def _step(self, rows: list[int]) -> None:
        """One step of rows that either all have something to encode or all have nothing."""
        tokens, length = [self.rows[i].pending for i in rows], self.config.canvas_length
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
                self.model, self.cache, self.state, at_B, run, tokens_BT, dice, noise_BL, is_first, bans
            )
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
            self._pass = key, Pass(self.model, self.cache, rows, counts, width, self.config.canvas_length)
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
        kept = [self._cut(i, tokens) for i, tokens in zip(rows, canvases, strict=True)]
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
            row.pending = [] if n in logprobs else kept[n]
            yield from self._emit(i, kept[n], logprobs.get(n), steps[n], began)
            row.canvas, row.step = row.canvas + 1, 0

    def _take(
        self, i: int, tokens: list[int], logprobs: list[float] | None, steps: int, began: float
    ) -> Iterator[Event]:
        kept = self._cut(i, tokens)
        yield from self._emit(i, kept, logprobs[: len(kept)] if logprobs is not None else None, steps, began)

    def _cut(self, i: int, tokens: list[int]) -> list[int]:
        """The tokens that count: up to eos, a stop string, the token limit or the end of the context."""
        row = self.rows[i]
        ends = [n for n, token in enumerate(tokens) if token in self.config.eos_ids]
        if ends:
            tokens, row.finish_reason = tokens[: ends[0] + 1], "stop"
        if row.room is not None and len(tokens) >= row.room:
            if len(tokens) > row.room or row.finish_reason is None:
                row.finish_reason = "length"
            tokens = tokens[: row.room]
        if self.watch is not None and (keep := self.watch(i, tokens)) is not None:
            tokens, row.finish_reason = tokens[:keep], "stop"
        need = self.config.canvas_length if row.options.mode == "diffusion" else 1
        if (
            row.finish_reason is None
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

    def _pins_now(self, rows: list[int]) -> Tensor:
        """Pinned tokens [B, L] of the canvas each row is on, -1 where free: pins belong to the first canvas."""
        is_first = torch.tensor([[self.rows[i].canvas == 0] for i in rows], device=self.model.device)
        return torch.where(is_first, self.pins[rows], -1)

    def _constrain(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        for n, i in enumerate(rows):
            if len(self.rows[i].tokens) < self.rows[i].options.min_tokens:
                logits_BV[n, list(self.config.eos_ids)] = -torch.inf
        return logits_BV

    def _check_prompts(self) -> None:
        for i, row in enumerate(self.rows):
            if not row.prompt:
                raise InputError(f"prompt {i} is empty; give at least one token (the begin-of-text token, say)")
            bad = next((t for t in row.prompt if not 0 <= t < self.config.vocab_size), None)
            if bad is not None:
                raise InputError(
                    f"prompt {i} holds token {bad}; the vocabulary has ids from 0 to {self.config.vocab_size - 1}"
                )
            need = len(row.prompt) + (self.config.canvas_length if row.options.mode == "diffusion" else 1)
            if need > self.config.max_position:
                raise CapacityError(
                    f"prompt {i} has {len(row.prompt)} tokens and a canvas needs {need - len(row.prompt)} more, beyond "
                    f"the context of {self.config.max_position}; shorten the prompt"
                )

    def _pin_table(self, pins: Sequence[Mapping[int, int]]) -> Tensor:
        table = torch.full((len(self.rows), self.config.canvas_length), -1)
        for i, row in enumerate(pins):
            if row and self.rows[i].options.mode != "diffusion":
                raise InputError(f"prompt {i} has pins in mode {self.rows[i].options.mode!r}; they need 'diffusion'")
            for position, token in row.items():
                if not 0 <= position < self.config.canvas_length or not 0 <= token < self.config.vocab_size:
                    raise InputError(
                        f"pin {token} at position {position} of prompt {i} does not fit; positions go to "
                        f"{self.config.canvas_length - 1}, tokens to {self.config.vocab_size - 1}"
                    )
                table[i, position] = token
        return table.to(self.model.device)

    def _room_for_all(self, cache: KVCache | None) -> KVCache:
        """A cache with room for prompts and the beginning of long answers; it grows with the text."""
        config, need = self.config, 0
        for row in self.rows:
            new = min(row.options.max_tokens or FIRST_ROOM, FIRST_ROOM)
            need = max(need, len(row.prompt) + -(-new // config.canvas_length) * config.canvas_length)
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
