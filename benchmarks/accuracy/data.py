"""Public data sets as plain examples: one function a file format, and which file is trained, held out and tested on.

An example is a dict of plain Python values. Its keys, by the kind of task:

* a text or a pair: ``text``, and where there is one ``second``; ``label`` (class index, or a float);
* tokens to be tagged: ``sentences`` and ``tags``, a list of words and of tag names for each sentence of a document;
* a question: ``question``, ``context``, ``answers`` (texts) and ``starts`` (where in the context each begins);
* a text to be embedded: ``text``; what else it carries is the metric's business.
"""

from __future__ import annotations

import csv
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.accuracy.candidates import cranfield_pairs, squad_pairs
from prunepass.errors import OptionError

Example = dict[str, Any]


def read_columns(file: Path, columns: dict[str, int], *, header: bool = True, lowest: int = 0) -> list[Example]:
    """Rows of a tab-separated UTF-8 file without quoting (a quotation mark is text).

    Args:
        columns: ``{key of the example: index of the column}``; further columns are dropped.
        header: the first line names the columns and is skipped.
        lowest: rows with fewer columns than this are refused even where no key needs them.

    Raises:
        OptionError: the file is missing or empty, or a row has too few columns.
    """
    needed = max(lowest, *(index + 1 for index in columns.values()))
    examples = []
    with _open(file) as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if header and number == 1:
                continue
            if len(row) < needed:
                raise OptionError(f"{file}, line {number}: {len(row)} columns, but at least {needed} are needed.")
            examples.append({key: row[index].strip() for key, index in columns.items()})
    return _not_empty(examples, file)


def read_newsgroups(file: Path, split: str) -> list[Example]:
    """Posts of 20 Newsgroups "bydate", raw, in the order of their group and number.

    Args:
        file: tar archive of ``20news-bydate-<split>/<group>/<number>``.
        split: "train" or "test".

    Returns:
        ``text`` (decoded as Latin-1, which takes any byte), ``label`` (index of the group in alphabetical order) and
        ``group``.
    """
    posts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, data in _members(file):
        folder, _, rest = name.partition("/")
        if folder == f"20news-bydate-{split}" and "/" in rest:
            group, number = rest.split("/")
            posts[group].append((int(number), data.decode("latin-1")))
    examples = [
        {"text": text, "label": label, "group": group}
        for label, group in enumerate(sorted(posts))
        for _, text in sorted(posts[group])
    ]
    return _not_empty(examples, file)


def read_squad(files: Sequence[Path]) -> list[Example]:
    """Questions of SQuAD v1.1 files, in their order.

    Returns:
        ``id``, ``article`` (its title), ``question``, ``context``, ``answers`` and ``starts`` (character offsets into
        ``context``).
    """
    return [example for file in files for example in _not_empty(list(_questions(file)), file)]


def read_tagged_documents(file: Path) -> list[Example]:
    """Documents of a CoNLL-2003 file: a word a line with its tag last, blank lines between sentences.

    A document begins at each ``-DOCSTART-`` line, or at a header line (``-TOKEN- ...``) in its place.

    Returns:
        ``sentences`` and ``tags``: a list of words, and of tags, for each sentence of each document.
    """
    documents: list[Example] = []
    with _open(file) as lines:
        for fields in _starting_new(line.split() for line in lines):
            if fields is None:
                documents.append({"sentences": [], "tags": []})
            elif fields:
                words, tags = zip(*fields, strict=True)
                documents[-1]["sentences"].append(list(words))
                documents[-1]["tags"].append(list(tags))
    return _not_empty([document for document in documents if document["sentences"]], file)


def read_cranfield(file: Path) -> list[Example]:
    """Documents, then queries, of the Cranfield collection.

    Judgements are read as binary: the collection's codes 1 ("complete answer") to 4 ("minimum interest") are relevant;
    its one -1 a query, which it doesn't explain, and an empty code are not.

    Args:
        file: tar archive with ``DOCS/<n>.txt``, ``REL/<query>.txt`` ("query document<tab>code") and ``query.txt``.

    Returns:
        ``text`` and ``document`` (its number), or ``text`` and ``relevant`` (the documents' numbers, ascending).
    """
    files = {name.partition("/")[2]: data.decode("utf-8") for name, data in _members(file)}
    if "query.txt" not in files:
        raise OptionError(f"{file}: there is no query.txt in its top folder.")
    numbers = sorted(int(Path(name).stem) for name in files if name.startswith("DOCS/"))
    documents = [{"text": files[f"DOCS/{number}.txt"].strip(), "document": number} for number in numbers]
    queries = []
    for line in files["query.txt"].splitlines():
        number, _, text = line.partition("\t")
        queries.append({"text": text.strip(), "relevant": _relevant(files[f"REL/{number}.txt"])})
    return _not_empty([*documents, *queries], file)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _relevant(judgements: str) -> list[int]:
    pairs = (line.partition("\t") for line in judgements.splitlines() if line.strip())
    return sorted({int(head.split()[1]) for head, _, code in pairs if code.strip() and int(code) > 0})


