"""Each contract has a negative twin here: a pass that breaks the graph on purpose is caught, and the message names the
pass, those before it, and the node."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

import harness
import prunepass.passes
import prunepass.pipeline as pipeline
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import ContractError, OptionError, PruneError
from prunepass.export.pooling import Pooling, pooled_program
from prunepass.graph.capture import capture_exported
from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.passes.contract import Pass, SitePass
from prunepass.passes.pool import PoolKept
from prunepass.passes.state import Merged, Rewrite
from prunepass.passes.windows import cut_to_window
from prunepass.pipeline import prune_graph
from prunepass.scorers import ScoreInputs, Scorer

aten = torch.ops.aten
PLAN = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm")
Spoil = Callable[[Rewrite, Any], Node | None]


def mine(state: Rewrite, role: str, target: Any = None) -> list[Node]:
    """Nodes that a pass added."""
    found = [n for n in state.graph.nodes if n.meta.get("prunepass", {}).get("pass") == role]
    return [n for n in found if target is None or n.target is target]


def below(state: Rewrite, level: int, target: Any = None) -> list[Node]:
    """Nodes of the model under so many cuts."""
    return [n for n in state.graph.nodes if state.level.get(n) == level and target in (None, n.target)]


def after(state: Rewrite, node: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
    """A new node behind another, with the marks of ``like``."""
    with state.graph.inserting_after(node):
        made: Node = state.graph.call_function(target, args)
    made.meta = dict(like.meta) if like is not None else {}
    return made


def broken(base: type[Pass], spoil: Spoil, caught: list[Node | None]) -> type[Pass]:
    """A pass that does its work and then breaks it; the node that must be named goes into ``caught``."""

    @dataclasses.dataclass(frozen=True)
    class Broken(base):  # type: ignore[valid-type, misc]  # a class chosen by the case
        def run(self, state: Rewrite) -> int:
            count: int = super().run(state)
            if not caught:
                caught.append(spoil(state, getattr(self, "site", None)))
            return count

    return Broken


# -- one way to break what each pass leaves; each returns the node that is at fault ------------------------------------


def site_beside_the_stream(state: Rewrite, _: Any) -> Node | None:
    state.sites[0].cut = next(n for n in state.graph.nodes if n.target is aten.linear.default)
    return state.sites[1].cut


def size_of_a_hidden_state(state: Rewrite, _: Any) -> Node | None:
    made = after(state, state.blocks[1].start, aten.sym_size.int, state.blocks[1].start, 1)
    for probe in (state.sizes.first, state.sizes.second):
        probe.step(made)
    return made


def counted_once(state: Rewrite, site: Any) -> Node | None:
    node = below(state, state.sites.index(site) + 1, SDPA)[0]
    node.update_arg(3, attention_arguments(node)["attn_mask"].args[0])
    return node


def level_forgotten(state: Rewrite, _: Any) -> Node | None:
    node = below(state, 1, SDPA)[0]
    state.level[node] = 0
    return node


def live_by_something_else(state: Rewrite, _: Any) -> Node | None:
    mask = state.inputs.attention_mask
    assert mask is not None
    assert state.live is not None
    assert state.live.alive is not None
    state.live.alive.replace_input_with(mask, after(state, mask, aten.mul.Tensor, mask, 1))
    return state.live.alive


def padding_for_live(state: Rewrite, _: Any) -> Node | None:
    assert state.live is not None
    assert state.live.alive is not None
    state.live.alive.target = aten.eq.Scalar
    return state.live.alive


def scores_from_the_end(state: Rewrite, site: Any) -> Node | None:
    site.scores = after(state, state.stream_end, aten.sum.dim_IntList, state.stream_end, [-1], like=site.scores)
    return site.scores  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def descending(state: Rewrite, site: Any) -> Node | None:
    topk: Node = site.kept.index.args[0]
    topk.args = (*topk.args[:3], True, *topk.args[4:])
    return topk


def all_slots(state: Rewrite, site: Any) -> Node | None:
    topk: Node = site.kept.index.args[0]
    length = after(state, topk.args[0], aten.sym_size.int, state.inputs.tokens, 1, like=site.width)  # type: ignore[arg-type]  # set by the pass before
    topk.args = (topk.args[0], length, *topk.args[2:])
    return topk


def one_token_too_many(state: Rewrite, site: Any) -> Node | None:
    number = after(state, site.width, torch.sym_max, site.width, 10, like=site.width)
    site.width.replace_all_uses_with(number, delete_user_cb=lambda user: user is not number)
    site.width = number
    return site.kept.index  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def scores_for_the_gate(state: Rewrite, site: Any) -> Node | None:
    site.kept.degree.args = (state.live.rank, *site.kept.degree.args[1:])  # type: ignore[union-attr]  # set before
    return site.kept.degree  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def keys_seen(state: Rewrite, site: Any) -> Node | None:
    node = below(state, state.sites.index(site) + 1, SDPA)[0]
    node.args = node.args[:3]
    return node


def cut_read_whole(state: Rewrite, site: Any) -> Node | None:
    node = below(state, 1, aten.linear.default)[0]
    node.replace_input_with(site.narrowed, site.cut)
    return node


def whole_mask(state: Rewrite, site: Any) -> Node | None:
    node, above = below(state, 1, SDPA)[0], below(state, 0, SDPA)[0]
    node.replace_input_with(attention_arguments(node)["attn_mask"], attention_arguments(above)["attn_mask"])
    return node


def whole_length(state: Rewrite, _: Any) -> Node | None:
    gathered = next(n for n in mine(state, "narrow", aten.sym_size.int) if any(u in state.level for u in n.users))
    whole = next(n for n in below(state, 0, aten.sym_size.int) if state.sizes.follows_length(n))
    node = next(u for u in gathered.users if u in state.level)
    node.replace_input_with(gathered, whole)
    return node


def cut_under_our_name(state: Rewrite, site: Any) -> Node | None:
    node = below(state, 1, aten.linear.default)[0]
    ours = after(state, site.narrowed, aten.alias.default, site.cut, like=site.narrowed)
    node.replace_input_with(site.narrowed, ours)
    return node


def counted_twice(state: Rewrite, site: Any) -> Node | None:
    sizes: Node = site.merged.sizes
    site.merged = Merged(after(state, sizes, aten.mul.Tensor, sizes, 2, like=sizes), site.merged.host)
    return site.merged.sizes  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def gone_elsewhere(state: Rewrite, site: Any) -> Node | None:
    host: Node = site.merged.host
    site.merged = Merged(site.merged.sizes, after(state, host, aten.bitwise_not.default, host, like=host))
    return site.merged.host  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def not_restored(state: Rewrite, _: Any) -> Node | None:
    (restored,) = (n for n in state.results() if n is not None and n.meta.get("prunepass"))
    state.output.replace_input_with(restored, state.stream_end)
    return state.stream_end


def restored_but_one(state: Rewrite, _: Any) -> Node | None:
    (restored,) = (n for n in state.results() if n is not None and n.meta.get("prunepass"))
    made = after(state, restored, aten.slice.Tensor, restored, 1, 1, 2**31, like=restored)
    state.output.replace_input_with(restored, made)
    return made


def another_pooled(state: Rewrite, _: Any) -> Node | None:
    state.pooled = after(state, state.pooled, aten.sum.dim_IntList, state.pooled, [-1])  # type: ignore[arg-type]  # set before
    return state.pooled


def pooled_beside(state: Rewrite, _: Any) -> Node | None:
    made = after(state, state.stream_end, aten.mean.dim, state.stream_end, [1])
    state.output.args = ((*state.output.args[0], made),)  # type: ignore[misc]  # a tuple in these graphs
    return made


def full_slots(state: Rewrite, _: Any) -> Node | None:
    made, old = next((n, o) for n, o in zip(state.results(), state.outputs, strict=True) if n is not o)
    state.output.replace_input_with(made, old)
    return old  # type: ignore[no-any-return]  # a node, which torch.fx leaves open


def slots_for_positions(state: Rewrite, _: Any) -> Node | None:
    node, source = next(iter(state.whole.items()))
    (first := (cut_to_window(node) or [node])[0]).replace_input_with(first.all_input_nodes[0], source)
    return node


def places_of_another_stage(state: Rewrite, _: Any) -> Node | None:
    node = next(n for n, source in state.whole.items() if state.level[source] == 2)
    others, places = (site.kept.positions for site in state.sites if site.kept is not None)
    for made in mine(state, "windows"):
        made.replace_input_with(places, others)  # type: ignore[arg-type]  # set by the passes before
    return (cut_to_window(node) or [node])[0].all_input_nodes[0]


def another_reader(state: Rewrite, _: Any) -> Node | None:
    thinned = next(iter(state.thinned))
    made = after(state, thinned, aten.alias.default, thinned)
    state.output.args = ((*state.output.args[0], made),)  # type: ignore[misc]  # a tuple in these graphs
    return made


def unread(state: Rewrite, _: Any) -> Node | None:
    return after(state, state.stream_end, aten.alias.default, state.stream_end)


def other_metadata(state: Rewrite, _: Any) -> Node | None:
    node = below(state, 2, aten.linear.default)[0]
    node.meta["val"] = node.meta["val"].to(torch.float16)
    return node


def other_size(state: Rewrite, _: Any) -> Node | None:
    node = mine(state, "restore")[-1]
    node.meta["val"] = node.meta["val"][:, 1:]
    return node


#: the pass, how its graph is broken, what the message says, whether it takes a run to tell, model
CASES: tuple[tuple[str, Spoil, str, bool, str], ...] = (
    ("Place", site_beside_the_stream, "around a cut before it", False, "base"),
    ("ReadSizesFromInputs", size_of_a_hidden_state, "reads the length from", False, "base"),
    ("Check", level_forgotten, "stands below 0 cuts", False, "base"),
    ("InsertLive", live_by_something_else, "which is no input", False, "base"),
    ("InsertLive", padding_for_live, "Other tokens are live", True, "base"),
    ("InsertScore", scores_from_the_end, "stands below the cut", False, "base"),
    ("InsertSelect", descending, "do not ascend", False, "base"),
    ("InsertSelect", all_slots, "slots are kept in place of", False, "base"),
    ("InsertSelect", one_token_too_many, "10 slots are kept in place of 8", True, "base"),
    ("InsertGate", scores_for_the_gate, "not the gate's answer", False, "gated"),
    ("Weigh", counted_once, "counts as one", False, "merging"),
    ("Hide", keys_seen, "seen whether their tokens are kept or not", False, "mask"),
    ("Narrow", cut_read_whole, "hidden state of all tokens", False, "base"),
    ("Narrow", whole_mask, "depends on the full length", False, "base"),
    ("Narrow", whole_length, "depends on the full length", False, "base"),
    ("Narrow", cut_under_our_name, "what it reads is of another length", True, "base"),
    ("Narrow", counted_twice, "another number of tokens than have met", True, "merging"),
    ("Narrow", gone_elsewhere, "a slot that there is not", True, "merging"),
    ("Restore", not_restored, "as short as its layer", False, "base"),
    ("Restore", restored_but_one, "Result 0 has the shape", True, "base"),
    ("PoolKept", another_pooled, "were not traced", False, "pooled"),
    ("PoolKept", pooled_beside, "beside the mean of the tokens kept", False, "pooled"),
    ("EmptySlots", full_slots, "hold no token are not empty", False, "cache"),
    ("SpreadCaches", slots_for_positions, "holds the slots of a pruned layer", False, "window"),
    ("SpreadCaches", places_of_another_stage, "is not spread by", False, "window"),
    ("HoistReads", another_reader, "and may need others", False, "sequence"),
    ("Cleanup", unread, "Nothing reads it", False, "base"),
    ("Cleanup", other_metadata, "Its metadata say", True, "base"),
    ("Cleanup", other_size, "Its metadata say", True, "base"),
)


class Gate(nn.Module):
    """Never run here."""


@cache
def prompt_graph(name: str) -> GraphModule:
    return harness.dynamo_graph(zoo.tiny(name, "causal", use_cache=True))


def source_of(kind: str) -> tuple[GraphModule, dict[str, Any]]:
    if kind in ("cache", "window"):
        plan = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm", Protect(first=1, last=1))
        return prompt_graph({"cache": "llama", "window": "mistral"}[kind]), {"plan": plan}
    if kind == "pooled":
        exported = harness.captured("bert").exported
        program = pooled_program(exported, Pooling("mean", False, None), "BertModel")
        return capture_exported(program).graph_module, {"plan": dataclasses.replace(PLAN, restore="mean")}
    if kind == "merging":
        stages = tuple(dataclasses.replace(stage, leave="merge") for stage in PLAN.stages)
        return harness.captured("bert").graph_module, {"plan": dataclasses.replace(PLAN, stages=stages)}
    head = kind if kind in ("base", "sequence") else "base"
    options: dict[str, Any] = {"gated": {"mode": "mask", "gates": {0: Gate(), 1: Gate()}}, "mask": {"mode": "mask"}}
    return harness.captured("bert", head).graph_module, options.get(kind, {})


@pytest.mark.parametrize(
    ("name", "spoil", "said", "by_a_run", "kind"), CASES, ids=[f"{case[0]}-{case[1].__name__}" for case in CASES]
)
def test_a_graph_broken_on_purpose_is_caught(
    name: str, spoil: Spoil, said: str, by_a_run: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Node | None] = []
    graph, options = source_of(kind)
    options = {"plan": PLAN, "metadata": name == "Cleanup", **options}
    if name == "PoolKept":  # the one pass of these that an export adds
        good: type[Pass] = PoolKept
        options["before_restore"] = (broken(good, spoil, caught)(),)
    else:
        good = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, broken(good, spoil, caught))
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1" if by_a_run else "")
    with pytest.raises(ContractError, match=said) as found:
        prune_graph(graph, **options)
    error, node = found.value, caught[0]
    place = " before block 1" if issubclass(good, SitePass) else ""
    assert error.pass_name == f"{good.name}{place}"
    assert node is not None
    assert error.node == node.name
    for part in (f"After the pass {error.pass_name}", node.name, ", ".join(error.before), "Please report it"):
        assert part in str(error)
    assert error.before[:4] == ("input", "masks", "lengths", "blocks")
    assert error.pass_name not in error.before
    assert isinstance(error, PruneError)


def test_a_graph_that_cannot_run_is_caught_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def misplaced(state: Rewrite, _: Any) -> Node | None:
        first = below(state, 0, aten.linear.default)[0]
        first.prepend(state.stream_end)
        return state.stream_end

    caught: list[Node | None] = []
    monkeypatch.setattr(pipeline, "Restore", broken(pipeline.Restore, misplaced, caught))
    with pytest.raises(ContractError, match=r"After the pass restore .* used before it has been defined") as found:
        prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False)
    assert caught[0] is not None
    assert found.value.node == caught[0].name


def test_contracts_can_be_switched_off_and_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Node | None] = []
    monkeypatch.setattr(pipeline, "InsertSelect", broken(pipeline.InsertSelect, descending, caught))
    graph = harness.captured("bert").graph_module
    monkeypatch.setenv("PRUNEPASS_VERIFY", "0")
    prune_graph(graph, PLAN, metadata=False)
    assert caught, "the graph was broken, and nothing looked"
    monkeypatch.setenv("PRUNEPASS_VERIFY", "yes")
    with pytest.raises(OptionError, match=r"PRUNEPASS_VERIFY is 'yes'\. It takes 1"):
        prune_graph(graph, PLAN, metadata=False)


def test_an_error_of_a_library_says_in_which_pass_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(state: Rewrite, _: Any) -> Node | None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "Narrow", broken(pipeline.Narrow, fails, []))
    with pytest.raises(ZeroDivisionError) as found:
        prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False)
    (note,) = found.value.__notes__
    assert note.startswith("Raised in the pass narrow before block 1 of prunepass, after: input, masks, lengths")


def test_with_fallback_dense_a_broken_contract_runs_the_model_unpruned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "InsertSelect", broken(pipeline.InsertSelect, descending, []))
    model, x = zoo.tiny("bert"), harness.example()
    torch._dynamo.reset()
    options = {"plan": PLAN, "target": "eager", "fallback": "dense"}
    got = harness.run(torch.compile(model, backend="tokprune", options=options), x)
    assert "runs unpruned, as fallback='dense' asks: After the pass select before block 1" in caplog.text
    assert harness.difference(got, harness.run(model, x), x["attention_mask"].bool()) < 1e-12


def test_a_scorer_that_gives_another_shape_is_refused_by_name() -> None:
    class Pairs(Scorer):
        name = "pairs"

        def score(self, inputs: ScoreInputs) -> torch.Tensor:
            return inputs.hidden[..., :2]

    with pytest.raises(TypeError, match=r"'pairs' must return one tensor of shape \[batch, tokens\]"):
        prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False, scorers={0: Pairs()})


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_metadata_of_joined_states_are_counted_by_their_lengths(name: str) -> None:
    gm = prune_graph(harness.captured(name).graph_module, PLAN, metadata=True).graph_module
    (joined,) = gm.graph.find_nodes(op="call_function", target=aten.cat.default)[-1:]
    table = next(n for n in joined.users if n.target is aten.flatten.using_ints)
    rows, slots, width = joined.meta["val"].shape
    assert table.meta["val"].shape == (rows * slots, width)


def passes() -> list[type[Pass]]:
    """Of all files in the folder, also of those that only an export loads."""
    files = [file.name for file in pkgutil.iter_modules(prunepass.passes.__path__)]
    modules = {f"prunepass.passes.{name}" for name in files}
    for module in modules:
        importlib.import_module(module)
    found: list[type[Pass]] = [Pass]
    for one in found:
        found += [c for c in one.__subclasses__() if c.__module__ in modules]
    return [c for c in found if c not in (Pass, SitePass)]


def twins() -> set[str]:
    """Passes that a test breaks: those of `CASES`, and those that a class in another file here derives from."""
    found = {case[0] for case in CASES}
    for file in Path(__file__).parent.glob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        if "raises(ContractError" in text:
            kinds = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
            found |= {base.id for kind in kinds for base in kind.bases if isinstance(base, ast.Name)}
    return found


def test_each_pass_is_a_frozen_dataclass_with_a_contract_and_a_twin() -> None:
    names = {c.__name__ for c in passes()}
    assert names <= twins()
    assert {case[0] for case in CASES} <= names
    for one in passes():
        assert dataclasses.is_dataclass(one)
        assert getattr(one, "__dataclass_params__").frozen  # noqa: B009  # mypy knows no such attribute
        assert one.ensures is not Pass.ensures
        assert one.requires is not Pass.requires or one.name in ("sizes", "cleanup")
        assert one.name
