"""Whether the attention of a model looks backwards only, read off the masks that its graph computes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Node, map_arg
from torch.utils._python_dispatch import _disable_current_modes

from prunepass.graph.inputs import fake_value, given_inputs, hint, is_parameter
from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.passes.samples import sample_inputs
from prunepass.passes.state import Rewrite

__all__ = ["looks_back"]

logger = logging.getLogger(__name__)

#: an added mask below this hides a key
_HIDDEN = -1e4


def looks_back(rewrite: Rewrite) -> bool:
    """Whether any attention of the stream hides what stands later than the query.

    Masks that the model computes are evaluated on a row without padding. Where one cannot be evaluated, the answer is
    yes, which is sound for any model.
    """
    for block in rewrite.blocks:
        for node in block.attentions:
            if node.target is SDPA and attention_arguments(node).get("is_causal"):
                return True
    masks = [n for n in rewrite.graph.nodes if _is_side(rewrite, n)]
    if not masks:
        return False
    values: dict[Node, Any] = dict(_whole_inputs(rewrite) or sample_inputs(rewrite, padded=False))
    try:
        with _disable_current_modes(), torch.no_grad():
            return any(_hides_later(_evaluate(rewrite, node, values)) for node in masks)
    except Exception as e:  # whatever a model's own operators raise on the sample
        logger.debug("a mask could not be evaluated (%s): tokens are merged into later ones only", e)
        return True


def _whole_inputs(rewrite: Rewrite) -> dict[Node, Tensor]:
    """Of tokens that the model makes itself: its inputs as long as in the traced call, without padding."""
    if rewrite.inputs.made_from is None or rewrite.device.type == "meta":
        return {}
    given = {n: fake_value(n) for n in given_inputs(rewrite.gm)}
    return {
        n: torch.ones([hint(size) for size in x.shape], dtype=x.dtype, device=rewrite.device) for n, x in given.items()
    }


def _is_side(rewrite: Rewrite, node: Node) -> bool:
    """A value [..., S, S] that does not depend on the states, read by a pruned layer."""
    if node not in rewrite.sizes.first.values or rewrite.level.get(node, 0):
        return False
    axes = rewrite.sizes.axes(node) or ()
    if len(axes) < 2 or not (axes[-1].is_sequence and axes[-2].is_sequence):
        return False
    return any(rewrite.level.get(user, 0) for user in node.users)


def _hides_later(mask: Tensor) -> bool:
    """[..., S, S]: whether some query sees itself and not the key right behind it, or the other way round where true
    means hidden.

    A window that looks both ways shows both. A prefix that is seen whole hides what is behind it from the rest alone.
    """
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return False
        mask = mask > _HIDDEN
    own, next_ = mask.diagonal(dim1=-2, dim2=-1)[..., :-1], mask.diagonal(offset=1, dim1=-2, dim2=-1)
    return bool((own != next_).any())


def _evaluate(rewrite: Rewrite, wanted: Node, values: dict[Node, Any]) -> Tensor:
    needed: set[Node] = set()
    todo = [wanted]
    while todo:
        node = todo.pop()
        if node not in needed and node not in values:
            needed.add(node)
            todo += node.all_input_nodes
    for node in sorted(needed):
        if node.op == "get_attr":
            value: Any = rewrite.gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            values[node] = value
            continue
        if node.op == "placeholder" and (weight := _weight(node)) is not None:
            values[node] = weight
            continue
        if not callable(node.target):
            raise LookupError(f"{node.name} is an input that the sample does not know")
        args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
        values[node] = node.target(*args, **kwargs)
    found: Tensor = values[wanted]
    return found


def _weight(node: Node) -> Tensor | None:
    """The parameter or buffer that an input of Dynamo's graph stands for; None of any other input."""
    given = node.meta.get("grapharg")
    if given is None or not is_parameter(node):
        return None
    found = given.example
    return found.detach() if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None
