"""A pruned vision-language model as a module: images are read as before, or by a pruned tower, and the language model
after them is pruned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.graph.language_part import by_name
from prunepass.graph.towers import call_inside, part_blamed, reading_with
from prunepass.passes.pruned import PrunedModule

if TYPE_CHECKING:
    from prunepass.graph.capture import Captured
    from prunepass.graph.language_part import CallReader, LanguagePart
    from prunepass.passes.result import PruneResult
    from prunepass.plan.choice import Choice

__all__ = ["PrunedTower", "PrunedVision", "pruned_towers"]


class PrunedTower:
    """What stands in for the ``forward`` of a module that was pruned by itself.

    Args:
        path: of the module in the model around it.
        pruned: the module, pruned.
        names: of the arguments of its ``forward``.
        traced: the call that it was traced with, by name.
    """

    def __init__(self, path: str, pruned: PrunedModule, names: inspect.Signature, traced: Mapping[str, Any]) -> None:
        self.path, self.pruned, self._names = path, pruned, names
        self._settled = _without_tensors(traced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, of all of its tokens.

        Raises:
            OptionError: arguments that are no tensors are others than in the traced call, which the graph holds to;
                or as `PrunedModule.forward`.
        """
        given = {name: value for name, value in by_name(self._names, args, kwargs).items() if value is not None}
        settled = _without_tensors(given)
        for name in sorted(settled.keys() | self._settled.keys()):
            if (found := settled.get(name)) != (traced := self._settled.get(name)):
                raise OptionError(
                    f"{self.path} was pruned for {name}={traced!r}, which its graph holds to, and is called with "
                    f"{found!r}. Prune the model with example inputs like those of this call."
                )
        return self.pruned(**given)


def _without_tensors(given: Mapping[str, Any]) -> dict[str, Any]:
    leaves = torch.utils._pytree.tree_leaves
    return {name: value for name, value in given.items() if not any(isinstance(x, Tensor) for x in leaves(value))}


def pruned_towers(
    reader: CallReader,
    plans: Mapping[str, Choice],
    example: Mapping[str, Any],
    prune: Callable[[nn.Module, Choice, Mapping[str, Any]], nn.Module],
) -> dict[str, PrunedTower]:
    """The towers of ``reader.model`` that their plans prune, by path.

    Args:
        plans: by path.
        example: keyword arguments of the model, with images.
        prune: as `prunepass.prune`.

    Raises:
        RefusalError, CaptureError, PlanError, WeightsError: as ``prune``, of the tower that the message begins with.
    """
    towers = {}
    for path, choice in plans.items():
        call, tower = call_inside(reader, path, example), reader.model.get_submodule(path)
        with part_blamed(path):
            pruned = prune(tower, choice, call)
        if isinstance(pruned, PrunedModule):
            towers[path] = PrunedTower(path, pruned, inspect.signature(tower.forward), call)
    return towers


class PrunedVision(PrunedModule):
    """A vision-language model whose language model is pruned, or a tower that reads images, or both.

    ``graph_module`` and ``exported`` are of the language model and its head alone, which take ``inputs_embeds`` in
    place of pixels; see `graph.language_part.LanguagePart` for their inputs. The part that reads images is the original
    model's own, but for pruned towers.

    Attributes:
        plan: of the language model; without stages where only towers are pruned.
        towers: by their paths in the original model, modules outside the language model that are pruned as well.
    """

    towers: Mapping[str, PrunedModule]

    def __init__(
        self,
        captured: Captured,
        result: PruneResult,
        part: LanguagePart,
        reader: CallReader,
        towers: Mapping[str, PrunedTower] = MappingProxyType({}),
    ) -> None:
        super().__init__(captured, result, part)
        self._name = type(reader.model).__name__
        self._reader = reading_with(reader, towers) if towers else reader
        self.towers = {path: tower.pruned for path, tower in towers.items()}

    def __repr__(self) -> str:
        beside = "".join(f", {path}: {tower.plan!r}" for path, tower in self.towers.items())
        return f"{super().__repr__()[:-1]}{beside})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the inputs of the original model, ``input_ids`` [B, S] among them, with or without images.

        Returns:
            The original model's output with ``logits`` [B, S, V] alone. Any number and size of images that the model
            takes will do; a pruned tower takes the size that it was traced with, and any number.

        Raises:
            OptionError: other inputs than those; a cache, labels or selected logits are asked for; the weights were
                moved or cast.
        """
        return super().forward(**self.language_inputs(*args, **kwargs))

    def language_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What ``graph_module``, and files that `prunepass.export` writes, take for these inputs of the original model.

        The original model, with its pruned towers, reads the images, and runs as far as its language model.

        Returns:
            By name ``inputs_embeds`` [B, S, D] floating, ``input_ids`` and ``attention_mask`` [B, S], ``position_ids``
            [B, S] or [B, S, n] int64, and what else the language model gets for each token.

        Raises:
            OptionError: as `forward`.
        """
        return self._reader.read(*args, **kwargs)
