"""What the model's graph says of a plan: all of the default one, and the rest of a `Draft`."""

from __future__ import annotations

from dataclasses import replace

from prunepass.errors import option
from prunepass.graph.analysis import Analysis
from prunepass.graph.head import Reading, readings
from prunepass.plan import Protect, PrunePlan, ScorerSpec
from prunepass.plan.draft import Draft

__all__ = ["default_for", "head_warning", "settled"]

#: A row of so few tokens loses more by pruning than it gains. Measured on all-MiniLM-L6-v2, mean-pooled, the cosine to
#: the unpruned vector is .95 on essays of 50 to 512 tokens with the default stages, and .86 on sentences of 14.
SHORT_ROW = 32


def default_for(found: Analysis) -> PrunePlan:
    """`PrunePlan.default`, as the head needs it.

    Where each token's state is an output, or the head pools over them, pruned positions carry the mean of the tokens
    kept, and rows of up to `SHORT_ROW` tokens stay whole. The last token stays where it may be read. Patches of an
    image and frames of a sound are merged by their likeness: they repeat each other more than words do.

    Raises:
        PlanError: the model has fewer than 2 blocks.
    """
    return settled(Draft(), found)


def settled(plan: PrunePlan | Draft, found: Analysis) -> PrunePlan:
    """The plan itself; of a `Draft`, what is given, and the rest as `default_for` has it.

    So stages that were given without ``restore`` restore as the default plan does for the same head.

    Raises:
        PlanError: the default stages are asked for, and the model has fewer than 2 blocks.
    """
    if isinstance(plan, PrunePlan):
        return _with_prefix(plan, found)
    stages = plan.given.get("stages")
    default = PrunePlan(stages) if stages is not None else PrunePlan.default(len(found.blocks))
    leave = plan.leave or ("merge" if stages is None and found.inputs.made_from is not None else None)
    if leave is not None:
        default = replace(default, stages=tuple(replace(stage, leave=leave) for stage in default.stages))
    if stages is None and leave == "merge":
        default = replace(default, scorer=ScorerSpec("likeness"))
    return _with_prefix(plan.completed(_for_head(default, found)), found)


def _with_prefix(plan: PrunePlan, found: Analysis) -> PrunePlan:
    """The plan with class and register tokens protected: what stands before an image's patches and is none of it."""
    if plan.protect.first >= found.inputs.prefix:
        return plan
    return replace(plan, protect=replace(plan.protect, first=found.inputs.prefix))


def _for_head(plan: PrunePlan, found: Analysis) -> PrunePlan:
    reads = readings(found.gm.graph, found.blocks[-1].end, found.sizes)
    if plan.stages and all(stage.leave == "merge" for stage in plan.stages):
        # the state of the host then weighs each token in a mean by how many it stands for
        whole = reads == {Reading.FIRST} or found.inputs.made_from is not None
        return plan if whole else replace(plan, protect=Protect(first=1, last=1))
    if found.inputs.made_from is not None:  # rows are long, and what they hold is in no place of its own
        return replace(plan, restore="mean") if Reading.POOL in reads and Reading.STATES not in reads else plan
    if reads & {Reading.STATES, Reading.POOL} and not reads & {Reading.EACH, Reading.OTHER}:
        return replace(plan, restore="mean", protect=Protect(first=SHORT_ROW, last=1))
    return plan if reads == {Reading.FIRST} else replace(plan, protect=Protect(first=1, last=1))


def head_warning(plan: PrunePlan, reads: frozenset[Reading]) -> str | None:
    """What to know of pruned positions, where the head reads them; None where there is nothing.

    Args:
        plan: what was pruned by.
        reads: `graph.head.readings`. Pass them only where something was pruned and put back.
    """
    leaves = frozenset(stage.leave for stage in plan.stages if stage.keep != 1) or frozenset({"drop"})
    left_with = _LEFT_WITH[leaves]
    if Reading.EACH in reads:
        carried = {"last": left_with, "lens": ""}.get(plan.restore, f"restore={plan.restore!r}")
        return carried and (
            f"The head makes a prediction for each token, and for a pruned one it makes it from {carried}. Where all "
            "predictions count, train the plan for it (prunepass train), or raise keep."
        )
    if plan.restore != "last" or not reads & {Reading.STATES, Reading.POOL, Reading.OTHER}:
        return None
    where = "An output holds a state for each token" if Reading.STATES in reads else "The head looks at all tokens"
    if leaves == {"merge"}:
        return (
            f"{where}, and a pruned one carries {left_with}. A mean over the tokens then weighs each "
            f"kept token by how many it stands for. For a mean that counts each once take {option('restore', 'mean')}."
        )
    return (
        f"{where}, and for a pruned one that is the state it left with, half-way up the model. This spoils a mean over "
        "the tokens, and leaves what is read at protected tokens alone ([CLS]). For a mean take "
        f"{option('restore', 'mean')}, or a trained plan (prunepass train)."
    )


#: what restore="last" puts at pruned positions, by how a plan's tokens leave
_LEFT_WITH = {
    frozenset({"drop"}): "the state that it had when it left",
    frozenset({"merge"}): "the last state of the token that it was merged into",
    frozenset({"drop", "merge"}): "the state that it, or the token that it was merged into, had last",
}
