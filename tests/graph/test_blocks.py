"""Blocks and cuts of every architecture, against what its authors call layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import harness
import toys
import zoo
from prunepass.errors import RefusalError
from prunepass.graph.blocks import Block, find_blocks
from prunepass.graph.capture import capture_module, ensure_aten
from prunepass.graph.lengths import resolve_lengths
from prunepass.graph.streams import find_inputs

# The module path of block i, where it is not encoder.layer.<i>.
PATHS = {
    "albert": "encoder.albert_layer_groups.0",  # one set of weights, run again and again
    "distilbert": "transformer.layer.{}",
    "bloom": "h.{}",
    "ctrl": "h.{}",
    "gpt2": "h.{}",
    "gptj": "h.{}",
    "codegen": "h.{}",
    "opt": "decoder.layers.{}",
    "xlm": "attentions.{}",
}
PARALLEL = {"gpt_neox", "phi", "cohere", "gptj", "codegen", "mobilebert"}


def blocks_of(model: nn.Module, example: dict[str, Tensor] | None = None) -> tuple[Block, ...]:
    return blocks_in(capture_module(model, example or harness.example()).graph_module)


def blocks_in(gm: torch.fx.GraphModule) -> tuple[Block, ...]:
    inputs = find_inputs(gm)
    sizes, _ = resolve_lengths(gm, inputs)
    return find_blocks(gm, inputs, sizes)


@pytest.mark.parametrize("name", zoo.by_day())
def test_blocks_are_the_layers_of_the_model(name: str) -> None:
    blocks = blocks_in(ensure_aten(harness.captured(name).graph_module))
    encoders = {n for n in zoo.SPECIES if not zoo.SPECIES[n].causal} - {"modernbert", "eurobert", "nomic_bert"}
    default = "encoder.layer.{}" if name in encoders else "layers.{}"
    assert [b.index for b in blocks] == list(range(zoo.LAYERS))
    assert [b.path for b in blocks] == [PATHS.get(name, default).format(i) for i in range(zoo.LAYERS)]
    assert all(len(b.attentions) == 1 for b in blocks)
    assert [b.parallel for b in blocks] == [name in PARALLEL] * zoo.LAYERS
    for before, after in pairwise(blocks):
        assert before.end is after.start
    stream = [n for b in blocks for n in (b.start, b.after_attention, b.end)]
    assert stream == sorted(stream)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("layers", [1, 5])
def test_any_depth(name: str, layers: int) -> None:
    options = {"n_layer": layers} if name == "gpt2" else {"num_hidden_layers": layers}
    assert len(blocks_of(zoo.tiny(name, **options))) == layers


def states_after(model: nn.Module, path: str, x: dict[str, Tensor]) -> Tensor:
    """What the module at ``path`` gives."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    harness.run(model, x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "gpt2"])
def test_cuts_are_the_hidden_states_between_layers(name: str) -> None:
    """Read off by value: the cut after block i holds what layer i returned."""
    model, x = zoo.tiny(name), zoo.batch([9, 6])
    gm = ensure_aten(harness.captured(name).graph_module)
    values = values_of(gm, [b.end for b in blocks_in(gm)], x)
    for i in range(zoo.LAYERS):
        path = PATHS.get(name, "encoder.layer.{}" if name in ("bert", "deberta-v2") else "layers.{}").format(i)
        assert torch.allclose(values[i], states_after(model, path, x), atol=1e-12), path


# Where the last block's output stands at the end of the module that it is, whatever head follows.
LAST = [
    ("gpt_neox", "causal", "gpt_neox.layers.{}"),
    ("phi", "token", "model.layers.{}"),
    ("gptj", "causal", "transformer.h.{}"),
    ("mobilebert", "masked", "mobilebert.encoder.layer.{}"),
    ("bert", "masked", "bert.encoder.layer.{}"),
    ("gemma2", "causal", "model.layers.{}"),
]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("name", "head", "path"), LAST)
def test_the_head_is_no_part_of_the_last_block(name: str, head: str, path: str, layers: int) -> None:
    options = {"n_layer" if name == "gptj" else "num_hidden_layers": layers}
    if name == "gemma2":
        options["layer_types"] = ["full_attention"] * layers
    model, x = zoo.tiny(name, head, **options), zoo.batch([9, 6])
    gm = capture_module(model, harness.example()).graph_module
    (end,) = values_of(gm, [blocks_in(gm)[-1].end], x)
    assert torch.allclose(end, states_after(model, path.format(layers - 1), x), atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt_neox", "llama", "mobilebert"])
def test_the_last_block_ends_where_its_stream_does_without_module_paths(name: str) -> None:
    """A model of one layer has no other block to be like; here its graph does not say either where modules end."""
    gm = capture_module(zoo.tiny(name, num_hidden_layers=1), harness.example()).graph_module
    (with_paths,) = blocks_in(gm)
    for node in gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    (without,) = blocks_in(gm)
    if name != "mobilebert":  # norm and sum of one parallel post-norm block: nothing tells whose the norm is
        assert without.end is with_paths.end
    assert without.start is with_paths.start


@pytest.mark.parametrize("name", ["bart", "t5", "mbart"])
@pytest.mark.parametrize("decoder", [5, 9])
def test_a_decoder_holds_no_blocks_of_the_encoder(name: str, decoder: int) -> None:
    x = zoo.batch([9, 6])
    example = {**x, "decoder_input_ids": zoo.batch([decoder, decoder])["input_ids"]}
    model = zoo.tiny(name)
    gm = capture_module(model, example).graph_module
    blocks = blocks_in(gm)
    layers = "encoder.block" if name == "t5" else "encoder.layers"
    assert [b.path for b in blocks] == [f"{layers}.{i}" for i in range(zoo.LAYERS)]
    (end,) = values_of(gm, [blocks[-1].end], example)
    assert torch.allclose(end, states_after(model, f"{layers}.{zoo.LAYERS - 1}", example), atol=1e-12)


def values_of(gm: torch.fx.GraphModule, nodes: list[torch.fx.Node], x: dict[str, Tensor]) -> list[Tensor]:
    found: dict[torch.fx.Node, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n in nodes:
                found[n] = value
            return value

    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        Watch(gm).run(*(x[name] for name in names), enable_io_processing=False)
    return [found[n] for n in nodes]


@pytest.mark.parametrize("kind", ["sdpa", "softmax", "einsum"])
def test_attention_in_any_writing(kind: str) -> None:
    blocks = blocks_of(toys.encoder(kind=kind))
    assert [b.path for b in blocks] == [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize("extra", ["softmax over tokens", "channel softmax"])
def test_a_softmax_is_not_an_attention_by_itself(extra: str) -> None:
    kinds = {**toys.MIXERS, **toys.TOKENWISE}
    assert [len(b.attentions) for b in blocks_of(toys.encoder(kinds[extra]))] == [1, 1, 1, 1]


class EarlyFirst(nn.Module):
    """Gives the embeddings before the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.words(input_ids), self.inner(input_ids, attention_mask)


def test_the_order_of_outputs_does_not_matter() -> None:
    assert len(blocks_of(EarlyFirst())) == 4


def test_without_attention_there_are_no_blocks() -> None:
    with pytest.raises(RefusalError, match="no attention"):
        blocks_of(zoo.tiny("fnet"), {"input_ids": harness.example()["input_ids"]})


class Adapter(nn.Module):
    """Takes whatever it is given, as adapters around models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.encoder()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.inner(*args, **kwargs)


def test_inputs_hidden_behind_kwargs_are_found() -> None:
    assert len(blocks_of(Adapter())) == 4
