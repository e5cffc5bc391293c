"""Towers that read images in a vision-language model, compiled each by itself and pruned by a plan of its own.

``generate()`` reads images before the first call of the model, so that a tower which runs compiled during such calls
alone would be left out: of a model that is compiled in place a tower is compiled in place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from prunepass.graph.language_part import by_name
from prunepass.graph.towers import refuse_packed
from prunepass.plan.choice import Choice

__all__ = ["CompiledTower", "compiled_towers", "put_in_place"]


class CompiledTower:
    """What is called in place of a tower.

    Args:
        path: of the tower in the outer model.
        tower: the module.
        plan: its plan.
        options: for ``torch.compile``, without a plan.
        dynamic: what ``torch.compile`` got.
    """

    def __init__(
        self, path: str, tower: nn.Module, plan: Choice, options: Mapping[str, Any], dynamic: bool | None
    ) -> None:
        self._path, self._tower = path, tower
        self._dense = options.get("fallback") == "dense"
        self._names = inspect.signature(tower.forward)
        self._run: Callable[..., Any] = torch.compile(
            tower._call_impl, backend="tokprune", dynamic=dynamic, options={**options, "plan": plan}
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the tower returns, of all of its tokens.

        Raises:
            RefusalError: it gets all images in one row; and as the backend.
        """
        given = by_name(self._names, args, kwargs)
        if not self._dense:
            refuse_packed(self._path, given)
        if given.get("output_hidden_states") or given.get("output_attentions"):
            _install_hooks(self._tower)
        return self._run(*args, **kwargs)


def _install_hooks(tower: nn.Module) -> None:
    """Those that transformers installs in the first call that asks for states of layers, which Dynamo cannot trace."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(capturing, "maybe_install_capturing_hooks", None)
    if install is not None:
        install(tower)


def compiled_towers(
    model: nn.Module, plans: Mapping[str, Choice], options: Mapping[str, Any], dynamic: bool | None
) -> dict[nn.Module, CompiledTower]:
    """What is to be called in place of each tower.

    Args:
        plans: by the tower's path in ``model``.
        options, dynamic: as for `CompiledTower`.
    """
    towers = ((path, model.get_submodule(path), plan) for path, plan in plans.items())
    return {tower: CompiledTower(path, tower, plan, options, dynamic) for path, tower, plan in towers}


def put_in_place(model: nn.Module, towers: Mapping[nn.Module, CompiledTower]) -> None:
    """Have each tower of ``model`` called compiled from now on, as `nn.Module.compile` does, and no other tower of it
    that was put in place before."""
    for module in model.modules():
        if module in towers:
            module._compiled_call_impl = towers[module]
        elif isinstance(module._compiled_call_impl, CompiledTower):
            module._compiled_call_impl = None
