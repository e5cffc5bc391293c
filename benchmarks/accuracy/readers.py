"""From the files of public data sets to plain examples: one function a file format.

An example is a dict of plain Python values. Its keys, by the kind of task:

* a text or a pair: ``text``, and where there is one ``second``; ``label`` (class index, or a float);
* tokens to be tagged: ``sentences`` and ``tags``, a list of words and of tag names for each sentence of a document;
* a question: ``question``, ``context``, ``answers`` (texts) and ``starts`` (where in the context each begins);
* a text to be embedded: ``text``; what else it carries is the metric's business.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from prunepass.errors import OptionError

__all__ = [
    "Example",
    "read_columns",
    "read_cranfield",
    "read_newsgroups",
    "read_squad",
    "read_tagged_documents",
]

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
        ``id``, ``question``, ``context``, ``answers`` and ``starts`` (character offsets into ``context``).
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
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            yield {
                "id": question["id"],
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
