"""Token merging (ToMe, Bolya et al., ICLR 2023, arXiv:2210.09461) on the unmodified DINOv2 of transformers.

Written from the paper: after each block's attention the r pairs of tokens with the most alike keys become one, by
bipartite matching (every second token looks for its best partner among the others); states are averaged by how many
patches they stand for, and attention counts those (the logarithm of the size is added to the scores).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ToMe", "merged_counts", "r_for"]


class ToMe(nn.Module):
    """The model with r tokens merged in each block; the class token never is.

    Args:
        model: a Dinov2Model, used with its own modules.
        r: pairs merged a block; at most half of the tokens there.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, D] normalised states, the class token first, and [B, K] how many tokens each stands for."""
        x = self.model.embeddings(pixel_values)
        sizes = torch.ones(x.shape[:2], dtype=x.dtype)
        for layer in self.model.encoder.layer:
            attended, key = _attend(layer.attention, layer.norm1(x), sizes)
            x = x + layer.layer_scale1(attended)
            x, sizes = _merged(x, sizes, key, self.r)
            x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
        return self.model.layernorm(x), sizes


def _attend(attention: Any, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's output, and the keys averaged over heads."""
    batch, length, _ = x.shape
    query, key, value = (
        project(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = sizes.log()[:, None, None, :]
    out = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=attention.scaling)
    return attention.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), key.mean(dim=1)


def _merged(x: Tensor, sizes: Tensor, key: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``x`` and ``sizes`` with r tokens fewer."""
    length = x.shape[1]
    r = min(r, (length - 1) // 2)
    if r <= 0:
        return x, sizes
    key = key / key.norm(dim=-1, keepdim=True)
    likeness = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    likeness[:, 0] = -torch.inf  # the class token
    best, partner = likeness.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    going, staying = order[:, :r], order[:, r:].sort(dim=-1).values  # the class token stays first
    into = partner.gather(1, going)
    weighted = x * sizes[..., None]
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    wide = (-1, -1, x.shape[-1])
    odd = odd.scatter_add(1, into[..., None].expand(wide), even.gather(1, going[..., None].expand(wide)))
    odd_sizes = sizes[:, 1::2].scatter_add(1, into, sizes[:, ::2].gather(1, going))
    states = torch.cat([even.gather(1, staying[..., None].expand(wide)), odd], dim=1)
    counts = torch.cat([sizes[:, ::2].gather(1, staying), odd_sizes], dim=1)
    return states / counts[..., None], counts


def merged_counts(tokens: int, blocks: int, r: int) -> list[tuple[int, int]]:
    """Tokens in the attention of each block, and behind its merging."""
    counts = []
    for _ in range(blocks):
        left = tokens - min(r, (tokens - 1) // 2)
        counts.append((tokens, left))
        tokens = left
    return counts


def r_for(flops: Callable[[list[tuple[int, int]]], float], tokens: int, blocks: int, wanted: float) -> int:
    """The r that brings ``flops`` of the counts nearest to ``wanted``."""
    return min(range(tokens // 2), key=lambda r: abs(flops(merged_counts(tokens, blocks, r)) - wanted))
