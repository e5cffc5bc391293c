"""Training's counterpart of `passes.select`: a gate module chooses, softly, in place of the top scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunepass.errors import RefusalError
from prunepass.passes.contract import Fault, SitePass, layout_faults
from prunepass.passes.state import Kept, Rewrite, latest

__all__ = ["InsertGate"]


@dataclass(frozen=True)
class InsertGate(SitePass):
    """``scores`` -> ``degree`` by calling the site's gate, a module of `training.methods.gating`; mask mode only.

    The gate is called as it is, not traced: what it does may change from step to step.
    """

    name = "gate"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.mode != "mask":
            yield Fault(f"A gate chooses softly, and mode {state.mode!r} cannot.", self.site.cut)
        if self.site.index not in state.gates:
            yield Fault("There is no gate for this stage.", self.site.cut)
        if state.live is None or self.site.scores is None:
            yield Fault("There are no scores to choose by.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Sets ``site.kept``, with ``degree`` [B, S] float32 from the gate and ``alive``: where it is not zero."""
        rewrite, site = state, self.site
        if site.stage.leave == "merge":
            raise RefusalError(
                f"the stage {site.place} merges, and a gate that learns to choose softly gives tokens that are partly "
                "there, of which no kept one can be told.",
                where=site.path or site.cut.name,
                hint="Train the plan with leave='drop', then change its stages to 'merge' and measure.",
            )
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

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        kept = self.site.kept
        if kept is None or kept.degree is None:
            yield Fault("No gate chose tokens.", self.site.scores)
            return
        yield from layout_faults(state, kept.alive, "marks of kept tokens", ("B", "S"), torch.bool)
        if kept.degree.op != "call_module" or kept.degree.args[0] is not self.site.scores:
            yield Fault("The degrees are not the gate's answer to the scores.", kept.degree)
        elif state.gates[self.site.index] is not state.gm.get_submodule(str(kept.degree.target)):
            yield Fault("The gate is another stage's.", kept.degree)
