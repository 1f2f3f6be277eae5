"""Ids in, events out: the two loops.

The outer loop grows the text canvas by canvas, the inner one denoises a canvas step by step. Every row is at its own
length, canvas and step: a row that stops commits and begins its next canvas while its neighbours go on. Nothing here
knows text; what must look at text (stop strings) is asked through `watch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.cache import KVCache
from sfumato.diffusion import CountedDice, Dice, Rules, accept, is_confident, is_stable
from sfumato.events import CapacityError, Commit, Done, Draft, Event, InputError, Options, Usage
from sfumato.model import Model

Watch = Callable[[int, list[int]], int | None]
"""(row, newly committed tokens) -> how many of them to keep if the answer ends here, None to go on."""

FIRST_ROOM = 4096
"""New tokens that a cache has room for at first; longer answers make it grow by doubling."""

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
    canvas: int = 0
    step: int = 0
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
    earlier work: row i of it must hold exactly the first cache.lengths[i] tokens of prompt i, and not all of them."""

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

    @torch.inference_mode()  # as a decorator it holds while the loops run, and not in the caller between two events
    def __iter__(self) -> Iterator[Event]:
        began = time.perf_counter()
        last_BD = self._encode_prompts()
        is_diffusion = [row.options.mode == "diffusion" for row in self.rows]
        for mode, loop in ((True, self._denoise_rows), (False, self._decode_rows)):
            if rows := [i for i, flag in enumerate(is_diffusion) if flag is mode]:
                yield from loop(rows, last_BD, began)

    # ---- the two loops ------------------------------------------------------------------------------------------

    def _denoise_rows(self, rows: list[int], last_BD: Tensor, began: float) -> Iterator[Event]:
        model, length = self.model, self.config.canvas_length
        size, depth = len(self.rows), max(1, max(self.rows[i].rules.stability for i in rows))
        canvas_BL = torch.zeros(size, length, dtype=torch.long, device=model.device)
        history_BHL = torch.full((size, depth, length), -1, device=model.device)
        soft_BLD = torch.zeros(size, length, self.config.hidden_size, dtype=model.dtype, device=model.device)
        self._begin(rows, canvas_BL, history_BHL, soft_BLD)
        while rows:
            # 1. One denoise pass over the canvases of all live rows.
            at = torch.tensor(rows, device=model.device)
            is_first = all(self.rows[i].step == 0 for i in rows)
            hidden_BLD = model.denoise(canvas_BL[at], self.cache, None if is_first else soft_BLD[at], rows)
            # 2. Read out: what would be sampled, what is most likely, how sure.
            read = self._read_out(hidden_BLD, rows)
            pin_BL = self._pins_now(rows)
            is_pinned_BL = pin_BL >= 0
            argmax_BL = torch.where(is_pinned_BL, pin_BL, read.argmax_BL)
            entropy_BL = read.entropy_BL.masked_fill(is_pinned_BL, 0.0)
            # 3. Accept the surest positions, renoise the rest.
            accepted_BL = accept(entropy_BL, self._per_row(rows, "entropy_bound")) | is_pinned_BL
            noise_BL = self.dice.renoise(rows, *self._place(rows))
            next_BL = torch.where(accepted_BL, read.sample_BL, noise_BL)
            # 4. Stop where the canvas stands still and is sure, or at the cap.
            stability_B = self._per_row(rows, "stability")
            is_done_B = is_stable(argmax_BL, history_BHL[at], stability_B)
            is_done_B &= is_confident(entropy_BL, self._per_row(rows, "confidence"))
            # 5. The next step sees the soft embedding of this one.
            canvas_BL[at] = torch.where(is_pinned_BL, pin_BL, next_BL)
            history_BHL[at] = torch.cat([history_BHL[at][:, 1:], argmax_BL[:, None]], dim=1)
            soft_BLD[at] = self._soft(read.logits_BLV, pin_BL)
            stopped = []
            for n, (i, is_done) in enumerate(zip(rows, is_done_B.tolist(), strict=True)):
                row = self.rows[i]
                row.step, row.steps, row.passes = row.step + 1, row.steps + 1, row.passes + 1
                if row.options.drafts:
                    tokens, entropies, accepted = (x[n].tolist() for x in (argmax_BL, entropy_BL, accepted_BL))
                    yield Draft(i, row.canvas, row.step, tokens, entropies, accepted)
                if is_done or row.step == row.rules.max_steps:
                    stopped.append(n)
            # 6. Commit the argmax canvas of rows that stopped; those that go on begin their next canvas.
            if stopped:
                committing = [rows[n] for n in stopped]
                yield from self._commit_canvases(committing, argmax_BL[stopped], last_BD, began)
                going_on = [i for i in committing if self.rows[i].finish_reason is None]
                self._begin(going_on, canvas_BL, history_BHL, soft_BLD)
                rows = [i for i in rows if self.rows[i].finish_reason is None]

    def _decode_rows(self, rows: list[int], last_BD: Tensor, began: float) -> Iterator[Event]:
        """The autoregressive baseline with the same weights: one token a pass, from encode's own logits."""
        while rows:
            logits_BV = self.model.logits(last_BD[rows])
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
                last_BD[rows] = self._encode(tokens, rows)[1]

    # ---- steps of the loops -------------------------------------------------------------------------------------

    def _encode_prompts(self) -> Tensor:
        """Encode every prompt behind what the cache holds of it, in chunks; the last hidden state of each row."""
        last_BD = torch.zeros(len(self.rows), self.config.hidden_size, dtype=self.model.dtype, device=self.model.device)
        todo = [row.prompt[held:] for row, held in zip(self.rows, self.cache.lengths, strict=True)]
        for row, rest in zip(self.rows, todo, strict=True):
            row.reused = len(row.prompt) - len(rest)
        for start in range(0, max(map(len, todo)), self.chunk):
            rows = [i for i, rest in enumerate(todo) if len(rest) > start]
            last_BD[rows] = self._encode([todo[i][start : start + self.chunk] for i in rows], rows)[1]
        return last_BD

    def _encode(self, tokens: list[list[int]], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Encode ragged tokens; hidden states [B, T, D] and the last real one of each row [B, D]."""
        counts = [len(row) for row in tokens]
        width = max(counts)
        need = max(self.cache.lengths[i] + count for i, count in zip(rows, counts, strict=True))
        if need > self.cache.capacity:  # an answer without a token limit: grow by doubling
            grown = min(max(need, 2 * self.cache.capacity), self.config.max_position)
            self.cache = self.cache.fork(list(range(self.cache.batch)), grown)
        padded = [row + [self.config.pad_id] * (width - len(row)) for row in tokens]
        hidden_BTD = self.model.encode(torch.tensor(padded, device=self.model.device), self.cache, rows, counts)
        return hidden_BTD, hidden_BTD[torch.arange(len(rows)), torch.tensor(counts) - 1]

    def _begin(self, rows: list[int], canvas_BL: Tensor, history_BHL: Tensor, soft_BLD: Tensor) -> None:
        """Give rows a fresh canvas of noise, pins in place."""
        if rows:
            fresh_BL = self.dice.canvas(rows, [self.rows[i].canvas for i in rows])
            pin_BL = self._pins_now(rows)
            canvas_BL[rows] = torch.where(pin_BL >= 0, pin_BL, fresh_BL)
            history_BHL[rows] = -1
            soft_BLD[rows] = 0

    def _read_out(self, hidden_BLD: Tensor, rows: list[int]):
        temperature_B = torch.tensor(
            [self.rows[i].rules.schedule.temperature(self.rows[i].step) for i in rows], device=self.model.device
        )
        lacking_B1 = torch.tensor(
            [[self.rows[i].options.min_tokens - len(self.rows[i].tokens)] for i in rows], device=self.model.device
        )
        banned = None
        if any(lack > 0 for (lack,) in lacking_B1.tolist()):
            position_L = torch.arange(hidden_BLD.shape[1], device=self.model.device)
            banned = (position_L < lacking_B1, torch.tensor(self.config.eos_ids, device=self.model.device))
        return self.model.ops.read_out(
            hidden_BLD,
            self.model.embed_tokens.weight,
            self.config.softcap,
            temperature_B,
            **self.dice.sample(rows, *self._place(rows)),
            banned=banned,
        )

    def _soft(self, logits_BLV: Tensor, pin_BL: Tensor) -> Tensor:
        weight, scale = self.model.embed_tokens.weight, self.model.embed_scale
        soft_BLD = self.model.ops.soft_embedding(logits_BLV, weight, scale)
        pinned_BLD = weight[pin_BL.clamp_min(0)] * scale
        return torch.where(pin_BL[..., None] >= 0, pinned_BLD, soft_BLD)

    def _commit_canvases(self, rows: list[int], argmax_BL: Tensor, last_BD: Tensor, began: float) -> Iterator[Event]:
        """Cut each canvas at its end; encode it where the row goes on or its log-probabilities are wanted."""
        canvases = argmax_BL.tolist()
        kept = [self._cut(i, tokens) for i, tokens in zip(rows, canvases, strict=True)]
        wanted = [row.finish_reason is None or row.options.logprobs for row in (self.rows[i] for i in rows)]
        encoding = [n for n, is_wanted in enumerate(wanted) if is_wanted and kept[n]]
        logprobs: dict[int, list[float]] = {}
        if encoding:
            inside = [rows[n] for n in encoding]
            before_BD = last_BD[inside]
            hidden_BTD, last = self._encode([kept[n] for n in encoding], inside)
            last_BD[inside] = last
            for place, n in enumerate(encoding):
                self.rows[rows[n]].passes += 1
                if self.rows[rows[n]].options.logprobs:
                    seen_TD = torch.cat([before_BD[place : place + 1], hidden_BTD[place, : len(kept[n]) - 1]])
                    log_p_TV = torch.log_softmax(self.model.logits(seen_TD), -1)
                    ids = torch.tensor(kept[n], device=log_p_TV.device)
                    logprobs[n] = log_p_TV.gather(1, ids[:, None])[:, 0].tolist()
        for n, i in enumerate(rows):
            row = self.rows[i]
            yield from self._emit(i, kept[n], logprobs.get(n), row.step, began)
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

    def _place(self, rows: list[int]) -> tuple[list[int], list[int]]:
        return [self.rows[i].canvas for i in rows], [self.rows[i].step for i in rows]

    def _per_row(self, rows: list[int], rule: str) -> Tensor:
        return torch.tensor([getattr(self.rows[i].rules, rule) for i in rows], device=self.model.device)

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
