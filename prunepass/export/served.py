"""What servers look for beside a model: sentence-transformers' list of modules, and a tokenizer that OpenVINO runs."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunepass.export.pooling import VECTOR
from prunepass.export.programs import Exportable
from prunepass.graph.inputs import fake_value
from prunepass.plan.folders import writing

__all__ = ["Served", "model_folder", "write_for_servers"]

logger = logging.getLogger(__name__)

#: tokenizers without a limit of their own say 10 ** 30
_NO_LIMIT = 10**9
#: of sentence-transformers; copied as they are where the model has them
_SETTINGS = "config_sentence_transformers.json"
_LENGTHS = "sentence_bert_config.json"
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@dataclass(frozen=True)
class Served:
    """A model that is written, and what is known of how it will be called.

    Attributes:
        made: the program.
        model: that it came from.
        tokenizer: that was given; None where none was.
        to: the format.
        pooled: whether it puts out one vector a text.
        length: number of tokens of each text, where that is fixed.
    """

    made: Exportable
    model: Any
    tokenizer: Any
    to: str
    pooled: bool
    length: int | None

    @property
    def pairs(self) -> bool:
        """Whether it scores pairs of texts: a classifier with one label."""
        return self.classifies and getattr(self.model.config, "num_labels", None) == 1

    @property
    def classifies(self) -> bool:
        """Whether it puts out labels of whole texts, [B, labels]."""
        name = type(self.model).__name__
        return name.endswith("ForSequenceClassification") and "logits" in self.made.outputs

    @property
    def continues(self) -> bool:
        """Whether it goes on with texts by a cache inside. The language model of one that sees takes embeddings, which
        no server makes of a text alone."""
        return bool(self.made.states) and "inputs_embeds" not in self.made.inputs

    @property
    def reads_texts(self) -> bool:
        """Whether there are servers that call it with texts."""
        return self.pooled or self.classifies or self.continues

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text: what the program, the tokenizer and sentence-transformers' files agree on."""
        limits = [
            self.length,
            self.made.limit,
            getattr(self.tokenizer, "model_max_length", None),
            _setting(model_folder(self.model), _LENGTHS, "max_seq_length"),
        ]
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
        return min(known, default=None)


