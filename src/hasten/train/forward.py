"""The forward pass that is trained: a transformers Llama's own weights, in little more than half the time on CPU.

Activations stay in one dtype, projections of the same input are one product, the gain of a norm is folded into the
product that follows, and grouped heads share their keys without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class _Normalise(torch.autograd.Function):
    """x over its root mean square, [..., width]; the backward pass keeps the result and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + epsilon).to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        y, inverse = ctx.saved_tensors
        # d(x / rms): what is along y does not count.
        along = torch.linalg.vecdot(g, y).unsqueeze(-1) / y.shape[-1]
        return torch.addcmul(g, y, along, value=-1) * inverse, None


def hidden_states(
    model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, positions: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The last layer's normalised output [rows, length, width] in `dtype`; arguments as of `layer_outputs`."""
    for x in layer_outputs(model, ids, mask, positions, dtype):
        last = x
    return normalised(model, last)


def normalised(model: LlamaForCausalLM, x: Tensor) -> Tensor:
    """The model's final norm of a layer's output, in its dtype."""
    normal: Tensor = _Normalise.apply(x, model.config.rms_norm_eps)  # type: ignore[no-untyped-call]
    scaled: Tensor = normal * model.model.norm.weight.to(x.dtype)
    return scaled


def layer_outputs(
    model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, positions: Tensor | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """What each layer gives to the next, [rows, length, width] in `dtype`.

    Args:
        model: its weights, float32.
        ids: [rows, length].
        mask: additive [rows or 1, length, length] in `dtype`; None lets every row see every other.
        positions: [rows or 1, length]; None counts from 0.
        dtype: of weights and activations in the products.
    """
    x, angles = embedded(model, ids, positions, dtype)
    for layer in model.model.layers:
        x = layer_output(model, layer, x, mask, angles)
        yield x


def embedded(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the first layer reads [rows, length, width], and (cos, sin) of its positions; as of `layer_outputs`."""
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    x = F.embedding(ids, model.model.embed_tokens.weight).to(dtype)
    return x, turned(model, positions, dtype)


def turned(model: LlamaForCausalLM, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of some positions [rows or 1, length], each [rows or 1, length, 1, head size] in `dtype`."""
    cos, sin = model.model.rotary_emb(model.model.norm.weight, positions)
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def layer_output(
    model: LlamaForCausalLM,
    layer: LlamaDecoderLayer,
    x: Tensor,
    mask: Tensor | None,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    """What one layer makes of x [rows, length, width]; mask and dtype as of `layer_outputs`.

    Args:
        angles: (cos, sin) of the positions, each [rows or 1, length, 1, head size].
    """
    config, own, dtype = model.config, layer.self_attn, x.dtype
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, own.head_dim
    assert kv_heads is not None
    rows, length = x.shape[:2]
    cos, sin = angles
    qkv = _project(x, layer.input_layernorm, dtype, own.q_proj, own.k_proj, own.v_proj)
    qk, v = torch.split(qkv.view(rows, length, -1, size), [heads + kv_heads, kv_heads], 2)
    one, other = qk.chunk(2, -1)
    qk = qk * cos + torch.cat([-other, one], -1) * sin
    q, k = torch.split(qk.transpose(1, 2), [heads, kv_heads], 1)
    q = (q * size**-0.5).reshape(rows, kv_heads, -1, size)
    scores = (q @ k.transpose(2, 3)).view(rows, kv_heads, -1, length, length)
    if mask is not None:
        scores = scores + mask[:, None, None]
    weights = torch.softmax(scores, -1).view(rows, kv_heads, -1, length)
    mixed = (weights @ v.transpose(1, 2)).view(rows, heads, length, size).transpose(1, 2)
    x = x + F.linear(mixed.reshape(rows, length, -1), own.o_proj.weight.to(dtype))
    gate, up = _project(x, layer.post_attention_layernorm, dtype, layer.mlp.gate_proj, layer.mlp.up_proj).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight.to(dtype))


def _project(x: Tensor, norm: LlamaRMSNorm, dtype: torch.dtype, *linears: torch.nn.Linear) -> Tensor:
    """The norm and several projections as one product."""
    weight = torch.cat([linear.weight for linear in linears]) * norm.weight
    return F.linear(_Normalise.apply(x, norm.variance_epsilon), weight.to(dtype))  # type: ignore[no-untyped-call]


def logits(model: LlamaForCausalLM, states: Tensor) -> Tensor:
    """Float32 logits [..., vocabulary] of some of `hidden_states`."""
    return F.linear(states, model.lm_head.weight.to(states.dtype)).float()


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as it is added to scores: 0 where True, otherwise the least number, so that no row is NaN."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