def _questions(file: Path) -> Iterator[Example]:
    with _open(file) as text:
        articles = json.load(text)["data"]
    for title, paragraph in ((article["title"], p) for article in articles for p in article["paragraphs"]):
        for question in paragraph["qas"]:
            yield {
                "id": question["id"],
                "article": title,
                "question": question["question"].strip(),
                "context": paragraph["context"],
                "answers": [answer["text"] for answer in question["answers"]],
                "starts": [answer["answer_start"] for answer in question["answers"]],
            }


def _starting_new(rows: Iterable[list[str]]) -> Iterator[list[tuple[str, str]] | None]:
    """None where a document begins, and the (word, tag) pairs of each sentence."""
    sentence: list[tuple[str, str]] = []
    for row in rows:
        starts = bool(row) and row[0] in {"-DOCSTART-", "-TOKEN-"}
        if (starts or not row) and sentence:
            yield sentence
            sentence = []
        if starts:
            yield None
        elif row:
            sentence.append((row[0], row[-1]))
    yield sentence


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    if not file.is_file():
        raise OptionError(f"There is no file {file}.")
    with tarfile.open(file) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield member.name.removeprefix("./"), content.read()


def _open(file: Path) -> TextIO:
    if not file.is_file():
        raise OptionError(f"There is no file {file}.")
    return file.open(encoding="utf-8-sig", newline="")  # MRPC begins with a byte order mark


def _not_empty(examples: list[Example], file: Path) -> list[Example]:
    if not examples:
        raise OptionError(f"{file} holds no examples.")
    return examples


# -- splits ----------------------------------------------------------------------------------------------------------

Reader = Callable[[Path], list[Example]]

#: seed of every shuffle below: the splits are the same for all models and all runs
SEED = 0


