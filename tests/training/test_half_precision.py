"""Models whose graphs note dtypes beside casts, under autocast, where values have others."""

from __future__ import annotations

import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

import prunepass
from prunepass import PrunePlan, Stage


def test_a_pruned_gemma_runs_under_autocast() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        use_cache=False,
        pad_token_id=0,
    )
    model = Gemma3TextModel(config).eval()
    x = {"input_ids": torch.randint(1, 99, (2, 14)), "attention_mask": torch.ones(2, 14, dtype=torch.int64)}
    pruned = prunepass.prune(model, PrunePlan([Stage(1, 0.6)], "norm"), x)
    exact = pruned(**x).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        half = pruned(**x).last_hidden_state
    similarity = torch.cosine_similarity(exact, half.float(), dim=-1)
    assert float(similarity.detach().median()) > 0.99
    half.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.layers[0].parameters())
