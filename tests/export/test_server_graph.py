"""``graph.pbtxt``, by which OpenVINO Model Server serves a folder: protobuf text, of what its calculators take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import bert

import prunepass
import zoo
from prunepass import PrunePlan, Stage
from vocabulary import tiny_tokenizer

pytest.importorskip("openvino_tokenizers")
text_format = pytest.importorskip("google.protobuf.text_format")

PLAN = PrunePlan([Stage(1, 0.5)], "norm", restore="mean")


def parsed(file: Path, options: dict[str, str]) -> Any:
    """The file as protobuf reads it, by the fields of mediapipe's graph and of one calculator's options.

    Args:
        options: name of each field of the options, and its type in protobuf.
    """
    from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory

    text = file.read_text()
    name = re.findall(r"mediapipe\.(\w+)\]", text)[0]
    made = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", syntax="proto2")
    made.dependency.append("google/protobuf/any.proto")
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"string": field.TYPE_STRING, "bool": field.TYPE_BOOL, "enum": field.TYPE_ENUM}

    def message(title: str, **fields: tuple[int, int, str]) -> Any:
        one = made.message_type.add(name=title)
        for number, (key, (label, kind, of)) in enumerate(fields.items(), 1):
            one.field.add(name=key, number=number, label=label, type=kind, type_name=of or None)
        return one

    several, single = field.LABEL_REPEATED, field.LABEL_OPTIONAL
    strings = (several, field.TYPE_STRING, "")
    message(
        "Node",
        calculator=(single, field.TYPE_STRING, ""),
        input_stream=strings,
        output_stream=strings,
        input_side_packet=strings,
        node_options=(several, field.TYPE_MESSAGE, ".google.protobuf.Any"),
    )
    message(
        "CalculatorGraphConfig",
        node=(several, field.TYPE_MESSAGE, ".mediapipe.Node"),
        input_stream=strings,
        output_stream=strings,
    )
    enum = f".mediapipe.{name}.Pooling"
    own = message(name, **{k: (single, kinds[v], enum if v == "enum" else "") for k, v in options.items()})
    pooling = own.enum_type.add(name="Pooling")
    for number, value in enumerate(("CLS", "LAST", "MEAN")):
        pooling.value.add(name=value, number=number)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(made)
    graph = message_factory.GetMessageClass(pool.FindMessageTypeByName("mediapipe.CalculatorGraphConfig"))()
    text_format.Parse(text, graph, descriptor_pool=pool)
    (node,) = graph.node
    given = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mediapipe.{name}"))()
    assert node.node_options[0].Unpack(given)
    assert node.calculator + "Options" == name
    assert list(graph.input_stream) == list(node.input_stream) == ["REQUEST_PAYLOAD:input"]
    assert list(graph.output_stream) == list(node.output_stream) == ["RESPONSE_PAYLOAD:output"]
    return node, given


def test_of_vectors_and_of_scores(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "pooled": True, "pooling": "mean"}
    folder = prunepass.export(bert(num_layers=2), PLAN, tmp_path / "vectors", **shared)
    fields = {"models_path": "string", "normalize_embeddings": "bool", "pooling": "enum"}
    node, options = parsed(folder / "graph.pbtxt", fields)
    assert node.calculator == "EmbeddingsCalculatorOV"
    assert list(node.input_side_packet) == ["EMBEDDINGS_NODE_RESOURCES:embeddings_servable"]
    assert (options.models_path, options.normalize_embeddings, options.pooling) == ("./", False, 0)

    reranker = zoo.tiny("bert", "sequence", dtype=torch.float32, num_labels=1, num_hidden_layers=2)
    folder = prunepass.export(reranker, PLAN, tmp_path / "scores", tokenizer=tiny_tokenizer())
    node, options = parsed(folder / "graph.pbtxt", {"models_path": "string"})
    assert node.calculator == "RerankCalculatorOV"
    assert list(node.input_side_packet) == ["RERANK_NODE_RESOURCES:rerank_servable"]
