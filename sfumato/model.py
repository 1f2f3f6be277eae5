"""The whole network: one stack of Gemma 4 blocks that runs in two ways.

`encode` is causal and writes the cache; `denoise` is bidirectional inside the canvas and only reads it. Both walk the
same modules; what differs is the mask, who owns the new keys, the layer scalar, and the self-conditioning at denoise's
entrance. The module tree carries the released checkpoint's tensor names, so that `weights.py` needs one short table.
The model knows its config, masks, cache and operations, and nothing of sampling, quantisation or training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sfumato.cache import KVCache
from sfumato.config import LayerConfig, ModelConfig, Rope
from sfumato.masks import Mask
from sfumato.ops import Ops


class Norm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Gated(nn.Module):
    """down(gelu(gate(x)) x up(x)), the dense feed-forward."""

    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.gated(self.gate_proj(x), self.up_proj(x)))


class SelfConditioning(Gated):
    """Adds what the model thought a step ago (the soft embedding) to the canvas's embedding. Denoise only."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, ops)
        self.pre_norm = Norm(config.hidden_size, config.eps, ops)
        self.eps = config.eps

    def condition(self, embedded_BLD: Tensor, soft_BLD: Tensor | None) -> Tensor:
        """The norm at the end applies on the first step too, where there is no soft embedding yet."""
        if soft_BLD is not None:
            embedded_BLD = embedded_BLD + self(self.pre_norm(soft_BLD))
        return self.ops.rms_norm(embedded_BLD, None, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values, scale 1. Full layers have no v_proj: V is the
    key projection through its own unscaled norm, without rope."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, ops: Ops) -> None:
        super().__init__()
        width, head = config.hidden_size, layer.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, layer.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, layer.kv_heads * head, bias=False) if layer.is_sliding else None
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=False)
        self.q_norm = Norm(head, config.eps, ops)
        self.k_norm = Norm(head, config.eps, ops)
        self.head, self.eps, self.ops = head, config.eps, ops

    def forward(self, x_BTD: Tensor, run: _Pass, index: int) -> Tensor:
        seen_BTS, cos_BTK, sin_BTK = run.of(index)
        heads = (*x_BTD.shape[:-1], -1, self.head)
        q_BTHK = self.q_norm(self.q_proj(x_BTD).view(heads))
        raw_BTGK = self.k_proj(x_BTD).view(heads)
        v_BTGK = raw_BTGK if self.v_proj is None else self.v_proj(x_BTD).view(heads)
        q_BTHK = self.ops.rope(q_BTHK, cos_BTK, sin_BTK)
        k_BTGK = self.ops.rope(self.k_norm(raw_BTGK), cos_BTK, sin_BTK)
        v_BTGK = self.ops.rms_norm(v_BTGK, None, self.eps)
        k_BSGK, v_BSGK = run.cache.view(index, run.rows)
        if k_BSGK.shape[1]:
            k_BSGK, v_BSGK = torch.cat([k_BSGK, k_BTGK], dim=1), torch.cat([v_BSGK, v_BTGK], dim=1)
        else:
            k_BSGK, v_BSGK = k_BTGK, v_BTGK
        mixed_BTHK = self.ops.attention(q_BTHK, k_BSGK, v_BSGK, seen_BTS)
        if run.is_encode:  # only now: in a ring the new keys take the places of old ones that these queries still see
            run.cache.append(index, k_BTGK, v_BTGK, run.rows, run.counts)
        return self.o_proj(mixed_BTHK.reshape(*x_BTD.shape[:-1], -1))


class Router(nn.Module):
    """Which experts, and how much of each. Reads the raw residual: a normed input here never converges (FACTS 2.3)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))
        self.top_k, self.eps, self.ops = config.top_k_experts, config.eps, ops

    def forward(self, residual_ND: Tensor) -> tuple[Tensor, Tensor]:
        x_ND = self.ops.rms_norm(residual_ND, None, self.eps) * self.scale * residual_ND.shape[-1] ** -0.5
        p_NE = torch.softmax(self.proj(x_ND), dim=-1, dtype=torch.float32)
        weight_NJ, index_NJ = p_NE.topk(self.top_k, dim=-1)
        weight_NJ = weight_NJ / weight_NJ.sum(-1, keepdim=True)
        return index_NJ, weight_NJ * self.per_expert_scale[index_NJ]


class Experts(nn.Module):
    """All experts of a layer in two tensors; gate and up are one matrix, gate first."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        count, inner, width = config.num_experts, config.expert_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.ops = ops

    def forward(self, x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor) -> Tensor:
        return self.ops.experts(x_ND, index_NJ, weight_NJ, self.gate_up_proj, self.down_proj)


