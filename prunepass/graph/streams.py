"""Which residual stream of a model is read and pruned, and the inputs that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, takewhile

from torch.fx import GraphModule, Node

from prunepass.errors import CaptureError, PlanError, RefusalError
from prunepass.graph.inputs import (
    ModelInputs,
    embedded,
    fake_value,
    given_inputs,
    hint,
    input_name,
    is_symbolic,
    no_tokens,
    of_tokens,
)
from prunepass.graph.modules import module_path
from prunepass.graph.prompts import prompt_inputs
from prunepass.graph.sizes import Probe, quiet_fakes
from prunepass.graph.sources import Made, asks, attentions_in, depends_on, live_frames, made_tokens, prefix_of

__all__ = ["Stream", "check_separate", "find_inputs", "only_as_traced", "streams_of"]


def only_as_traced(gm: GraphModule) -> bool:
    """Whether a model makes its tokens of an input whose size is open in the graph, and runs at the traced size only: a
    table of positions of one length is added to them, say."""
    for made in made_tokens(gm, given_inputs(gm)):
        if made.source is None or made.reason is not None or not is_symbolic(fake_value(made.source).shape[1]):
            continue
        inputs = _of_made(gm, made, None)
        length = hint(fake_value(made.source).shape[1])
        for other in {max(1, length - 1), max(1, length // 2), length + 1}:
            probe = Probe(gm, inputs, 3, other)
            try:
                with quiet_fakes():
                    for node in gm.graph.nodes:
                        if node in inputs.front:
                            probe.step(node)
                    if probe.step(made.source).shape[1] == other:
                        return False
            except Exception:  # fake kernels raise whatever the operator raises
                continue
        return True
    return False


@dataclass(frozen=True)
class Stream:
    """One residual stream of a graph.

    Attributes:
        path: the module that holds its attentions, such as ``vision_model``; "" where the graph does not say.
        given: the input that its tokens are, or are made of.
        source: where it begins; None where the model has no attention over it.
        attentions: those that hold content of this stream, and of another only where that one leads into this one, up
            to the first in which other tokens read it.
        into: where streams begin that this one leads into, as an image does into the text around it.
        made: what is known of tokens that the model makes itself.
    """

    path: str
    given: Node
    source: Node | None
    attentions: tuple[Node, ...]
    into: frozenset[Node] = frozenset()
    made: Made | None = None

    def __str__(self) -> str:
        return f"{self.path or 'a stream'} (from {input_name(self.given)})"


def find_inputs(gm: GraphModule, stream: str | None = None) -> ModelInputs:
    """The tokens of one stream of an ATen graph, their mask, and what else is as long.

    Args:
        stream: the module path of one stream, or of a module in or around it; None for the one that leads to the
            output.

    Raises:
        CaptureError: no input holds tokens.
        PlanError: there is no such stream, or several lead to the output and none was named.
        RefusalError: the model makes tokens, but none that can leave; the attention mask cannot be read.
    """
    if (prompt := prompt_inputs(gm)) is not None:
        return prompt
    users = given_inputs(gm)
    found = streams_of(gm)
    if not found:
        raise CaptureError(no_tokens(users))
    chosen = _named(found, stream) if stream is not None else _leading(found)
    made = chosen.made
    if made is None:
        assert chosen.source is not None
        return of_tokens(gm, users, chosen.given, chosen.source)
    if made.reason is not None or made.source is None:
        raise made.reason or CaptureError(no_tokens(users))
    return _of_made(gm, made, live_frames(gm, users, made.source, chosen.attentions))


def check_separate(gm: GraphModule, names: Sequence[str]) -> None:
    """Whether streams of an ATen graph have nothing to do with each other before the model's end.

    Args:
        names: of the streams, as `find_inputs` takes one.

    Raises:
        PlanError: there is no such stream; two names are of one.
        RefusalError: one leads into the other.
    """
    found = streams_of(gm)
    chosen = [_named(found, name) for name in names]
    for one, other in permutations(range(len(names)), 2):
        if chosen[one] is chosen[other]:
            raise PlanError(f"The plans for {names[one]!r} and {names[other]!r} are of one stream, {chosen[one]}.")
        if chosen[other].source in chosen[one].into:
            raise RefusalError(
                f"the tokens of {chosen[one]} lead into those of {chosen[other]}, so that a plan for one changes what "
                "the plan for the other meets.",
                hint="Give one plan; its stream says which of the two is pruned: PrunePlan(stream=...).",
            )


def _of_made(gm: GraphModule, made: Made, mask: Node | None) -> ModelInputs:
    assert made.source is not None
    behind = depends_on(gm.graph, made.source)
    front = frozenset(node for node in gm.graph.nodes if node not in behind and node.op != "output")
    sequence = (made.source,) if mask is None else (made.source, mask)
    prefix = prefix_of(made.source, depends_on(gm.graph, made.given))
    return ModelInputs(made.source, made.source, mask, sequence, made.given, front, prefix)


def streams_of(gm: GraphModule) -> list[Stream]:
    """The streams of a graph, an encoder's before its decoder's; those that lead into another one last."""
    users = given_inputs(gm)
    made = _of_one_source(made_tokens(gm, users))
    seen = {m.given for m in made if m.source is not None or m.reason is not None}
    pairs = [(tokens, source) for tokens, source in embedded(gm.graph, users) if tokens not in seen]
    if all(tokens is source for tokens, source in pairs):
        pairs = [] if any(m.source is not None for m in made) else pairs[:1]  # states beside an image: of another part
    content = {source: depends_on(gm.graph, source) for _, source in pairs}
    content |= {m.source: depends_on(gm.graph, m.source) for m in made if m.source is not None}
    attentions = attentions_in(gm.graph)
    reached = {a: frozenset(s for s, inside in content.items() if a in inside) for a in attentions}
    out: list[Stream] = []
    for given, source, tokens in [*((t, s, None) for t, s in pairs), *((m.given, m.source, m) for m in made)]:
        if tokens is not None and tokens.source is None and tokens.reason is None:
            continue
        if source is None:
            out.append(Stream("", given, None, (), made=tokens))
            continue
        into = frozenset(other for other in content if other is not source and _leads_into(source, other, reached))
        own = tuple(
            a
            for a in attentions
            if source in reached[a]
            and all(other is source or _leads_into(other, source, reached) for other in reached[a])
        )
        own = _until_read(own, content[source])
        out.append(Stream(_common([module_path(a) for a in own]), given, source, own, into, tokens))
    return out


def _until_read(attentions: tuple[Node, ...], content: set[Node]) -> tuple[Node, ...]:
    """Those up to the first whose queries are of other tokens, a decoder's; all where that is the first one."""
    return tuple(takewhile(lambda attention: asks(attention, content), attentions)) or attentions


