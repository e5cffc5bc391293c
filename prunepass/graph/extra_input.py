"""One more input for a traced graph: by keyword, behind those that the model takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from prunepass.errors import OptionError
from prunepass.graph.inputs import fake_value

__all__ = ["add_input"]


def add_input(gm: GraphModule, name: str, example: Tensor) -> Node:
    """Give the graph of an exported program a keyword input that nothing reads yet.

    Args:
        example: of its shape, all of whose sizes are fixed, and its dtype.

    Returns:
        The placeholder.

    Raises:
        OptionError: the model has an input of that name.
    """
    given = list(gm.graph.find_nodes(op="placeholder"))
    if any(node.target == name for node in given):
        raise OptionError(
            f"The model has an input {name!r} itself, which is the name of the one that chooses among several plans. "
            "Give a single plan, or put the model into a module that calls it otherwise."
        )
    with gm.graph.inserting_after(given[-1]):
        made: Node = gm.graph.placeholder(name)
    mode = next((value.fake_mode for node in given if hasattr(value := fake_value(node), "fake_mode")), None)
    made.meta["val"] = torch.empty_like(example, device="meta") if mode is None else mode.from_tensor(example)
    codegen: Any = copy.copy(gm.graph._codegen)  # copies of a graph share it
    args, kwargs = pytree.tree_unflatten([0] * codegen.pytree_info.in_spec.num_leaves, codegen.pytree_info.in_spec)
    spec = pytree.tree_flatten((args, {**kwargs, name: 0}))[1]
    codegen.pytree_info = codegen.pytree_info._replace(orig_args=[*codegen.pytree_info.orig_args, name], in_spec=spec)
    gm.graph._codegen = codegen
    gm.recompile()
    return made
