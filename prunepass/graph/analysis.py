"""What is found in a graph before anything is changed in it, and a way not to find it twice."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from prunepass.graph.blocks import Block, find_blocks
from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.inputs import ModelInputs
from prunepass.graph.lengths import resolve_lengths
from prunepass.graph.masks import simplify_masks
from prunepass.graph.prefixes import whole_rows
from prunepass.graph.reasons import no_raw_errors
from prunepass.graph.sizes import Probe, Sizes
from prunepass.graph.streams import find_inputs

__all__ = ["Analysis"]


@dataclass(frozen=True)
class Analysis:
    """An ATen graph whose lengths are resolved, its inputs, sizes and blocks."""

    gm: GraphModule
    inputs: ModelInputs
    sizes: Sizes
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, gm: GraphModule, stream: str | None = None) -> Analysis:
        """Read a graph. Masks in it get their smallest form, and literals that are lengths become symbolic.

        Args:
            stream: which residual stream, see `find_inputs`.

        Raises:
            CaptureError, RefusalError: as `find_inputs`, `resolve_lengths` and `find_blocks`.
        """
        with no_raw_errors():
            simplify_masks(gm.graph)
            inputs = find_inputs(gm, stream)
            if whole_rows(gm, inputs):
                inputs = find_inputs(gm, stream)
            sizes, _ = resolve_lengths(gm, inputs)
            return cls(gm, inputs, sizes, find_blocks(gm, inputs, sizes))

    def copy(self) -> Analysis:
        """The same of a copy of the graph, to be edited: a tenth of the time that reading it takes."""
        gm, at = copy_with_nodes(self.gm)
        mask, made_from = self.inputs.attention_mask, self.inputs.made_from
        inputs = ModelInputs(
            tokens=at[self.inputs.tokens],
            source=at[self.inputs.source],
            attention_mask=None if mask is None else at[mask],
            sequence=tuple(at[node] for node in self.inputs.sequence),
            made_from=None if made_from is None else at[made_from],
            front=frozenset(at[node] for node in self.inputs.front if node in at),
            prefix=self.inputs.prefix,
        )
        first, second = (_moved(probe, gm, inputs, at) for probe in (self.sizes.first, self.sizes.second))
        blocks = tuple(
            replace(
                block,
                start=at[block.start],
                after_attention=at[block.after_attention],
                end=at[block.end],
                attentions=tuple(at[node] for node in block.attentions),
                stream=tuple(at[node] for node in block.stream),
            )
            for block in self.blocks
        )
        whole = [at[node] for node in self.sizes.whole if node in at]
        return Analysis(gm, inputs, Sizes(first, second, whole), blocks)


def _moved(probe: Probe, gm: GraphModule, inputs: ModelInputs, at: dict[Node, Node]) -> Probe:
    moved = copy.copy(probe)
    moved.values = {at[node]: value for node, value in probe.values.items() if node in at}
    moved._gm, moved._inputs = gm, inputs
    moved._attributes = dict(probe._attributes)
    return moved