class Block(nn.Module):
    """Attention, then a dense feed-forward and experts side by side, each between norms; scaled per direction."""

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm
    post_feedforward_layernorm_1: Norm
    pre_feedforward_layernorm_2: Norm
    post_feedforward_layernorm_2: Norm
    encode_scalar: Tensor
    denoise_scalar: Tensor

    def __init__(self, config: ModelConfig, index: int, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        for name in _BLOCK_NORMS:
            setattr(self, name, Norm(width, config.eps, ops))
        self.self_attn = Attention(config, config.layers[index], ops)
        self.mlp = Gated(width, config.intermediate_size, ops)
        self.router = Router(config, ops)
        self.experts = Experts(config, ops)
        self.register_buffer("encode_scalar", torch.ones(1))
        self.register_buffer("denoise_scalar", torch.ones(1))
        self.index = index

    def forward(self, x_BTD: Tensor, run: _Pass) -> Tensor:
        x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_BTD), run, self.index))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x_BTD)))
        residual_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        chosen = self.experts(self.pre_feedforward_layernorm_2(residual_ND), *self.router(residual_ND))
        sparse = self.post_feedforward_layernorm_2(chosen).view_as(x_BTD)
        x_BTD = x_BTD + self.post_feedforward_layernorm(dense + sparse)
        return x_BTD * (self.encode_scalar if run.is_encode else self.denoise_scalar)


_BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)


class _Pass:
    """What every layer of one pass shares: rows, counts, and per kind of layer the mask and the rope angles."""

    def __init__(
        self, config: ModelConfig, cache: KVCache, rows: list[int], counts: list[int], like_BTD: Tensor, is_encode: bool
    ) -> None:
        self.cache, self.rows, self.counts, self.is_encode = cache, rows, counts, is_encode
        self.config = config
        width, device = like_BTD.shape[1], like_BTD.device
        starts_B = cache.lengths_B(rows)
        counts_B = torch.tensor(counts, device=device)
        position_BT = starts_B[:, None] + torch.arange(width, device=device)
        self.kinds: dict[tuple[int | None, Rope, int], tuple[Tensor, Tensor, Tensor]] = {}
        for layer in config.layers:
            key = (layer.window, layer.rope, layer.head_dim)
            if key not in self.kinds:
                slots_BS = cache.slots_BS(layer.window, rows)
                mask = Mask(slots_BS, starts_B, counts_B, width, is_encode, layer.window)
                angles_BTK = position_BT[..., None].float() * frequencies(layer.rope, layer.head_dim, device)
                angles_BTK = torch.cat([angles_BTK, angles_BTK], dim=-1)
                self.kinds[key] = (
                    mask.dense_BTS(),
                    angles_BTK.cos().type_as(like_BTD),
                    angles_BTK.sin().type_as(like_BTD),
                )

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.config.layers[index]
        return self.kinds[layer.window, layer.rope, layer.head_dim]


def frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position of the K/2 angles. "Proportional": only the first share turns, spaced as if all did."""
    turning = int(rope.partial * head_dim // 2)
    exponent = torch.arange(0, 2 * turning, 2, device=device, dtype=torch.float32) / head_dim
    turns = 1.0 / (rope.theta**exponent) / rope.factor
    return torch.cat([turns, turns.new_zeros(head_dim // 2 - turning)])


class Model(nn.Module):
    """DiffusionGemma's text model. Weights start uninitialised except norms and scalars: load them or call `init_`."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, ops) for index in range(len(config.layers)))
        self.norm = Norm(config.hidden_size, config.eps, ops)
        self.self_conditioning = SelfConditioning(config, ops)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def embed_scale(self) -> Tensor:
        """sqrt(D), rounded to the weights' dtype as the reference does."""
        return torch.tensor(math.sqrt(self.config.hidden_size), dtype=self.dtype, device=self.device)

    def encode(
        self, tokens_BT: Tensor, cache: KVCache, rows: list[int] | None = None, counts: list[int] | None = None
    ) -> Tensor:
        """Append tokens to the cache; returns the normed hidden states [B, T, D].

        `rows` are the cache rows that tokens_BT's rows belong to (all, in order); `counts` how many of the T tokens of
        each are real (all), the rest being padding on the right. CapacityError when the cache is full."""
        rows = list(range(cache.batch)) if rows is None else rows
        counts = [tokens_BT.shape[1]] * len(rows) if counts is None else counts
        hidden = self._stack(self._embed(tokens_BT), cache, rows, counts, is_encode=True)
        cache.advance(rows, counts)
        return hidden

    def denoise(
        self, canvas_BL: Tensor, cache: KVCache, soft_BLD: Tensor | None = None, rows: list[int] | None = None
    ) -> Tensor:
        """One pass over the canvases; returns the normed hidden states [B, L, D] and leaves the cache as it is.

        `soft_BLD` is the soft embedding of the step before: None on a first step, zeros for rows that begin."""
        rows = list(range(cache.batch)) if rows is None else rows
        embedded = self.self_conditioning.condition(self._embed(canvas_BL), soft_BLD)
        return self._stack(embedded, cache, rows, [canvas_BL.shape[1]] * len(rows), is_encode=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V], softcapped."""
        cap = self.config.softcap
        return torch.tanh(nn.functional.linear(hidden, self.embed_tokens.weight).float() / cap) * cap

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        return self.embed_tokens(tokens_BT) * self.embed_scale

    def _stack(self, x_BTD: Tensor, cache: KVCache, rows: list[int], counts: list[int], is_encode: bool) -> Tensor:
        run = _Pass(self.config, cache, rows, counts, x_BTD, is_encode)
        for block in self.layers:
            x_BTD = block(x_BTD, run)
        return self.norm(x_BTD)

    @torch.no_grad()
    def init_(self, seed: int = 0, std: float = 0.02) -> Model:
        """Random weights for tests, benchmarks and training from scratch: normal(0, std), norms and scales one."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0)
        return self