@dataclass(frozen=True)
class Source:
    """A data set's splits, read from the folder of data sets. No split shares an example with another.

    Attributes:
        training: reads the examples to train on (and to hold out from).
        testing: reads the examples that figures are reported on.
        development: reads a file of its own to calibrate on, where the data set has one that isn't tested on.
        held_out: examples for calibration, at least.
        group: key of an example; those with the same value are held out together.
        testing_unit: key of an example; `every` counts within those with the same value.
    """

    training: Reader
    testing: Reader
    development: Reader | None = None
    held_out: int = 512
    group: str | None = None
    testing_unit: str | None = None

    def train(self, folder: Path) -> list[Example]:
        """Shuffled; without what `calibration` holds out."""
        return self._split(folder)[0]

    def calibration(self, folder: Path) -> list[Example]:
        """Shuffled; from the development file or the training file, never from what is tested."""
        return self._split(folder)[1]

    def validation(self, folder: Path) -> list[Example]:
        """Shuffled: the whole development file, or what `calibration` gives."""
        return self.calibration(folder) if self.development is None else self._shuffled(self.development(folder))

    def test(self, folder: Path, every: int = 1) -> list[Example]:
        """Every ``every``-th example (of each unit), in the file's order, from the first."""
        kept, seen = [], dict[Any, int]()
        for example in self.testing(folder):
            unit = example[self.testing_unit] if self.testing_unit else None
            if seen.setdefault(unit, 0) % every == 0:
                kept.append(example)
            seen[unit] += 1
        return kept

    def _split(self, folder: Path) -> tuple[list[Example], list[Example]]:
        if self.development is not None:
            held_out = self._shuffled(self.development(folder))
            return self._shuffled(self.training(folder)), held_out[: self.held_out]
        examples = self._shuffled(self.training(folder))
        at = max(len(examples) - self.held_out, 0)
        while self.group and 0 < at < len(examples) and examples[at][self.group] == examples[at - 1][self.group]:
            at -= 1
        return examples[:at], examples[at:]

    def _shuffled(self, examples: list[Example]) -> list[Example]:
        """In a random order of the groups."""
        groups: dict[Any, list[Example]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(example[self.group] if self.group else i, []).append(example)
        order = list(groups.values())
        random.Random(SEED).shuffle(order)
        return [example for group in order for example in group]


# -- what each reads -------------------------------------------------------------------------------------------------


def _newsgroups(split: str) -> Reader:
    return lambda folder: read_newsgroups(folder / "20newsgroups_bydate" / "20news-bydate.tar.xz", split)


def _sst2(file: str, shortest: int = 0) -> Reader:
    """Sentences of so many words at least: the training file breaks most of its own into phrases, the others do not."""
    columns = {"text": 0, "label": 1}

    def read(folder: Path) -> list[Example]:
        rows = _labelled(read_columns(folder / "glue_sst2" / file, columns), ("0", "1"))
        return [row for row in rows if len(row["text"].split()) >= shortest]

    return read


def _mrpc(split: str) -> Reader:
    columns = {"text": 3, "second": 4, "label": 0}
    file = f"msr_paraphrase_{split}.txt"
    return lambda folder: _labelled(read_columns(folder / "mrpc" / file, columns), ("0", "1"))


def _rte(*files: str) -> Reader:
    columns = {"text": 1, "second": 2, "label": 3}

    def read(folder: Path) -> list[Example]:
        rows = [row for file in files for row in read_columns(folder / "rte_resplit" / file, columns)]
        return _labelled(rows, ("entailment", "not_entailment"))

    return read


def _stsb(file: str) -> Reader:
    columns = {"label": 4, "text": 5, "second": 6}

    def read(folder: Path) -> list[Example]:
        rows = read_columns(folder / "stsb" / file, columns, header=False)
        return [{**row, "label": float(row["label"])} for row in rows]

    return read


def _stsb_texts(file: str) -> Reader:
    """Both sentences of each pair, one after the other, as texts of their own; the first carries the score."""

    def read(folder: Path) -> list[Example]:
        texts = []
        for pair in _stsb(file)(folder):
            key = (pair["text"], pair["second"])
            texts += [
                {"text": pair["text"], "score": pair["label"], "pair": key},
                {"text": pair["second"], "pair": key},
            ]
        return texts

    return read


def _squad(*files: str) -> Reader:
    return lambda folder: read_squad([folder / "squad_v1.1" / file for file in files])


def _squad_pairs(*files: str, **how: Any) -> Reader:
    return lambda folder: squad_pairs(_squad(*files)(folder), **how)


def _cranfield_pairs(folder: Path) -> list[Example]:
    return cranfield_pairs(_cranfield(folder), candidates=20)


def _conll(file: str) -> Reader:
    return lambda folder: read_tagged_documents(folder / "conll2003" / file)


def _cranfield(folder: Path) -> list[Example]:
    return read_cranfield(folder / "cranfield" / "cranfield-dataset.tar.xz")


def _running_text(folder: Path) -> list[Example]:
    """Texts without labels, long and short, from training files of other tasks: posts, paragraphs and questions."""
    posts = [example["text"] for example in _newsgroups("train")(folder)[::4]]
    questions = _squad("train-subset-v1.1.json")(folder)
    paragraphs = list(dict.fromkeys(example["context"] for example in questions))
    return [{"text": text} for text in [*posts, *paragraphs, *(example["question"] for example in questions[::8])]]


def _labelled(rows: list[Example], names: tuple[str, ...]) -> list[Example]:
    return [{**row, "label": names.index(row["label"])} for row in rows]


#: by task. RTE is a split by others of GLUE's labelled rows, for GLUE's own test has no labels; its small development
#: file is trained on. Cranfield has no training file, so what is trained for it sees other texts.
SOURCES: dict[str, Source] = {
    "20newsgroups": Source(_newsgroups("train"), _newsgroups("test"), testing_unit="group"),
    **dict.fromkeys(("sst2", "sst2-gemma"), Source(_sst2("train.tsv", shortest=12), _sst2("dev.tsv"))),
    "mrpc": Source(_mrpc("train"), _mrpc("test")),
    "stsb": Source(_stsb("sts-train.tsv"), _stsb("sts-test.tsv"), _stsb("sts-dev.tsv")),
    "rte": Source(_rte("train.tsv", "dev.tsv"), _rte("test.tsv"), held_out=256),
    "squad": Source(
        _squad("train-subset-v1.1.json"), _squad("dev-part1-v1.1.json", "dev-part2-v1.1.json"), group="context"
    ),
    "reranking": Source(
        _squad_pairs("train-subset-v1.1.json", every=3, alike=2, others=1, among=10),
        _squad_pairs("dev-part1-v1.1.json", "dev-part2-v1.1.json", every=50, alike=12, others=3),
        group="query",
    ),
    "reranking-cranfield": Source(
        _squad_pairs("train-subset-v1.1.json", every=3, alike=2, others=1, among=10), _cranfield_pairs, group="query"
    ),
    "conll2003": Source(_conll("train.txt"), _conll("test.txt"), _conll("valid.txt")),
    "cranfield": Source(_running_text, _cranfield),
    "stsb-embedding": Source(
        _stsb_texts("sts-train.tsv"), _stsb_texts("sts-test.tsv"), _stsb_texts("sts-dev.tsv"), group="pair"
    ),
}
