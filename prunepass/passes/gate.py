"""Training's counterpart of `passes.select`: a gate module chooses, softly, in place of the top scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunepass.passes.state import Kept, Rewrite, Site, latest

__all__ = ["InsertGate"]


@dataclass(frozen=True)
class InsertGate:
    """``scores`` -> ``degree`` by calling the site's gate, a module of `training.methods.gating`; mask mode only.

    The gate is called as it is, not traced: what it does may change from step to step.
    """

    name = "gate"

    def run(self, rewrite: Rewrite, site: Site) -> int:
        """Sets ``site.kept``, with ``degree`` [B, S] float32 from the gate and ``alive``: where it is not zero."""
        assert rewrite.live is not None
        assert site.scores is not None
        live, before = rewrite.live, rewrite.kept_before(site)
        name = f"prunepass_gate_{site.index}"
        rewrite.gm.add_submodule(name, rewrite.gates[site.index])
        args = (site.scores, before.degree if before else None, live.alive, live.protected, live.count)
        with rewrite.graph.inserting_after(latest(*args)):
            degree = rewrite.graph.call_module(name, args)
        degree.meta = {"prunepass": {"stage": site.index, "pass": self.name}}
        with rewrite.graph.inserting_after(degree):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (degree,))
        operand = rewrite.operand(degree, "B", "S", dtype=torch.float32)

        def build(degree: Tensor) -> Tensor:
            return degree > 0

        with rewrite.graph.inserting_before(anchor):
            alive = rewrite.inline(build, [operand], stage=site.index, role=self.name, key=("gate",))
        rewrite.graph.erase_node(anchor)
        site.kept = Kept(None, None, alive, degree)
        return 1
