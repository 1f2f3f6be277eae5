"""The whole network: one stack of Gemma 4 blocks that runs in two ways.

`encode` is causal and writes the cache; `denoise` is bidirectional inside the canvas and only reads it. Both walk the
same modules; what differs is the mask, who owns the new keys, the layer scalar, and the self-conditioning at denoise's
entrance. The module tree carries the released checkpoint's tensor names, so that `checkpoints` needs one short table.
The model knows its config, masks, cache and operations, and nothing of sampling, quantisation or training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.model.cache import KVCache
from sfumato.model.config import LayerConfig, ModelConfig
from sfumato.model.passes import Pass, ReadPass
from sfumato.ops.contract import After, BlockPass, BlockResult, JoinNorms, Layer, Matrix, Ops
from sfumato.ops.lowrank import LanePair, LaneSwitch


class Norm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """[.., size], as x is."""
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
        """[.., D], as x is."""
        return self.ops.feed_forward(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class SelfConditioning(Gated):
    """Adds the soft embedding, what the model predicted a step ago, to the canvas's embedding. Denoise only."""

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
    """Grouped-query attention with normed queries, keys and values, scale 1.

    Full layers have no v_proj: V is the key projection through its own unscaled norm, without rope."""

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

    def forward(self, x_BTD: Tensor, run: Pass, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D], and the keys and values of the new positions, [B, T, G, K]."""
        ops, (mask, cos_BTK, sin_BTK) = self.ops, run.of(index)
        heads = (*x_BTD.shape[:-1], -1, self.head)
        weights = [layer.weight for layer in (self.q_proj, self.k_proj, self.v_proj) if layer is not None]
        q_BTHK, raw_BTGK, *v = (y.view(heads) for y in ops.linear(x_BTD, *weights))
        q_BTHK = ops.norm_rope(q_BTHK, self.q_norm.weight, self.eps, cos_BTK, sin_BTK)
        k_BTGK = ops.norm_rope(raw_BTGK, self.k_norm.weight, self.eps, cos_BTK, sin_BTK)
        v_BTGK = ops.rms_norm(v[0] if v else raw_BTGK, None, self.eps)
        mixed_BTHK = ops.attention(q_BTHK, k_BTGK, v_BTGK, *run.cache.ring_of(index), mask)
        return ops.linear(mixed_BTHK.reshape(*x_BTD.shape[:-1], -1), self.o_proj.weight)[0], k_BTGK, v_BTGK


class Router(nn.Module):
    """Which experts, and how much of each.

    Reads the residual before any norm, as in transformers' `modeling_diffusion_gemma.py`: with the normed input of the
    experts a canvas never converges."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))
        self.top_k, self.eps, self.ops = config.top_k_experts, config.eps, ops

    def forward(self, residual_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [N, J] of experts, and their weights."""
        return self.ops.route(residual_ND, self.scale, self.proj.weight, self.per_expert_scale, self.top_k, self.eps)


class Experts(nn.Module):
    """All experts of a layer in two tensors; gate and up are one matrix, gate first."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        count, inner, width = config.num_experts, config.expert_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.ops = ops

    def forward(self, x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor) -> Tensor:
        """[N, D]: the weighted sum of each token's experts."""
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
        self.index, self.eps, self.ops = index, config.eps, ops

    def forward(self, x_BTD: Tensor, run: Pass, next_input: Any = None, after: After | None = None) -> BlockResult:
        """Hidden states [B, T, D] behind this block, and what the pass and the block behind it need.

        `next_input` is what the block before gave; None where operations run one by one."""
        run.enter()
        if self.ops.block is not None:
            return self._whole(x_BTD, run, next_input, after)
        mixed_BTD, k_BTGK, v_BTGK = self.self_attn(self.input_layernorm(x_BTD), run, self.index)
        x_BTD = self.ops.norm_add(x_BTD, mixed_BTD, self.post_attention_layernorm.weight, self.eps)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        joined_ND = self.ops.join(
            x_ND,
            self.mlp(self.pre_feedforward_layernorm(x_ND)),
            self.experts(self.pre_feedforward_layernorm_2(x_ND), *self.router(x_ND)),
            JoinNorms(
                self.post_feedforward_layernorm_1.weight,
                self.post_feedforward_layernorm_2.weight,
                self.post_feedforward_layernorm.weight,
            ),
            self.eps,
            run.scale(self.index, self.encode_scalar, self.denoise_scalar),
        )
        return BlockResult(joined_ND.view_as(x_BTD), k_BTGK, v_BTGK, None)

    def before(self) -> After:
        """What the block before this one must know to prepare its input."""
        own: Any = self._modules
        products = [_weight(layer) for layer in map(own["self_attn"]._modules.get, _MIXER[:3]) if layer is not None]
        return After(_weight(own["input_layernorm"]), tuple(products))

    def _whole(self, x_BTD: Tensor, run: Pass, next_input: Any, after: After | None) -> BlockResult:
        """`forward` in one call of an implementation that has it."""
        assert self.ops.block is not None
        mask, cos_BTK, sin_BTK = run.of(self.index)
        scale_N1 = run.scale(self.index, self.encode_scalar, self.denoise_scalar)
        block_pass = BlockPass(cos_BTK, sin_BTK, *run.cache.ring_of(self.index), mask, scale_N1)
        return self.ops.block(x_BTD, self._layer(), block_pass, next_input, after)

    def _layer(self) -> Layer:
        """The weights as they are now: they may have been replaced since the last pass.

        Every step asks this of every block, and looking each up as an attribute of a module would take as long as a
        norm does."""
        own: Any = self._modules
        mixer, dense, router, experts = (own[name] for name in ("self_attn", "mlp", "router", "experts"))
        q, k, v, o, q_norm, k_norm = map(mixer._modules.get, _MIXER)
        gate, up, down = map(dense._modules.get, _DENSE)
        return Layer(
            _weight(own["input_layernorm"]),
            _weight(q),
            _weight(k),
            None if v is None else _weight(v),
            _weight(o),
            _weight(q_norm),
            _weight(k_norm),
            _weight(own["post_attention_layernorm"]),
            _weight(own["pre_feedforward_layernorm"]),
            _weight(gate),
            _weight(up),
            _weight(down),
            _weight(own["post_feedforward_layernorm_1"]),
            _weight(router, "scale"),
            _weight(router._modules["proj"]),
            _weight(router, "per_expert_scale"),
            _weight(own["pre_feedforward_layernorm_2"]),
            _weight(experts, "gate_up_proj"),
            _weight(experts, "down_proj"),
            _weight(own["post_feedforward_layernorm_2"]),
            _weight(own["post_feedforward_layernorm"]),
            router.top_k,
            self.eps,
        )


_MIXER = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_DENSE = ("gate_proj", "up_proj", "down_proj")


def _weight(module: Any, name: str = "weight") -> Any:
    """`getattr`, in a fifth of the time where it is a parameter."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter


_BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)


def products(part: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every weight of a matrix product that operations may want in a form of their own, as its module and its name.

    Router and embedding are none of them. Modules that stand in the place of ours (`model.trainable`) have the same
    attributes, and are known by those."""
    for module in part.modules():
        if hasattr(module, "gate_up_proj"):
            yield from ((module, name) for name in ("gate_up_proj", "down_proj"))
        elif isinstance(module, (Attention, Gated)):
            yield from ((child, "weight") for child in module.children() if not isinstance(child, Norm))


def adaptable(part: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every weight that may have low-rank factors beside it: `products`, and routers."""
    yield from products(part)
    yield from ((module.proj, "weight") for module in part.modules() if isinstance(module, Router))


def weights_of(model: Model) -> Iterator[Tensor]:
    """Every tensor that a pass reads, whatever form its weight has."""
    yield from model.parameters()
    yield from model.buffers()
    for owner, name in adaptable(model):
        weight = getattr(owner, name)
        if not isinstance(weight, Tensor):
            yield from weight.tensors
    yield model.embed_scale


def replace_(owner: nn.Module, name: str, weight: Matrix) -> None:
    """Put a weight of any form where a parameter, or another form, stands."""
    owner._parameters.pop(name, None)
    setattr(owner, name, weight)


def pack_(part: nn.Module, ops: Ops) -> None:
    """`Model.pack_` for a part of a model."""
    for owner, name in products(part):
        weight = getattr(owner, name)
        plain = weight.data if isinstance(weight, nn.Parameter) else weight
        packed = ops.pack(plain)
        if packed is not plain:
            replace_(owner, name, packed)
    for name, module in part.named_modules():
        if (isinstance(module, nn.Embedding) or name == "lm_head") and ops.place_embedding_ is not None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            ops.place_embedding_(weight.data)


class Model(nn.Module):
    """DiffusionGemma's text model, or Gemma 4's: that without self-conditioning, for encode alone.

    Weights start uninitialised except norms and scalars: load them or call `init_`."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, ops) for index in range(len(config.layers)))
        self.norm = Norm(config.hidden_size, config.eps, ops)
        self.self_conditioning = SelfConditioning(config, ops) if config.is_diffusion else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.has_head else None
        self._embed_scale: Tensor | None = None
        self.lane_switch = LaneSwitch()
        """Tells weights with adapters beside them which one each token has (`adapters`)."""
        self.usual_lanes = LanePair()
        """Those of rows that ask for no adapter: of a model that is trained with one beside it, that one's."""

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so all that is not streamed."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of plain weights and of hidden states."""
        return self.embed_tokens.weight.dtype

    @property
    def embed_scale(self) -> Tensor:
        """The root of D, rounded to the weights' dtype as the reference does.

        It is made once: a step that is recorded as a graph may not bring numbers from the host."""
        kept = self._embed_scale
        if kept is None or (kept.dtype, kept.device) != (self.dtype, self.device):
            with torch.inference_mode(False):  # training reads it too
                kept = torch.full((), math.sqrt(self.config.hidden_size), dtype=self.dtype, device=self.device)
            self._embed_scale = kept
        return kept

    @property
    def head_VD(self) -> Tensor:
        """What logits are read out with: the embedding, unless the model has another matrix for it."""
        weight: Tensor = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight

    def use_(self, ops: Ops) -> Model:
        """Run with these operations from now on; before `pack_`, which is theirs."""
        for module in self.modules():
            if "ops" in vars(module):
                vars(module)["ops"] = ops
        return self

    def pack_(self) -> Model:
        """Bring every weight of a matrix product, plain or in fewer bits, into the form that the operations take.

        A no-op where they take weights as they are. A packed model runs; it cannot be saved or trained."""
        pack_(self, self.ops)
        return self

    def encode(
        self, tokens_BT: Tensor, cache: KVCache, rows: list[int] | None = None, counts: list[int] | None = None
    ) -> Tensor:
        """Append tokens to the cache; returns the normed hidden states [B, T, D].

        `rows` are the cache rows that tokens_BT's rows belong to (all, in order); `counts` how many of the T tokens of
        each are real (all), the rest being padding on the right. CapacityError when the cache is full."""
        rows = list(range(cache.batch)) if rows is None else rows
        counts = [tokens_BT.shape[1]] * len(rows) if counts is None else counts
        cache.check_room(rows, counts)
        run = Pass(self, cache, rows, counts, tokens_BT.shape[1], 0)
        hidden_BTD = self._stack(self._embed(tokens_BT), run)
        cache.advance(rows, counts)
        return hidden_BTD

    def denoise(
        self,
        canvas_BL: Tensor,
        cache: KVCache,
        soft_BLD: Tensor | None = None,
        rows: list[int] | None = None,
        run: Pass | None = None,
    ) -> Tensor:
        """One pass over the canvases; returns the normed hidden states [B, L, D] and leaves the cache as it is.

        `soft_BLD` is the soft embedding of the step before: None on a first step, zeros for rows that begin. `run` is
        a `Pass` made for these rows at these lengths, where a caller keeps one. InputError for a model without a
        canvas."""
        if run is None:
            rows = list(range(cache.batch)) if rows is None else rows
            run = Pass(self, cache, rows, [0] * len(rows), 0, canvas_BL.shape[1])
        return self._stack(self._condition(canvas_BL, soft_BLD, run), run)

    def encode_and_denoise(
        self,
        tokens_BT: Tensor,
        counts: list[int],
        canvas_BL: Tensor,
        cache: KVCache,
        rows: list[int] | None = None,
        run: Pass | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both in one pass: append tokens, and take the first step of the canvas behind them, which sees them.

        Layer by layer their keys are there when the canvas reads. The weights are read once instead of twice. Returns
        the hidden states of both, [B, T, D] and [B, L, D]: those of `encode` and then `denoise` without a soft
        embedding. A caller with a `run` of its own checks the cache's room before and advances it after."""
        width, own_run = tokens_BT.shape[1], run
        if run is None:
            rows = list(range(cache.batch)) if rows is None else rows
            cache.check_room(rows, counts)
            run = Pass(self, cache, rows, counts, width, canvas_BL.shape[1])
        embedded_BLD = self._condition(canvas_BL, None, run)
        hidden_BTD = self._stack(torch.cat([self._embed(tokens_BT), embedded_BLD], dim=1), run)
        if own_run is None:
            cache.advance(run.rows, counts)
        return hidden_BTD[:, :width], hidden_BTD[:, width:]

    def read(
        self,
        tokens_BT: Tensor | None,
        counts: list[int],
        canvas_BL: Tensor,
        cache: KVCache,
        rows: list[int],
        soft_BLD: Tensor | None = None,
    ) -> Tensor:
        """One pass over canvases and the tokens before them, of which the cache keeps nothing.

        `rows` are the cache rows that they stand behind, repeats allowed: none sees another. `tokens_BT` None: no
        tokens; of each, `counts` are real. Returns the canvases' normed hidden states [B, L, D]."""
        width = 0 if tokens_BT is None else tokens_BT.shape[1]
        run = ReadPass(self, cache, rows, counts, width, canvas_BL.shape[1])
        x_BTD = self._condition(canvas_BL, soft_BLD, run)
        if tokens_BT is not None:
            x_BTD = torch.cat([self._embed(tokens_BT), x_BTD], dim=1)
        return self._stack(x_BTD, run)[:, width:]

    def logits_of(self, hidden: Tensor, words_W: Tensor) -> Tensor:
        """float32 logits [..., W] of these words alone, softcapped."""
        cap = self.config.softcap
        return torch.tanh(nn.functional.linear(hidden, self.head_VD[words_W]).float() / cap) * cap

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V], softcapped."""
        cap = self.config.softcap
        return torch.tanh(nn.functional.linear(hidden, self.head_VD).float() / cap) * cap

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD: Tensor = self.embed_tokens(tokens_BT)
        return embedded_BTD * self.embed_scale

    def _condition(self, canvas_BL: Tensor, soft_BLD: Tensor | None, run: Pass) -> Tensor:
        self.config.check_canvas("denoise")
        assert self.self_conditioning is not None
        run.enter(is_canvas_alone=True)
        return self.self_conditioning.condition(self._embed(canvas_BL), soft_BLD)

    def _stack(self, x_BTD: Tensor, run: Pass) -> Tensor:
        next_input = None
        blocks: list[Any] = list(self.layers)
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            after = After(self.norm.weight, ()) if following is None else following.before()
            # A block with a hook may not have its weights yet (offload.py).
            is_ready = following is None or not following._forward_pre_hooks
            x_BTD, k_BTGK, v_BTGK, next_input = block(x_BTD, run, next_input, after if is_ready else None)
            # Only now: in a ring they replace keys that attention still reads. Not within the block, whose outputs
            # these are, for whoever wraps it: gradients flow through the cache.
            if k_BTGK is not None and v_BTGK is not None:
                run.append(block.index, k_BTGK, v_BTGK)
        if next_input is not None:
            final_BTD: Tensor = next_input
            return final_BTD
        last_BTD: Tensor = self.norm(x_BTD)
        return last_BTD

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
