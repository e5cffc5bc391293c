"""References written from the contract alone: nothing here imports prunepass.

`select_row` is the selection rule in plain Python. `run_masked` runs an unmodified `transformers` model in eager
attention and prunes it by module hooks: pruned tokens are hidden as keys by editing the mask that each later layer is
called with, and keep the last hidden state they had. Plans are read by their attributes only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# -- counting and selecting -------------------------------------------------------------------------------------------


def count(n: int, keep: Any, protect: Any) -> int:
    """Tokens kept of a row of ``n``: min(n, max(first + last, ceil(keep * n))), in exact fractions."""
    return min(n, max(protect.first + protected_at_end(n, protect), math.ceil(keep * n)))


def protected_at_end(n: int, protect: Any) -> int:
    return max(protect.last, math.ceil(protect.last_share * n))


def select_row(
    scores: Sequence[float],
    alive: Sequence[bool],
    live: Sequence[bool],
    ids: Sequence[int] | None,
    keep: Any,
    protect: Any,
) -> list[bool]:
    """Which tokens of one row stay.

    Args:
        scores: one number a slot; NaN counts as the lowest.
        alive: slots that no earlier stage pruned; a subset of ``live``.
        live: slots that hold a real token.
        ids: token ids, where the plan protects some.
    """
    real = [t for t, is_live in enumerate(live) if is_live]
    by_position = set(real[: protect.first]) | set(real[len(real) - protected_at_end(len(real), protect) :])

    def rank(t: int) -> tuple[float, ...]:
        if t in by_position:
            return (0, t)
        if ids is not None and ids[t] in protect.token_ids:
            return (1, t)
        return (2, math.inf if math.isnan(scores[t]) else -scores[t], t)

    candidates = sorted((t for t, is_alive in enumerate(alive) if is_alive), key=rank)
    chosen = set(candidates[: count(len(real), keep, protect)])
    return [t in chosen for t in range(len(alive))]


def select_rows(scores: Tensor, alive: Tensor, live: Tensor, ids: Tensor | None, keep: Any, protect: Any) -> Tensor:
    """`select_row` for each row of a batch: [B, S] scores and masks to a [B, S] bool mask."""
    rows = [
        select_row(
            scores[b].tolist(),
            alive[b].tolist(),
            live[b].tolist(),
            None if ids is None else ids[b].tolist(),
            keep,
            protect,
        )
        for b in range(len(scores))
    ]
    return torch.tensor(rows, dtype=torch.bool)


# -- scores -----------------------------------------------------------------------------------------------------------


def attention_received(probabilities: Tensor, rows: Tensor) -> Tensor:
    """Attention that each key received, averaged over heads and live query rows.

    Args:
        probabilities: [B, H, S, S].
        rows: bool [B, S], the query rows that count.
    """
    weight = rows.to(probabilities.dtype)
    return torch.einsum("bhqk,bq->bk", probabilities, weight) / (probabilities.shape[1] * weight.sum(-1, keepdim=True))


# -- the unpruned model, masked by hooks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """Where a `transformers` model keeps its parts.

    Args:
        layers: path of the list of layers.
        attention: path, within a layer, of the module that returns ``(output, probabilities)``.
        middle: path, within a layer, of the module at the seam between attention and feed-forward part, and whether
            the hidden state there is the module's input or its output.
        options: keyword arguments of ``forward`` that make the attention return its probabilities.
    """

    layers: str
    attention: str
    middle: tuple[str, str]
    options: dict[str, Any] = field(default_factory=dict)


_POST_NORM = Anatomy("encoder.layer", "attention.self", ("attention.output", "output"))
_LLAMA = Anatomy("layers", "self_attn", ("post_attention_layernorm", "input"))

ANATOMY: dict[str, Anatomy] = {
    "bert": _POST_NORM,
    "roberta": _POST_NORM,
    "electra": _POST_NORM,
    "deberta-v2": Anatomy(
        _POST_NORM.layers, _POST_NORM.attention, _POST_NORM.middle, options={"output_attentions": True}
    ),
    "distilbert": Anatomy("transformer.layer", "attention", ("sa_layer_norm", "output")),
    "modernbert": Anatomy("layers", "attn", ("mlp_norm", "input")),
    "gpt2": Anatomy("h", "attn", ("ln_2", "input")),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": Anatomy("layers", "self_attn", ("pre_feedforward_layernorm", "input")),
}


@contextmanager
def float64_softmax() -> Iterator[None]:
    """Take float64 softmax in float64: `transformers` asks for float32 in places, whatever the model's dtype."""
    plain = torch.nn.functional.softmax

    def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        return plain(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    with mock.patch.object(torch.nn.functional, "softmax", softmax):
        yield


@dataclass
class Masked:
    """What `run_masked` found: the output, and after each stage a bool [B, S] mask of the tokens still alive."""

    output: Any
    alive: list[Tensor]


def run_masked(model: nn.Module, anatomy: Anatomy, plan: Any, inputs: dict[str, Tensor]) -> Masked:
    """Run the unpruned ``model`` (eager attention), hiding tokens as ``plan`` says.

    Scorers "attention" and "norm" are known here. Inputs must hold ``input_ids`` [B, S].
    """
    run = _Run(plan, inputs)
    layers = model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    handles = [handle for i, layer in enumerate(layers) for handle in run.attach(i, layer, anatomy)]
    try:
        with torch.no_grad():
            output = model(**inputs, **anatomy.options)
    finally:
        for handle in handles:
            handle.remove()
    assert len(run.history) == len(plan.stages), "the reference did not reach every stage"
    return Masked(output, run.history)


class _Run:
    """The state of one masked run, from layer to layer."""

    def __init__(self, plan: Any, inputs: dict[str, Tensor]) -> None:
        ids = inputs["input_ids"]
        self.plan = plan
        self.ids = ids
        self.live = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.alive = self.live.clone()
        self.rows = self.alive  # query rows of the latest attention
        self.probabilities: Tensor | None = None
        self.history: list[Tensor] = []

    def attach(self, index: int, layer: nn.Module, anatomy: Anatomy) -> Iterable[Any]:
        name, side = anatomy.middle
        middle = layer.get_submodule(name)
        yield layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
        yield layer.get_submodule(anatomy.attention).register_forward_hook(self._after_attention)
        if side == "output":
            yield middle.register_forward_hook(lambda module, args, output: self._middle(index, output))
        else:
            yield middle.register_forward_pre_hook(lambda module, args: self._middle(index, args[0]))
        yield layer.register_forward_hook(self._after)

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = inspect.signature(layer.forward).bind(*args, **kwargs)
            self.entering = call.arguments["hidden_states"]
            self._stage(index, False, self.entering)
            self.rows = self.alive
            call.arguments["attention_mask"] = hide_keys(
                call.arguments.get("attention_mask"), self.alive, self.entering
            )
            return call.args, call.kwargs

        return hook

    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.probabilities = output[1]

    def _middle(self, index: int, hidden: Tensor) -> None:
        self.between = hidden
        self._stage(index, True, hidden)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        resting = torch.where(self.rows[..., None], self.between, self.entering)
        hidden = torch.where(self.alive[..., None], hidden, resting)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _stage(self, index: int, after_attention: bool, hidden: Tensor) -> None:
        for i, stage in enumerate(self.plan.stages):
            if (stage.layer, stage.after_attention) == (index, after_attention):
                scores = self._scores(self.plan.scorer_of(i).name, hidden)
                self.alive = select_rows(scores, self.alive, self.live, self.ids, stage.keep, self.plan.protect)
                self.history.append(self.alive)

    def _scores(self, scorer: str, hidden: Tensor) -> Tensor:
        if scorer == "norm":
            return hidden.norm(dim=-1)
        assert scorer == "attention", f"the reference knows no scorer {scorer!r}"
        assert self.probabilities is not None, "the model's attention returned no probabilities"
        return attention_received(self.probabilities, self.rows)


def hide_keys(mask: Tensor | None, alive: Tensor, hidden: Tensor) -> Tensor:
    """The mask of one attention, additive or boolean, with the keys of dead tokens hidden."""
    keys = alive[:, None, None, :]
    if mask is None:
        mask = torch.zeros(keys.shape, dtype=hidden.dtype)
    assert mask.dim() == 4, f"a layer was called with a mask of shape {tuple(mask.shape)}"
    if mask.is_floating_point():
        return torch.where(keys, mask, torch.finfo(mask.dtype).min)
    return torch.where(keys, mask, torch.zeros((), dtype=mask.dtype))
