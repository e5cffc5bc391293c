"""Plain-torch encoders with one foreign operation in them: what a graph may hold beside attention, made to order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo

WIDTH, HEADS, LENGTHS = 24, 3, 40


class Attention(nn.Module):
    def __init__(self, kind: str = "sdpa", causal: bool = False) -> None:
        super().__init__()
        self.kind, self.causal = kind, causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.kind in ("sdpa", "viewed"):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        elif self.kind == "folded":  # heads in the batch
            folded = (x.reshape(b * HEADS, s, -1) for x in (q, k, v))
            seen = None if mask is None else mask.expand(b, HEADS, s, s).reshape(b * HEADS, s, s)
            mixed = F.scaled_dot_product_attention(*folded, seen, 0.0, self.causal).view(b, HEADS, s, -1)
        elif self.kind == "heads first":
            swapped = (x.transpose(0, 1) for x in (q, k, v))
            mixed = F.scaled_dot_product_attention(*swapped).transpose(0, 1)
        elif self.kind == "softmax":
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            mixed = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -1e9), -1) @ v
        elif self.kind == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        elif self.kind == "linear":
            k = k if mask is None else k * mask.transpose(-1, -2)
            mixed = q @ (k.transpose(-1, -2) @ v)
        else:
            raise ValueError(self.kind)
        if self.kind == "viewed":  # which asks for the strides that the kernel of this device gives
            return self.out(mixed.transpose(1, 2).view(b, s, -1))
        return self.out(mixed.transpose(1, 2).reshape(b, s, -1))


class Block(nn.Module):
    """Pre-norm attention, then a feed-forward part, then ``extra`` (any map of [B, S, WIDTH] to itself)."""

    def __init__(self, kind: str, extra: nn.Module | None, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(kind, causal)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.extra = extra

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        x = x + self.feed(self.norm2(x))
        return x if self.extra is None else x + self.extra(x)


class Encoder(nn.Module):
    """``input_ids``, ``attention_mask`` (int64 [B, S]) to hidden states [B, S, WIDTH]; ``extra`` is in block ``at``."""

    def __init__(
        self,
        extra: nn.Module | None = None,
        *,
        at: int = 2,
        layers: int = 4,
        kind: str = "sdpa",
        causal: bool = False,
        top: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTHS, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, extra if i == at else None, causal) for i in range(layers))
        self.top = top

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        return x if self.top is None else self.top(x)


class Apply(nn.Module):
    """A function as a module, so that it has a path."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Convolution(nn.Module):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class SequenceLinear(nn.Module):
    """A learned matrix over the sequence axis, as in MLP-Mixer (for one length, sliced to the one at hand)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LENGTHS, LENGTHS))

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        return self.weight[:s, :s] @ x


def _columns_assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, :12] = x[:, :, 12:]
    y[..., 12:].add_(x[:, :, :12])
    y[y < -1] = 0
    return y


def _checked(x: Tensor) -> Tensor:
    torch._assert_async(x.isfinite().all())
    return x.sin()


#: Operations that mix tokens by where they stand. Below a cut none of them has a right answer.
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": Convolution,
    "depthwise convolution": lambda: Apply(
        lambda x: F.conv1d(x.mT, torch.ones(WIDTH, 1, 3).to(x), padding=1, groups=WIDTH).mT
    ),
    "fourier": lambda: Apply(lambda x: torch.fft.fft(x, dim=1).real),
    "cumulative sum": lambda: Apply(lambda x: x.cumsum(1)),
    "mean": lambda: Apply(lambda x: x - x.mean(1, keepdim=True)),
    "sum": lambda: Apply(lambda x: x.sum(1, keepdim=True).expand_as(x)),
    "maximum": lambda: Apply(lambda x: x - x.amax(1, keepdim=True)),
    "average pooling": lambda: Apply(lambda x: F.avg_pool1d(x.mT, 3, stride=1, padding=1).mT),
    "roll": lambda: Apply(lambda x: x.roll(1, 1)),
    "flip": lambda: Apply(lambda x: x.flip(1)),
    "shift": lambda: Apply(lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]),
    "difference": lambda: Apply(lambda x: F.pad(x.diff(dim=1), (0, 0, 0, 1))),
    "sort": lambda: Apply(lambda x: x.sort(1).values),
    "softmax over tokens": lambda: Apply(lambda x: x.softmax(1)),
    "length normalisation": lambda: Apply(lambda x: F.normalize(x, dim=1)),
    "sequence matrix": SequenceLinear,
    "fourth token to all": lambda: Apply(lambda x: x[:, 3:4].expand_as(x)),
    "every other token": lambda: Apply(lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]]),
    "running product": lambda: Apply(lambda x: x.cumprod(1)),
    "mean of the batch": lambda: Apply(lambda x: x - x.mean(0, keepdim=True)),
    "rows in another order": lambda: Apply(lambda x: x.roll(1, 0)),
    "elements by their value": lambda: Apply(lambda x: x + x[x > 0].sum()),
    "unknown operator": lambda: Apply(lambda x: x.renorm(2, 2, 1.0)),
    "gram matrix": lambda: Apply(lambda x: (x @ x.mT) @ x / 1000),
}


#: Operations on each token alone, some in disguise. None of them stands in the way.
def _highest_in_place(x: Tensor) -> Tensor:
    """As routers norm their choice: what topk gives is changed in place."""
    values, places = x.topk(3, dim=-1)
    values /= values.abs().sum(-1, keepdim=True)
    return torch.zeros_like(x).scatter(-1, places, values)


def _into_empty(x: Tensor) -> Tensor:
    """As latent attention puts its keys together."""
    y = x.new_empty(*x.shape[:-1], WIDTH)
    y[..., :5].copy_(x[..., -5:])
    y[..., 5:].copy_(x[..., :-5])
    return y


TOKENWISE: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: Apply(lambda x: x * torch.sigmoid(x)),
    "batch norm": lambda: Apply(lambda x: F.batch_norm(x.mT, torch.zeros(WIDTH).to(x), torch.ones(WIDTH).to(x)).mT),
    "channel softmax": lambda: Apply(lambda x: x.softmax(-1)),
    "channel mean": lambda: Apply(lambda x: x - x.mean(-1, keepdim=True)),
    "channel roll": lambda: Apply(lambda x: x.roll(1, -1)),
    "flattened rows": lambda: Apply(lambda x: x.flatten(0, 1).tanh().view_as(x)),
    "transposed": lambda: Apply(lambda x: x.transpose(0, 1).tanh().transpose(0, 1)),
    "assigned columns": lambda: Apply(_columns_assigned),
    "highest channels": lambda: Apply(_highest_in_place),
    "joined under another name": lambda: Apply(lambda x: torch.concat([x[..., 3:], x[..., :3]], -1).swapaxes(1, 2).mT),
    "into an empty tensor": lambda: Apply(_into_empty),
    "listed channels": lambda: Apply(lambda x: x[..., list(range(WIDTH))[::-1]]),
    "checked": lambda: Apply(_checked),
    "chunks": lambda: Apply(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)),
    "einsum": lambda: Apply(lambda x: torch.einsum("bsd,ed->bse", x, torch.eye(WIDTH).to(x).flip(0))),
}


def encoder(extra: Callable[[], nn.Module] | None = None, **options: object) -> Encoder:
    """A seeded float64 `Encoder`."""
    torch.manual_seed(0)
    model = Encoder(extra() if extra else None, **options).double().eval()  # type: ignore[arg-type]  # checked at the call
    zoo.randomize(model)
    return model
