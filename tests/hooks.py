"""The hook oracle for any layout: the unmodified `transformers` model, pruned by hooks on its layers.

Nothing here imports prunepass or knows graphs. Where a model keeps its layers is all that is told. While a layer runs,
each softmax over the keys and each fused attention gets the pruned tokens hidden as keys; behind the layer, pruned
tokens get back the state that they came with. The model's own head then works on whatever state each token rests at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import oracle


def run_hooked(
    model: nn.Module,
    layers: list[nn.Module],
    plan: Any,
    inputs: dict[str, Tensor],
    prompt: int | None = None,
    live: Tensor | None = None,
) -> oracle.Masked:
    """Run ``model``, hiding tokens as ``plan`` says: stages before blocks, scorer "norm".

    Args:
        layers: the blocks in order; one module may stand for several, which run one after the other.
        inputs: ``input_ids`` [B, S] int64, ``attention_mask`` if the model takes it, and whatever else it takes.
        prompt: how many tokens of each row are pruned; those after it were generated, and all stay.
        live: [B, T] bool, of tokens that the model makes of an image or a sound, which has no ids.
    """
    run = _Hooked(plan, inputs, prompt, live)
    with run.attached(layers), run.mode, torch.no_grad():
        output = model(**inputs)
    assert len(run.history) == len(plan.stages), f"{len(run.history)} of {len(plan.stages)} stages were reached"
    return oracle.Masked(output, run.history)


class _Hooked:
    def __init__(self, plan: Any, inputs: dict[str, Tensor], prompt: int | None, live: Tensor | None = None) -> None:
        ids = inputs["input_ids"] if live is None else torch.zeros_like(live, dtype=torch.int64)
        self.plan, self.ids, self.prompt = plan, ids, prompt
        self.live = inputs.get("attention_mask", torch.ones_like(ids)).bool() if live is None else live
        self.alive = self.live.clone()
        self.calls = 0
        self.history: list[Tensor] = []
        self.mode = _HideKeys()

    @contextmanager
    def attached(self, layers: list[nn.Module]) -> Iterator[None]:
        handles = []
        for layer in dict.fromkeys(layers):
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entering = next(x for x in [*args, *kwargs.values()] if self._is_hidden(x))
        for i, stage in enumerate(self.plan.stages):
            if stage.layer == self.calls:
                assert not stage.after_attention, "stages after an attention are not known here"
                assert self.plan.scorer_of(i).name == "norm", "other scores than norms are not known here"
                scores = self.entering.norm(dim=-1)
                given = (x[:, : self.prompt] for x in (scores, self.alive, self.live, self.ids))
                alive = oracle.select_rows(*given, stage.keep, self.plan.protect)
                self.alive = torch.cat([alive, self.alive[:, alive.shape[1] :]], dim=1)
                self.history.append(self.alive)
        self.calls += 1
        self.mode.alive = self.alive if self.history else None

    def _after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        self.mode.alive = None
        if self._is_hidden(output):
            return self._rested(output)
        at = next(i for i, x in enumerate(output) if self._is_hidden(x))
        return (*output[:at], self._rested(output[at]), *output[at + 1 :])

    def _rested(self, hidden: Tensor) -> Tensor:
        return torch.where(self.alive[..., None], hidden, self.entering)

    def _is_hidden(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == self.ids.shape and x.is_floating_point()


class _HideKeys(TorchFunctionMode):
    """Hides the keys of dead tokens in attention, however it is written; and adds ``bias`` [B, S] to keys' scores."""

    alive: Tensor | None = None
    bias: Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.alive is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("softmax", "logsumexp") and self._over_keys(args[0]):
            alive = self._keys(args[0].dim(), len(args[0]))
            alive = torch.nn.functional.pad(alive, (0, args[0].shape[-1] - alive.shape[-1]), value=True)
            scores = (args[0] + self._added(args[0])).masked_fill(~alive, torch.finfo(args[0].dtype).min)
            return func(scores, *args[1:], **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(func, *args, **kwargs)
        if name == "multi_head_attention_forward":  # which comes as one call, whatever is in it
            bias, heads = kwargs["attn_mask"], args[4]
            assert self.bias is None
            keys = self.alive.repeat_interleave(heads, dim=0)[:, None, :]
            return func(*args, **kwargs | {"attn_mask": bias.masked_fill(~keys, torch.finfo(bias.dtype).min)})
        return func(*args, **kwargs)

    def _over_keys(self, scores: Tensor) -> bool:
        assert self.alive is not None
        length = self.alive.shape[1]
        # one key more is an attention sink, which stands last
        return scores.dim() > 2 and scores.shape[-2] == length and scores.shape[-1] in (length, length + 1)

    def _keys(self, rank: int, rows: int) -> Tensor:
        """The alive keys, as a bool value of ``rank`` axes that leads with ``rows``: heads may be folded into them."""
        assert self.alive is not None
        batch, length = self.alive.shape
        keys = self.alive.repeat_interleave(rows // batch, dim=0)
        return keys.reshape(rows, *[1] * (rank - 2), length)

    def _added(self, scores: Tensor) -> Tensor:
        """``bias`` for the keys of scores, or of queries with as many axes; sinks behind the keys get none."""
        if self.bias is None:
            return torch.zeros((), dtype=scores.dtype)
        rows = self.bias.repeat_interleave(len(scores) // len(self.bias), dim=0).to(scores.dtype)
        rows = rows.reshape(len(rows), *[1] * (scores.dim() - 2), rows.shape[1])
        return (
            torch.nn.functional.pad(rows, (0, max(0, scores.shape[-1] - rows.shape[-1])))
            if self._over_keys(scores)
            else rows
        )

    def _attend(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        assert self.alive is not None
        length = self.alive.shape[1]
        assert query.shape[-2] == key.shape[-2] == length, "no attention of the tokens to themselves"
        mask = torch.zeros((), dtype=query.dtype) if attn_mask is None else attn_mask
        least = torch.finfo(query.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, least)
        if is_causal:
            mask = torch.full((length, length), least, dtype=query.dtype).triu(1) + mask
        mask = mask + self._added(query)
        mask = torch.where(self._keys(query.dim(), len(query)), mask, least)
        return func(query, key, value, mask, dropout_p, **kwargs)


def layers_of(model: nn.Module, count: int) -> list[nn.Module]:
    """The layers of a `transformers` model, its encoder's where it has a decoder, too: a list of ``count`` modules.

    ALBERT runs one module ``count`` times.
    """
    found = {}
    for name, module in model.named_modules():
        if name.endswith("albert_layer_groups.0.albert_layers.0"):
            return [module] * count
        if isinstance(module, nn.ModuleList) and len(module) == count and any(module[0].children()):
            found[name] = list(module)
    assert found, "no list of layers was found"
    of_encoder = [layers for name, layers in found.items() if "decoder" not in name]
    return (of_encoder or list(found.values()))[0]
