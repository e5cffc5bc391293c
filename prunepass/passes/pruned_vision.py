"""A pruned vision-language model as a module: images are read as before, the language model after them is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunepass.passes.pruned import PrunedModule

if TYPE_CHECKING:
    from torch import Tensor

    from prunepass.graph.capture import Captured
    from prunepass.graph.language_part import CallReader, LanguagePart
    from prunepass.passes.result import PruneResult

__all__ = ["PrunedVision"]


class PrunedVision(PrunedModule):
    """A vision-language model whose language model is pruned.

    ``graph_module`` and ``exported`` are of the language model and its head alone, which take ``inputs_embeds`` in
    place of pixels; see `graph.language_part.LanguagePart` for their inputs. The part that reads images is the original
    model's own.
    """

    def __init__(self, captured: Captured, result: PruneResult, part: LanguagePart, reader: CallReader) -> None:
        super().__init__(captured, result, part)
        self._name = type(reader.model).__name__
        self._reader = reader

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the inputs of the original model, ``input_ids`` [B, S] among them, with or without images.

        Returns:
            The original model's output with ``logits`` [B, S, V] alone. Any number and size of images that the model
            takes will do.

        Raises:
            OptionError: other inputs than those; a cache, labels or selected logits are asked for; the weights were
                moved or cast.
        """
        return super().forward(**self.language_inputs(*args, **kwargs))

    def language_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What ``graph_module``, and files that `prunepass.export` writes, take for these inputs of the original model.

        The original model reads the images, and runs as far as its language model.

        Returns:
            By name ``inputs_embeds`` [B, S, D] floating, ``input_ids`` and ``attention_mask`` [B, S], ``position_ids``
            [B, S] or [B, S, n] int64, and what else the language model gets for each token.

        Raises:
            OptionError: as `forward`.
        """
        return self._reader.read(*args, **kwargs)
