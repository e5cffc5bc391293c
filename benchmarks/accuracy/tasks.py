"""The tasks: data, encoding, dense model and metric of each, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import metrics
from benchmarks.accuracy.data import SOURCES, Example
from benchmarks.accuracy.features import Features, Kind, encode
from benchmarks.accuracy.metrics import Array, Metric
from benchmarks.decoder.gemma import NAME as GEMMA
from benchmarks.places import data_folder
from prunepass.errors import OptionError

#: all-MiniLM-L6-v2, an encoder of six layers
MINILM = "minilm"
HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "reranking": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
}
NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)
ENTITY_TAGS = ("O", *(f"{mark}-{kind}" for kind in ("LOC", "MISC", "ORG", "PER") for mark in "BI"))


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        kind: what the head predicts.
        score: the metric; see `metrics`.
        headline: the metric's figure that tables show.
        max_length: tokens of a row at most.
        long_text: whether most texts have over a hundred tokens, so that there is much to prune.
        labels: names of the classes or tags, in the order of the logits.
        test_every: only every so many test examples are measured unless asked otherwise.
        model_of: name of the task whose dense model is this one's, too; its own where left out.
        base: the pretrained model under its head: `MINILM`, or Gemma 3 270M as `benchmarks.decoder.gemma` calls it.
    """

    name: str
    kind: Kind
    score: Metric
    headline: str
    max_length: int
    long_text: bool = False
    labels: tuple[str, ...] = ()
    test_every: int = 1
    model_of: str | None = None
    base: str = MINILM

    def train(self) -> list[Example]:
        """Shuffled with a fixed seed; nothing of what is held out or tested on is among them."""
        return SOURCES[self.name].train(data_folder())

    def test(self, every: int | None = None) -> list[Example]:
        """What figures are reported on; every ``every``-th of the file (default: `test_every`)."""
        return SOURCES[self.name].test(data_folder(), every or self.test_every)

    def validation(self) -> list[Example]:
        """What choices are made by: no row of it is trained on or tested on."""
        return SOURCES[self.name].validation(data_folder())

    def features(self, examples: Sequence[Example], tokenizer: Any, *, cut: int | None = None) -> Features:
        """Rows for a data collator, with labels; each cut to ``cut`` tokens, where given. See `features.encode`."""
        return encode(self.kind, examples, tokenizer, self.max_length, cut=cut, tags=self.labels)

    def metric(self, outputs: Sequence[Array], features: Features) -> dict[str, float]:
        """The task's figures, the `headline` among them, of one output a row (see `metrics` and `predict`)."""
        return self.score(outputs, features)

    def collator(self, tokenizer: Any) -> Any:
        """Pads rows, and labels of tokens, to the longest of a batch."""
        import transformers

        if self.kind == "token-classification":
            return transformers.DataCollatorForTokenClassification(tokenizer)
        return transformers.DataCollatorWithPadding(tokenizer)

    def build_dense(self, base: str | Path) -> Any:
        """The model to be pruned, in evaluation mode: ``base`` under this task's head.

        A head that ``base`` lacks is drawn at random (seed it). Dropout is off: pruning is what is studied, and
        attention with dropout takes several times as long on a CPU.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(base)
        if self.base == MINILM:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        else:
            config.use_cache = False
        if self.kind in ("classification", "token-classification"):
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: i for i, label in enumerate(self.labels)}
        if self.kind == "regression":
            config.num_labels, config.problem_type = 1, "regression"
        if self.kind == "reranking":
            config.num_labels, config.problem_type = 1, "multi_label_classification"
        head = getattr(transformers, HEADS[self.kind])
        model = head.from_pretrained(base, config=config, dtype="float32", use_safetensors=True).eval()
        if self.base != MINILM:  # a table of 262,144 words, of which a task's texts hold few
            model.get_input_embeddings().requires_grad_(False)
        return model


_classes = partial(Task, kind="classification", score=metrics.accuracy, headline="accuracy")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _classes("20newsgroups", max_length=512, long_text=True, labels=NEWSGROUPS, test_every=8),
        _classes("sst2", max_length=128, labels=("negative", "positive")),
        _classes("mrpc", max_length=128, labels=("different", "paraphrase"), score=metrics.accuracy_and_f1),
        Task("stsb", "regression", metrics.spearman, "spearman", max_length=128),
        _classes("rte", max_length=256, labels=("entailment", "not_entailment")),
        Task("squad", "question-answering", metrics.answer_f1, "f1", max_length=384, long_text=True, test_every=8),
        Task(
            "conll2003",
            "token-classification",
            partial(metrics.entity_f1, tags=ENTITY_TAGS),
            "f1",
            max_length=512,
            long_text=True,
            labels=ENTITY_TAGS,
        ),
        Task("cranfield", "embedding", metrics.ndcg_at_10, "ndcg@10", max_length=512, long_text=True),
        Task("stsb-embedding", "embedding", metrics.cosine_spearman, "spearman", max_length=128),
        Task("reranking", "reranking", metrics.rank_at_10, "mrr@10", max_length=384, long_text=True),
        Task(
            "reranking-cranfield",
            "reranking",
            metrics.rank_at_10,
            "ndcg@10",
            max_length=512,
            long_text=True,
            model_of="reranking",
        ),
        _classes("sst2-gemma", max_length=128, labels=("negative", "positive"), base=GEMMA),
    )
}


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in TASKS:
        raise OptionError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    return TASKS[name]