def model_folder(model: Any) -> Path | None:
    """The folder that a model was loaded from; None where it came from elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    folder = Path(name or "")
    return folder if name and folder.is_dir() else None


def write_for_servers(folder: Path, served: Served) -> None:
    """Write what the servers of this kind of model read beside it.

    A tokenizer that cannot be converted is said in the log, and the folder is whole without it.

    Raises:
        ExportError: the disk is full, or refuses.
    """
    if served.pooled and served.to != "pt2":
        _write_modules(folder, served)
    if served.to == "openvino" and served.tokenizer is not None and served.reads_texts:
        written = _write_openvino_tokenizer(folder, served)
        # the server's calculators tell models apart by how many inputs they have, which a level is one of
        if written and served.made.levels is None and (served.pooled or served.pairs):
            _write_graph(folder, _VECTORS if served.pooled else _SCORES)


def _write_modules(folder: Path, served: Served) -> None:
    """sentence-transformers' own pooling, by the first token, finds the vector in the file's text of one token."""
    kind = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
    ]
    pooling = {"word_embedding_dimension": _width(served.made)}
    pooling |= {f"pooling_mode_{mode}": mode == "cls_token" for mode in _MODES}
    with writing(folder):
        (folder / "1_Pooling").mkdir()
        _dump(modules, folder / "modules.json")
        _dump(pooling, folder / "1_Pooling" / "config.json")
        _dump({"max_seq_length": served.longest, "do_lower_case": False}, folder / _LENGTHS)
        source = model_folder(served.model)
        if source is not None and (source / _SETTINGS).is_file():
            shutil.copyfile(source / _SETTINGS, folder / _SETTINGS)  # prompts, and how vectors are compared
        else:
            _dump({"__version__": {}, "prompts": {}, "similarity_fn_name": "cosine"}, folder / _SETTINGS)


def _width(made: Exportable) -> int:
    """D of ``sentence_embedding``."""
    results = made.program.graph.output_node().args[0]
    vector: Any = dict(zip(made.outputs, results, strict=True))[VECTOR]
    return int(fake_value(vector).shape[-1])


@dataclass(frozen=True)
class _Calculator:
    """One of OpenVINO Model Server's, which answers requests with the model in a folder.

    Attributes:
        name: its own; its options have it, too.
        resources: the side packet in which the server hands it the compiled model.
        options: beside the folder, as they are written.
    """

    name: str
    resources: str
    options: tuple[str, ...] = ()


#: vectors come pooled and, where that was asked for, normalised: the server takes the one "token" as it is
_VECTORS = _Calculator(
    "EmbeddingsCalculatorOV",
    "EMBEDDINGS_NODE_RESOURCES:embeddings_servable",
    ("pooling: CLS", "normalize_embeddings: false"),
)
_SCORES = _Calculator("RerankCalculatorOV", "RERANK_NODE_RESOURCES:rerank_servable")


def _write_graph(folder: Path, calculator: _Calculator) -> None:
    """``graph.pbtxt``, by which OpenVINO Model Server serves the folder; paths in it start from where it lies.

    Texts are cut by ``openvino_tokenizer.xml``: the server's own ``truncate`` would go by the number of positions in
    ``config.json``, which is more than some models take.
    """
    lines = [
        'input_stream: "REQUEST_PAYLOAD:input"',
        'output_stream: "RESPONSE_PAYLOAD:output"',
        "node {",
        f'  calculator: "{calculator.name}"',
        f'  input_side_packet: "{calculator.resources}"',
        '  input_stream: "REQUEST_PAYLOAD:input"',
        '  output_stream: "RESPONSE_PAYLOAD:output"',
        "  node_options {",
        f"    [type.googleapis.com/mediapipe.{calculator.name}Options] {{",
        *(f"      {option}" for option in ('models_path: "./"', *calculator.options)),
        "    }",
        "  }",
        "}",
    ]
    with writing(folder):
        (folder / "graph.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_openvino_tokenizer(folder: Path, served: Served) -> bool:
    """``openvino_tokenizer.xml``, and for a model that goes on with texts ``openvino_detokenizer.xml``, which makes
    words of its tokens. Returns whether they could be written."""
    names = ["openvino_tokenizer", *["openvino_detokenizer"] * served.continues]
    were = f"{' and '.join(f'{name}.xml' for name in names)} {'were' if served.continues else 'was'} not written"
    try:
        import openvino
        import openvino_tokenizers
    except ImportError:
        logger.log(
            logging.INFO if served.classifies and not served.pooled else logging.WARNING,  # often called with ids
            "%s: the package openvino-tokenizers is not installed. openvino-genai and OpenVINO Model Server read texts "
            "by what it converts; install it and export again, or pass them token ids.",
            were,
        )
        return False
    given = copy.deepcopy(served.tokenizer)  # a length given to the conversion is written into its tokenizer
    try:
        converted = openvino_tokenizers.convert_tokenizer(given, **_conversion(served))
    except Exception as e:  # the converter raises many kinds; the model itself is written and runs without it
        logger.warning(
            "%s: openvino-tokenizers cannot convert %s (%s).",
            were,
            type(served.tokenizer).__name__,
            " ".join(str(e).split())[:200] or type(e).__name__,
        )
        return False
    with writing(folder):
        for name, one in zip(names, converted if served.continues else [converted], strict=True):
            openvino.save_model(one, folder / f"{name}.xml")
    return True


def _conversion(served: Served) -> dict[str, Any]:
    """How to convert. A text is cut at the longest length, but for one that is gone on with: what is asked stands at
    its end. A model of pairs gets two texts."""
    if served.continues:
        return {"with_detokenizer": True}
    limit = served.longest
    options: dict[str, Any] = {"truncation": limit is not None, "use_max_padding": served.length is not None}
    if limit is not None:
        options["max_length"] = limit
    if served.pairs:
        options["number_of_inputs"] = 2
    return options


def _setting(folder: Path | None, name: str, key: str) -> Any:
    """One value of a JSON file in the model's folder; None where there is none."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8")).get(key) if folder is not None else None
    except (OSError, ValueError, AttributeError):
        return None


def _dump(data: Any, file: Path) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
