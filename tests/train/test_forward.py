"""The forward pass of training against transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.train.forward import additive, hidden_states, logits


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.2)
    return model


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_transformers(model: LlamaForCausalLM, masked: bool):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, 12), generator=generator)
    visible = torch.eye(12, dtype=torch.bool) | (torch.rand(3, 12, 12, generator=generator) < 0.5)
    positions = torch.randint(40, (1, 12), generator=generator)
    mask = additive(visible, torch.float32) if masked else None
    everything = torch.zeros(1, 1, 1, 1)

    def theirs() -> torch.Tensor:
        four = everything if mask is None else mask[:, None]
        return model(ids, attention_mask=four, position_ids=positions).logits

    def ours() -> torch.Tensor:
        return logits(model, hidden_states(model, ids, mask, positions, torch.float32))

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    gradients = []
    for forward in (ours, theirs):
        model.zero_grad()
        F.cross_entropy(forward().flatten(0, 1), ids.flatten()).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_positions_count_from_zero(model: LlamaForCausalLM):
    ids = torch.arange(10)[None]
    counted = hidden_states(model, ids, None, torch.arange(10)[None], torch.float32)
    assert torch.equal(hidden_states(model, ids, None, None, torch.float32), counted)


def test_bf16_is_near(model: LlamaForCausalLM):
    ids = torch.arange(20)[None]
    exact, rounded = (hidden_states(model, ids, None, None, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.99