def _of_one_source(made: Sequence[Made]) -> list[Made]:
    """Of inputs that meet before the stream begins, the one that is convolved: beside an image, noise that masks it."""
    best = {m.source: m for m in made if not m.convolved} | {m.source: m for m in reversed(made) if m.convolved}
    return [m for m in made if m.source is None or best[m.source] is m]


def _leads_into(one: Node, other: Node, reached: dict[Node, frozenset[Node]]) -> bool:
    """Whether attention over ``one`` comes first and all attention over ``other`` holds its content, too."""
    held = list(reached.values())
    alone = any(one in h and other not in h for h in held)
    both = [one in h for h in held if other in h]
    return alone and bool(both) and all(both)


def _leading(found: Sequence[Stream]) -> Stream:
    """The stream that leads to the output."""
    given = [s for s in found if s.made is None]
    made = [s for s in found if s.made is not None]
    fit = [s for s in made if s.made is not None and s.made.reason is None]
    if not fit:
        return given[0] if given else made[0]
    encoders = [s for s in given if not input_name(s.given).startswith("decoder_")][:1]
    candidates = [*encoders, *fit]
    leading = [s for s in candidates if not any(other.source in s.into for other in candidates)]
    if len(leading) > 1:
        raise PlanError(
            f"This model has several streams of tokens that lead to the output: {_listed(leading)}. Say which one to "
            f"prune: PrunePlan(stream={leading[0].path!r})."
        )
    return leading[0] if leading else candidates[0]


def _named(found: Sequence[Stream], stream: str) -> Stream:
    fitting = [s for s in found if any(_within(module_path(a), stream) for a in s.attentions)]
    if len(fitting) != 1:
        if [s.path for s in found] == [""]:
            raise PlanError(
                f"The plan names the stream {stream!r}, and this model has one stream of tokens only, from "
                f"{input_name(found[0].given)}: leave stream out."
            )
        what = f"{len(fitting)} streams of tokens" if fitting else "no stream of tokens"
        raise PlanError(f"The plan's stream {stream!r} holds {what} of this model. Its streams: {_listed(found)}.")
    return fitting[0]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _listed(found: Sequence[Stream]) -> str:
    return ", ".join(map(str, found))


def _common(paths: Sequence[str]) -> str:
    """The module that all stand in, without the list of layers."""
    split = [path.split(".") for path in paths]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and (shared[-1].isdigit() or shared[-1] in ("layers", "layer", "blocks", "block", "h")):
        shared = shared[:-1]
    return ".".join(shared)
