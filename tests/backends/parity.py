"""One table of (operator, dtype, edge): what our passes insert and what the zoo's models bring, by kind of input.

Each case is a function of the columns of `Inputs`; its value in eager PyTorch is what every target has to give. Many
cases make one graph, so that a target is asked once for each group and then for each size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: rows and tokens: around the numbers of 8 bits, and a long row
SIZES = ((2, 255), (1, 256), (3, 257), (2, 2048))
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Inputs:
    """Columns of [B, N], drawn by a seed; all with many equal values but for ``numbers``."""

    flags: Tensor
    bytes_: Tensor
    small: Tensor
    words: Tensor
    half: Tensor
    ids: Tensor
    large: Tensor
    numbers: Tensor
    scores: Tensor

    @classmethod
    def draw(cls, rows: int, length: int) -> Inputs:
        """Of any size. ``scores`` are eighths with infinities among them, and a row of minus infinity alone."""
        made = torch.Generator().manual_seed(1000 * rows + length)

        def whole(low: int, high: int, dtype: torch.dtype) -> Tensor:
            return torch.randint(low, high, (rows, length), generator=made, dtype=dtype)

        scores = whole(-40, 40, torch.int64) / 8
        scores[whole(0, 9, torch.int64) == 0] = -math.inf
        scores[0] = -math.inf
        return cls(
            flags=torch.rand(rows, length, generator=made) < 0.9,
            bytes_=whole(0, 256, torch.uint8),
            small=whole(-128, 128, torch.int8),
            words=whole(-300, 300, torch.int16),
            half=whole(-50, 50, torch.int32),
            ids=whole(-50, 50, torch.int64),
            large=whole(-(2**30), 2**30, torch.int64),
            numbers=torch.randn(rows, length, generator=made),
            scores=scores,
        )

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Group:
    """Cases of one graph.

    Attributes:
        cases: by name.
        unknown: cases that a target refuses, by target: a graph of the others is compared.
    """

    cases: dict[str, Callable[[Inputs], Tensor]]
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def module(self, target: str) -> Cases:
        left = self.unknown.get(target, ())
        return Cases({name: case for name, case in self.cases.items() if name not in left})


class Cases(nn.Module):
    """Columns in, the value of each case out. All columns are read, so that none is left out of the graph."""

    def __init__(self, cases: dict[str, Callable[[Inputs], Tensor]]) -> None:
        super().__init__()
        self.cases = cases

    def forward(
        self,
        flags: Tensor,
        bytes_: Tensor,
        small: Tensor,
        words: Tensor,
        half: Tensor,
        ids: Tensor,
        large: Tensor,
        numbers: Tensor,
        scores: Tensor,
    ) -> tuple[Tensor, ...]:
        x = Inputs(flags, bytes_, small, words, half, ids, large, numbers, scores)
        return (*(case(x) for case in self.cases.values()), *(column[:, :1] for column in x.columns()))


COUNTING = Group(
    {
        "cumsum bool": lambda x: x.flags.cumsum(1),
        "cumsum uint8": lambda x: x.bytes_.cumsum(1),
        "cumsum int8": lambda x: x.small.cumsum(1),
        "cumsum int16": lambda x: x.words.cumsum(1),
        "cumsum int32": lambda x: x.half.cumsum(1),
        "cumsum int64": lambda x: x.ids.cumsum(1),
        "cumsum of a comparison": lambda x: (x.ids != 0).cumsum(1) - 1,
        "cumsum as int32": lambda x: x.flags.cumsum(1, dtype=torch.int32),
        "cumsum as float32": lambda x: x.flags.cumsum(1, dtype=torch.float32),
        "cumsum from the end": lambda x: x.flags.flip(1).cumsum(1).flip(1),
        "cumsum over rows": lambda x: x.flags.cumsum(0),
        "positions of RoBERTa": lambda x: x.flags.int().cumsum(1).type_as(x.flags.int()) * x.flags.int() + 1,
        "positions of OPT": lambda x: (x.flags.long().cumsum(1) * x.flags.long()).long() - 1,
        "sum bool": lambda x: x.flags.sum(1),
        "sum uint8": lambda x: x.bytes_.sum(1),
        "sum int8": lambda x: x.small.sum(1, keepdim=True),
        "sum int16": lambda x: x.words.sum(1),
        "sum int32": lambda x: x.half.sum(1),
        "sum of all": lambda x: x.flags.sum(),
        "sum as float32": lambda x: x.flags.sum(1, dtype=torch.float32),
        "count_nonzero": lambda x: x.ids.count_nonzero(1),
        "prod bool": lambda x: x.flags.prod(1),
        "prod uint8": lambda x: (x.bytes_[:, :3] % 16).prod(1),
        "any": lambda x: x.flags.any(1),
        "all": lambda x: x.flags.all(1),
        "any of numbers": lambda x: x.ids.any(1),
        "mean of flags": lambda x: x.flags.float().mean(1),
        "argmin of flags": lambda x: x.flags.long().argmin(1, keepdim=True),
        "argmax of flags": lambda x: x.flags.int().argmax(1),
    },
)

ARITHMETIC = Group(
    {
        "add bool": lambda x: x.flags + x.flags,
        "add bool and int": lambda x: x.flags + 1,
        "mul bool and int64": lambda x: x.flags * x.ids,
        "1 - mask": lambda x: 1.0 - x.flags.float(),
        "add uint8": lambda x: x.bytes_ + x.bytes_,
        "sub uint8": lambda x: x.bytes_ - 200,
        "rsub uint8": lambda x: 1 - x.bytes_,
        "mul int8": lambda x: x.small * x.small,
        "neg int8": lambda x: -x.small,
        "abs int8": lambda x: x.small.abs(),
        "mul int16": lambda x: x.words * x.words,
        "uint8 and int8": lambda x: x.bytes_ + x.small,
        "diff": lambda x: x.bytes_.diff(dim=1),
        "floor": lambda x: x.ids // 3,
        "floor by a negative": lambda x: x.ids // -3,
        "floor int32": lambda x: x.half // 7,
        "floor int8": lambda x: x.small // 7,
        "floor uint8": lambda x: x.bytes_ // 7,
        "floor by a tensor": lambda x: x.ids // (x.half.abs() + 1),
        "floor by a negative tensor": lambda x: x.ids // (-1 - x.half.abs()),
        "floor of large": lambda x: x.large // 3,
        "floor of large by large": lambda x: x.large // (x.large.flip(1).abs() // 1000 + 1),
        "floor of large by negatives": lambda x: x.large // -7,
        "share of a count": lambda x: (x.flags.sum(1, keepdim=True) * 9999 + 9999) // 10000,
        "share of large counts": lambda x: ((x.flags.sum(1) + 6144) * 4097 + 8191) // 8192,
        "trunc": lambda x: torch.div(x.ids, 5, rounding_mode="trunc"),
        "trunc int8": lambda x: torch.div(x.small, 5, rounding_mode="trunc"),
        "trunc of large": lambda x: torch.div(x.large, -7, rounding_mode="trunc"),
        "true division": lambda x: x.ids / 5,
        "remainder": lambda x: x.ids % 5,
        "remainder by a negative": lambda x: x.ids % -5,
        "remainder int8": lambda x: x.small % 5,
        "remainder of large": lambda x: x.large % 2039,
        "remainder of large by a negative": lambda x: x.large % -2039,
        "fmod": lambda x: torch.fmod(x.ids, 5),
        "fmod of large": lambda x: torch.fmod(x.large, 2039),
        "remainder of floats": lambda x: x.ids.float() % 5,
        "halves of the length": lambda x: x.ids[:, : -(-x.ids.shape[1] // 2)],
        "length over a negative": lambda x: x.ids.new_full((1,), -x.ids.shape[1] // 4),
        "length modulo": lambda x: x.ids.new_full((1,), (-x.ids.shape[1]) % 5),
        "share of the length": lambda x: x.ids.new_full((1,), (x.ids.shape[1] * 9999 + 9999) // 10000),
        "equal large": lambda x: (x.large - 1) == (x.large - x.flags.long()),
        "ordered large": lambda x: (x.large - 1) < (x.large - x.flags.long()),
        "at least, large": lambda x: x.large + x.flags >= x.large + 1,
        "equal to a large constant": lambda x: (x.large % 3 + 2**29) == 2**29 + 1,
        "invert": lambda x: ~x.flags,
        "invert int64": lambda x: ~x.ids,
        "xor": lambda x: x.flags ^ (x.ids > 0),
        "or": lambda x: x.flags | (x.ids > 0),
        "bits": lambda x: x.ids & 3,
        "to int8": lambda x: x.large.to(torch.int8),
        "to uint8": lambda x: x.large.to(torch.uint8),
        "to bool": lambda x: (x.ids.float() * 0.25).bool(),
        "to int64": lambda x: (x.ids.float() * 0.25).long(),
        "sign": lambda x: x.ids.sign(),
        "clamp": lambda x: x.bytes_.clamp(min=3, max=100),
        "maximum": lambda x: torch.maximum(x.small, x.bytes_),
        "maximum bool": lambda x: torch.maximum(x.flags, x.ids > 0),
        "where": lambda x: torch.where(x.flags, x.small, x.bytes_),
        "where with a float": lambda x: torch.where(x.flags, x.ids, 0.5),
    },
    unknown={"onnxruntime": ("add bool", "maximum", "where")},
)

CHOICE = Group(
    {
        "argmax": lambda x: x.ids.argmax(1),
        "argmin": lambda x: x.ids.argmin(1),
        "max": lambda x: x.ids.max(1).indices,
        "argmax of floats": lambda x: x.scores[-1:].argmax(1),
        "sort": lambda x: x.ids.sort(stable=True, dim=1).indices,
        "sort, descending": lambda x: x.ids.sort(stable=True, dim=1, descending=True).indices,
        "argsort of flags": lambda x: torch.argsort(x.flags.int(), dim=1, stable=True),
        "argsort of flags, descending": lambda x: torch.argsort(x.flags.int(), dim=1, stable=True, descending=True),
        "sort of large": lambda x: x.large.sort(1).values,
        "topk": lambda x: x.numbers.topk(x.numbers.shape[1] // 2, dim=1).values,
        "topk, places": lambda x: x.numbers.topk(x.numbers.shape[1] // 2, dim=1).indices,
        "topk, smallest": lambda x: x.numbers.topk(3, dim=1, largest=False).values,
        "topk of equal ones": lambda x: x.ids.topk(x.ids.shape[1] // 3, dim=1).values,
        "topk of infinities": lambda x: x.scores.topk(x.scores.shape[1] // 2, dim=1).values,
        "topk of none": lambda x: x.numbers.topk(0, dim=1).values,
        "topk of perhaps none": lambda x: x.numbers.topk(x.numbers.shape[1] // 300, dim=1).values,
        "topk of perhaps none, places": lambda x: x.numbers.topk(x.numbers.shape[1] // 300, dim=1).indices,
        "gather": lambda x: x.numbers.gather(1, x.ids.abs() % x.ids.shape[1]),
        "index_select": lambda x: x.numbers.index_select(1, x.half[0].abs() % x.ids.shape[1]),
        "amax of infinities": lambda x: x.scores.amax(1),
        "amin of infinities": lambda x: (-x.scores).amin(1, keepdim=True),
        "max of infinities": lambda x: x.scores.max(1).values,
        "amax of all": lambda x: x.scores.amax(),
        "amax bool": lambda x: x.flags.amax(1),
        "softmax over hidden rows": lambda x: x.scores.softmax(1),
        "softmax of lowest": lambda x: torch.where(x.scores > 4, x.scores, LOWEST).softmax(1),
        "one_hot": lambda x: F.one_hot(x.ids.abs() % 7, 7),
        "masked_fill": lambda x: x.numbers.masked_fill(~x.flags, -math.inf),
        "tril": lambda x: torch.ones(5, 5, dtype=torch.bool).tril() & x.flags[:, :1, None],
        "nan first": lambda x: torch.where(x.flags, x.numbers, math.nan).isnan(),
    },
    unknown={"onnxruntime": ("gather", "index_select", "amax of all")},
)

FLOATS = Group(
    {
        "ceil": lambda x: (x.numbers * 3).ceil(),
        "round half to even": lambda x: (x.ids / 2).round(),
        "floor division": lambda x: torch.div(x.numbers, 0.3, rounding_mode="floor"),
        "trunc": lambda x: torch.div(x.numbers, 0.3, rounding_mode="trunc"),
        "log1p": lambda x: x.numbers.abs().log1p(),
        "log of zero": lambda x: (x.ids == 0).float().log(),
        "reciprocal": lambda x: (x.numbers.abs() + 1).reciprocal(),
        "rsqrt": lambda x: (x.numbers.abs() + 0.1).rsqrt(),
        "power of 2": lambda x: x.numbers.pow(2),
        "power of a half": lambda x: x.numbers.abs().pow(0.5),
        "2 to a power": lambda x: torch.pow(2, x.numbers),
        "power of tensors": lambda x: (x.numbers.abs() + 1).pow(x.half.abs() % 4),
        "sign": lambda x: x.numbers.sign(),
        "erf": lambda x: x.numbers.erf(),
        "gelu": lambda x: F.gelu(x.numbers),
        "gelu by tanh": lambda x: F.gelu(x.numbers, approximate="tanh"),
        "silu": lambda x: F.silu(x.numbers),
        "sine and cosine": lambda x: x.half.sin() + x.half.float().cos(),
        "layer norm": lambda x: F.layer_norm(x.numbers[:, :8], (8,)),
        "rms norm": lambda x: F.rms_norm(x.numbers[:, :8], (8,)),
        "softmax": lambda x: (x.numbers * 9).softmax(1),
        "log_softmax": lambda x: (x.numbers[:, :5] * 9).log_softmax(1),
        "mean": lambda x: x.numbers.mean(1, keepdim=True),
        "int times float": lambda x: x.ids * x.numbers,
        "numbers from large": lambda x: x.large.float(),
        "clamp": lambda x: x.scores.clamp(min=-1, max=1),
        "clamp from below": lambda x: x.scores.clamp(min=torch.finfo(torch.float32).min),
        "maximum": lambda x: torch.maximum(x.scores, x.numbers),
        "masked": lambda x: (1.0 - x.flags.float()) * LOWEST,
        "where": lambda x: torch.where(x.flags, x.numbers, LOWEST),
        "comparison with infinity": lambda x: x.scores > -math.inf,
        "not a number": lambda x: x.scores.clone().sqrt().isnan(),
        "padded": lambda x: F.pad(x.numbers, (2, 1)),
        "repeated": lambda x: x.numbers.repeat(1, 2),
        "each repeated": lambda x: x.numbers.repeat_interleave(2, 1),
        "reversed": lambda x: x.numbers.flip(1),
        "rolled": lambda x: x.numbers.roll(1, 1),
    },
)

GROUPS = {"counting": COUNTING, "arithmetic": ARITHMETIC, "choice": CHOICE, "floats": FLOATS}
