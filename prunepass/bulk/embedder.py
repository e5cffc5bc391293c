"""Texts in, vectors, labels or scores out: an exported folder on all cores it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.bulk.batches import Batch, batches
from prunepass.bulk.cores import cores
from prunepass.bulk.encoding import Encoded, Encoder, Text, read_json
from prunepass.bulk.engines import LEVEL, PRECISIONS, Settings, open_engine
from prunepass.errors import DataError, ExportError, MissingExtraError, OptionError, PruneError, option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prunepass.bulk.engines import Array

__all__ = ["TOKENS", "Attempt", "Embedder"]

#: in a batch: enough to use a core, little enough for its caches
TOKENS = 2048
#: texts that are sorted together
WINDOW = 1024
#: of a folder of several plans
LEVELS_FILE = "levels.json"
#: of that file, as `prunepass.export.manifest` writes it
LEVELS_FORMAT = ("prunepass-levels", 1)
VECTOR, LOGITS = "sentence_embedding", "logits"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Attempt:
    """What became of some texts.

    Attributes:
        outputs: float32 [n, d]: vectors, or logits; of texts that went wrong, NaN.
        wrong: why, by the number of the text.
        tokens: that the model has read, padding not included.
    """

    outputs: Array
    wrong: Mapping[int, str]
    tokens: int


class Embedder:
    """An exported folder as a function of texts.

    The folder decides what comes out (`kind`): "vector" of one written with ``pooled=True``; "label" of a classifier;
    "score" of a classifier with one label, such as a reranker; "scores" of one whose labels do not exclude each other.

    Texts are sorted by length within a window and cut into batches of about equal numbers of tokens, which run at the
    same time, one on each core. Results come in the order of the texts.

    It can be given to Ray Data as it is: called with a batch of columns it returns them with the results beside them.

    Args:
        folder: that `prunepass.export` wrote, "openvino" or "onnx", with its tokenizer.
        cpus: threads. Default: the cores that this process may use; a container's share of time counts.
        streams: batches that run at a time, each on ``cpus / streams`` threads. Default: as many as ``cpus``.
        tokens: in a batch, padding included.
        window: texts that are sorted together; another so many are read meanwhile.
        max_length: tokens of the longest text, special ones included. Default: what the folder says that it takes.
        truncate: cut longer texts to that; without it they are an error.
        precision: of OpenVINO's arithmetic, "f32", "bf16" or "f16". Default: OpenVINO's own choice, which is bfloat16
            on many CPUs; in "f32" results are those of `prunepass.prune` to 1e-4.
        level: which of the folder's plans, 1 being the first, or 0 for all tokens; for a folder of several. Default: 1.
        column: of texts in a batch of columns, and ``pair`` of their second ones for a model of pairs.
        config: further settings of the runtime.

    Attributes:
        folder: as a path.
        kind: see above.
        width: numbers that come out for a text.
        labels: names of them, of a classifier.
        longest: tokens of the longest text that is taken.
        runtime: "openvino" or "onnxruntime".
        level: the plan that it runs by; None where the folder has one.

    Raises:
        ExportError: the folder is not there, is of a format or version that the runtime does not read, has no
            tokenizer, or puts out what is no vector or label of a text.
        OptionError: an option that cannot be, such as a level that the folder has not.
        MissingExtraError: the runtime, numpy or tokenizers is not installed.
    """

    folder: Path
    kind: str
    width: int
    labels: tuple[str, ...]
    longest: int | None
    runtime: str
    level: int | None

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        cpus: int | None = None,
        streams: int | None = None,
        tokens: int = TOKENS,
        window: int = WINDOW,
        max_length: int | None = None,
        truncate: bool = False,
        precision: str | None = None,
        level: int | None = None,
        column: str = "text",
        pair: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = {"cpus": cpus, "streams": streams, "tokens": tokens, "window": window, "max_length": max_length}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{option(name)} must be a whole number of at least 1, not {value!r}.")
        if precision is not None and precision not in PRECISIONS:
            raise OptionError(f"{option('precision', precision)} is not known; choose one of {', '.join(PRECISIONS)}.")
        try:
            import numpy
        except ImportError:
            raise MissingExtraError("numpy", "bulk", "Embedder") from None
        self._np = numpy
        if not isinstance(folder, (str, os.PathLike)):
            raise OptionError(f"The folder must be a path, not {_kind_of(folder).removeprefix('of type ')}.")
        self.folder = Path(folder).expanduser()  # no helper of other rooms: they need torch, and a worker does not
        cpus = cpus or cores()
        self._engine = open_engine(self.folder, Settings(cpus, streams or cpus, precision, config or {}))
        self.runtime = self._engine.name
        self._ports = self._engine.ports
        self.level = self._level(level)
        self._encoder = Encoder(self.folder)
        self._config = read_json(self.folder / "config.json")
        self.kind, self._output = self._kind()
        self.labels = self._labels() if self._output == LOGITS else ()
        self.longest = self._longest(max_length)
        self._encoder.cut(self.longest if truncate else None)
        self._truncates = truncate
        self._tokens, self._window = tokens, window
        self._column, self._pair = column, pair
        self.width = self._probe()

    def _kind(self) -> tuple[str, str]:
        """What comes out for a text, and the output that has it."""
        unknown = [name for name in self._ports.inputs if name not in _INPUTS]
        if unknown:
            raise ExportError(
                f"The model in {self.folder} takes {', '.join(unknown)}, which is not made of a text alone."
            )
        ranks = self._ports.outputs
        if VECTOR in ranks:
            return "vector", VECTOR
        if ranks.get(LOGITS) == 2:
            count = len(self._config.get("id2label") or ())
            several = self._config.get("problem_type") == "multi_label_classification"
            return "score" if count == 1 else "scores" if several else "label", LOGITS
        if "last_hidden_state" in ranks:
            raise ExportError(
                f"The model in {self.folder} puts out states of tokens, and no vector of a text. Export it again with "
                f"{option('pooled', True)}."
            )
        raise ExportError(
            f"The model in {self.folder} puts out {', '.join(ranks)}. Texts are run through encoders that were "
            f"exported with {option('pooled', True)}, and through classifiers and rerankers."
        )

    def _level(self, wanted: int | None) -> int | None:
        """The level to run at, of those in the folder's list. Raises `OptionError` where there is no such level."""
        if not self._ports.levels:
            if wanted is not None:
                raise OptionError(
                    f"{option('level', wanted)} is for a folder of several plans, and {self.folder} has one. Export it "
                    "again with a list of plans."
                )
            return None
        if not (self.folder / LEVELS_FILE).is_file():
            raise ExportError(
                f"The model in {self.folder} takes a level, but there is no {LEVELS_FILE}. Export it again."
            )
        said = read_json(self.folder / LEVELS_FILE)
        if (said.get("format"), said.get("version")) != LEVELS_FORMAT:
            kind, version = said.get("format"), said.get("version")
            raise ExportError(
                f"{self.folder / LEVELS_FILE} is of format {kind!r}, version {version!r}; this prunepass reads "
                f"{LEVELS_FORMAT[0]!r}, version {LEVELS_FORMAT[1]}. Update it, or export the folder again."
            )
        known = [entry.get("level") for entry in said.get("levels", ())]
        number = said.get("default", 1) if wanted is None else wanted
        if isinstance(number, bool) or number not in known:
            raise OptionError(
                f"{self.folder} has no {option('level', number)}; it has {', '.join(map(str, known)) or 'none'} "
                f"({LEVELS_FILE} says which plan each is)."
            )
        return int(number)

    def _labels(self) -> tuple[str, ...]:
        names = self._config.get("id2label")
        if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
            raise ExportError(f"{self.folder / 'config.json'} does not name the labels (id2label). Export it again.")
        return tuple(str(names[str(i)]) for i in range(len(names)))

    def _longest(self, wanted: int | None) -> int | None:
        limits = [self._encoder.longest, self._ports.longest]
        longest = min((limit for limit in limits if limit is not None), default=None)
        if wanted is not None and self._ports.longest is not None and wanted > self._ports.longest:
            raise OptionError(
                f"{option('max_length', wanted)} is more than the {self._ports.longest} tokens that the model in "
                f"{self.folder} takes."
            )
        return wanted or longest

    def _probe(self) -> int:
        """Run one short text: what cannot run at all says so now."""
        (text,) = self._encoder([("a", "a") if self.pairs else "a"])
        width = self._ports.length or len(text.ids)
        found = self._engine.one(self._output, self._feed(Batch([0], [text], width, self._ports.batch or 1)))
        count = int(self._rows(found).shape[1])
        if self.labels and count != len(self.labels):
            raise ExportError(
                f"The model in {self.folder} puts out {count} numbers a text, and config.json names "
                f"{len(self.labels)} labels. Export it again."
            )
        return count

    @property
    def pairs(self) -> bool:
        """Whether it reads two texts at a time, as a reranker does: a query and a document."""
        return self.kind == "score"

    def __call__(self, texts: Any, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """Results of texts, in their order.

        Args:
            texts: a sequence of n texts, or of pairs of texts; or a batch of columns, such as Ray Data's.
            on_progress: is told of each batch how many texts and tokens it had.

        Returns:
            float32 [n, width] of vectors; an array [n] of the labels' names; float32 [n] of scores, which are the
            model's own number (a logit); or float32 [n, width] of scores between 0 and 1, one for each label. Of a
            batch of columns the batch, with columns named as `columns` has them.

        Raises:
            DataError: something is no text, or has too many tokens; the message says which.
            PruneError: the runtime fails.
        """
        if isinstance(texts, Mapping):
            names = [name for name in (self._column, self._pair) if name is not None]
            for name in names:
                if name not in texts:
                    raise DataError(f"There is no column {name!r}; there are {', '.join(map(repr, texts))}.")
            given = [texts[name] for name in names]
            rows = list(given[0]) if len(given) == 1 else list(zip(*given, strict=True))
            return {**texts, **self.columns(self._all(rows, on_progress))}
        if isinstance(texts, str):
            raise OptionError("Texts are given as a list, such as ['one text']; this is a single one.")
        found = self.columns(self._all(list(texts), on_progress))
        return next(iter(found.values()))

    def _all(self, texts: Sequence[Any], on_progress: Callable[[int, int], None] | None) -> Array:
        attempt = self.attempt(texts, on_progress)
        for number, reason in sorted(attempt.wrong.items()):
            raise DataError(f"Text {number} {reason}.")
        return attempt.outputs

    def columns(self, outputs: Array) -> dict[str, NDArray[Any]]:
        """Named results of a model's outputs [n, width].

        Returns:
            ``vector``; ``score``; ``scores``; or ``label`` and ``scores``, which are probabilities.
        """
        np = self._np
        if self.kind == "vector":
            return {"vector": outputs}
        if self.kind == "score":
            return {"score": outputs[:, 0]}
        if self.kind == "scores":
            return {"scores": (0.5 * (1 + np.tanh(0.5 * outputs))).astype(np.float32)}
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True, initial=-np.inf))
        names = np.array(self.labels, dtype=object)
        picked = np.nan_to_num(outputs, nan=-np.inf).argmax(axis=1) if len(outputs) else np.zeros(0, np.int64)
        return {"label": names[picked], "scores": (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)}

    def attempt(self, texts: Sequence[Any], on_progress: Callable[[int, int], None] | None = None) -> Attempt:
        """As a call with texts, but what goes wrong with one of them is told of and no error.

        Raises:
            PruneError: the runtime fails with a text that has run before.
        """
        np = self._np
        outputs: Array = np.full((len(texts), self.width), np.nan, np.float32)
        wrong: dict[int, str] = {}
        done: set[int] = set()
        tokens = 0

        def take(batch: Batch, found: Array) -> None:
            nonlocal tokens
            numbers = list(batch.numbers)
            outputs[numbers] = self._rows(found)[: len(numbers)]
            done.update(numbers)
            count = sum(len(text.ids) for text in batch.texts)
            tokens += count
            if on_progress is not None:
                on_progress(len(numbers), count)

        missed: list[tuple[int, Encoded]] = []

        def cut(pairs: list[tuple[int, Encoded]]) -> Iterator[Batch]:
            missed.extend(pairs)
            ports = self._ports
            return batches(pairs, self._tokens, longest=ports.longest, length=ports.length, rows=ports.batch)

        encoded = self._encoded(texts, wrong)
        self._engine.run(self._output, (batch for window in encoded for batch in cut(window)), self._feed, take)
        for number, text in missed:
            if number not in done:
                self._one_by_one(number, text, take, wrong)
        for number in np.flatnonzero(~np.isfinite(outputs).all(axis=1)).tolist():
            wrong.setdefault(number, "has a result with numbers that are not finite")
        return Attempt(outputs, wrong, tokens)

    def _one_by_one(
        self, number: int, text: Encoded, take: Callable[[Batch, Array], None], wrong: dict[int, str]
    ) -> None:
        (batch,) = batches([(number, text)], 1, length=self._ports.length, rows=self._ports.batch)
        try:
            take(batch, self._engine.one(self._output, self._feed(batch)))
        except PruneError as e:
            self._probe()  # raises where it is not the text's fault
            wrong[number] = f"fails in the model: {str(e).rstrip('.')}"

    def _encoded(self, texts: Sequence[Any], wrong: dict[int, str]) -> Iterator[list[tuple[int, Encoded]]]:
        """Windows of encoded texts with their numbers; the next one is made while one is run."""

        def encode(start: int) -> list[tuple[int, Encoded]]:
            fine: list[tuple[int, Text]] = []
            for number in range(start, min(start + self._window, len(texts))):
                reason = self._fault(texts[number])
                if reason is None:
                    fine.append((number, texts[number]))
                else:
                    wrong[number] = reason
            found = []
            for (number, _), text in zip(fine, self._encoder([text for _, text in fine]), strict=True):
                if self.longest is not None and len(text.ids) > self.longest:
                    wrong[number] = f"has {len(text.ids)} tokens, and the longest that is taken has {self.longest}"
                else:
                    found.append((number, text))
            return found

        starts = range(0, len(texts), self._window)
        with ThreadPoolExecutor(1, "prunepass-encode") as pool:
            ahead = pool.submit(encode, 0) if texts else None
            for start in starts:
                assert ahead is not None
                window = ahead.result()
                ahead = pool.submit(encode, start + self._window)  # past the end it is an empty one
                yield window

    def _fault(self, text: Any) -> str | None:
        """Why something is no text for this model."""
        if self.pairs:
            if not isinstance(text, (tuple, list)) or len(text) != 2:
                return f"is no pair of texts, which a model of pairs takes, but {_kind_of(text)}"
            return next((reason for one in text if (reason := _fault_of(one)) is not None), None)
        return _fault_of(text)

    def _feed(self, batch: Batch) -> dict[str, NDArray[np.int64]]:
        np = self._np
        shape = (batch.rows, batch.width)
        ids = np.full(shape, self._encoder.pad, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row in range(batch.rows):
            text = batch.texts[min(row, len(batch.texts) - 1)]  # a fixed batch is filled with its last text
            place = slice(-len(text.ids), None) if self._encoder.pads_left else slice(0, len(text.ids))
            ids[row, place] = text.ids
            mask[row, place] = 1
            types[row, place] = text.types
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if "position_ids" in self._ports.inputs:
            made["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        feed = {name: made[name] for name in self._ports.inputs}
        return feed if self.level is None else {**feed, LEVEL: np.array([self.level], np.int64)}

    def _rows(self, found: Array) -> Array:
        """[rows, width], of [rows, 1, width] as well."""
        return self._np.asarray(found, self._np.float32).reshape(found.shape[0], found.shape[-1])


def _fault_of(text: Any) -> str | None:
    if text is None:
        return "is null"
    if not isinstance(text, str):
        return f"is no text but {_kind_of(text)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode"
    return None


def _kind_of(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
