"""A small Llama (RoPE, grouped queries) trained on real text with recall mixed in: something real to prune."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.decoder.recall import Recall
from benchmarks.decoder.texts import CORPORA, read_corpus
from benchmarks.training import arguments, bf16_pays
from prunepass.training.data.metrics import IGNORED

log = logging.getLogger(__name__)

BEGIN, END = "<s>", "</s>"
#: 1 would make weights the same that start alike
_ALIKE = 0.7
_DECAY = 0.05


@dataclass(frozen=True)
class Recipe:
    """Size of the model, and how it is trained.

    Attributes:
        lengths: tokens a row, each for an equal share of the steps: recall is learned many times faster on short rows.
        batch: tokens a step; a multiple of the lengths.
        repeats, statements, needles: shares of the rows that are words again and again, statements alone, and
            statements within text; the rest is text.
    """

    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    vocab: int = 2048
    steps: int = 3600
    batch: int = 2048
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    repeats: float = 0.2
    statements: float = 0.25
    needles: float = 0.3
    learning_rate: float = 2e-3
    warmup: float = 0.04
    seed: int = 0

    @property
    def config(self) -> LlamaConfig:
        """The model's shape; the feed-forward part is 8/3 as wide as the stream, in whole 32s."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.width * 8 // 3 // 32 * 32,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2 * self.lengths[-1],
            tie_word_embeddings=True,
            initializer_range=self.width**-0.5,
            attention_bias=True,  # places are told apart by it before words are
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )


class Mixture(Dataset[dict[str, Tensor]]):
    """One batch of rows an item, made from its number alone: short ones first.

    Args:
        text: ids of all training texts in one.
    """

    def __init__(self, recipe: Recipe, text: Sequence[int], recall: Recall) -> None:
        self._recipe, self._text, self._recall = recipe, text, recall

    def __len__(self) -> int:
        return self._recipe.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe = self._recipe
        rng = random.Random(recipe.seed * 1_000_003 + step)
        length = recipe.lengths[step * len(recipe.lengths) // recipe.steps]
        rows = [self._row(rng, length) for _ in range(recipe.batch // length)]
        ids, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
        return {"input_ids": ids, "labels": labels}

    def _row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        recipe, recall = self._recipe, self._recall
        kind = rng.random()
        if kind < recipe.repeats:
            return recall.repeated_row(rng, length)
        if kind < recipe.repeats + recipe.statements:
            return recall.dense_row(rng, length)
        if kind < recipe.repeats + recipe.statements + recipe.needles:
            return recall.needle_row(rng, length, self._window(rng, length))
        text = self._window(rng, length)
        return text, list(text)

    def _window(self, rng: random.Random, length: int) -> list[int]:
        start = rng.randrange(len(self._text) - length)
        return list(self._text[start : start + length])

    @torch.no_grad()
    def figures(self, model: Any, rows: int = 8) -> dict[str, float]:
        """Share of right answers in rows of each kind, as long as the longest, which are not trained on."""
        rng = random.Random(-1 - self._recipe.seed)
        length, training = self._recipe.lengths[-1], model.training
        made = {
            "repeats": [self._recall.repeated_row(rng, length) for _ in range(rows)],
            "statements": [self._recall.dense_row(rng, length) for _ in range(rows)],
            "needles": [self._recall.needle_row(rng, length, self._window(rng, length)) for _ in range(rows)],
        }
        model.eval()
        found = {kind: _right(model, rows_of_kind) for kind, rows_of_kind in made.items()}
        model.train(training)
        return found


def pretrain(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train, and write the model, its tokenizer and ``pretraining.json`` (recipe and curves) into ``folder``.

    Takes the GPU where there is one. On the CPU it computes in bfloat16, too.
    """
    transformers.set_seed(recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(chain.from_iterable(read_corpus(name).train for name in CORPORA))
    tokenizer = train_tokenizer(texts, recipe.vocab)
    ids = tokenizer(f" {END} ".join(texts), add_special_tokens=False).input_ids
    mixture = Mixture(recipe, ids, Recall.of(tokenizer))
    model = LlamaForCausalLM(recipe.config)
    look_for_alike(model)
    log.info("%d weights, %d tokens of text", model.num_parameters(), len(ids))
    curve = _Curve(mixture)
    trainer = transformers.Trainer(
        model,
        _arguments(recipe, folder),
        train_dataset=mixture,
        data_collator=_only,
        callbacks=[curve],
        optimizers=(Optimizers.of(model, recipe.learning_rate), None),
    )
    started = time.perf_counter()
    trainer.train()
    record = {
        "recipe": asdict(recipe),
        "weights": model.num_parameters(),
        "seconds": round(time.perf_counter() - started),
        "device": str(trainer.args.device),
        "curve": curve.points,
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


@torch.no_grad()
def look_for_alike(model: LlamaForCausalLM) -> None:
    """Keys start close to the queries of their group, and what heads write close to the transposed of what they read: a
    token attends to those like it and takes on what they are, from which recall is learned in a fraction of the steps.
    After Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023)."""
    config: Any = model.config
    groups, size = config.num_key_value_heads, config.head_dim
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        query = attention.q_proj.weight.unflatten(0, (groups, -1, size))
        attention.k_proj.weight.lerp_(query[:, 0].flatten(0, 1), _ALIKE)
        value = attention.v_proj.weight.unflatten(0, (groups, 1, size)).expand(-1, query.shape[1], -1, -1)
        attention.o_proj.weight.lerp_(value.flatten(0, 2).t(), _ALIKE)


class Optimizers(torch.optim.Optimizer):
    """Several as one, each for parameters of its own.

    Args:
        parts: whose groups of parameters are this one's, too, for the schedule.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups, self._parts = groups, parts

    @classmethod
    def of(cls, model: LlamaForCausalLM, learning_rate: float) -> Optimizers:
        """Muon for the blocks' matrices, which learns associations in fewer steps, and AdamW for all else."""
        matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
        ours = set(map(id, matrices))
        others = [p for p in model.parameters() if id(p) not in ours]
        options: Any = {"lr": learning_rate, "weight_decay": _DECAY}
        muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        return cls([muon, torch.optim.AdamW(others, **options)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Of all of them; a closure is not taken."""
        for part in self._parts:
            part.step()


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte pairs, as many as ``vocab`` allows, learned from ``texts``."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, eos_token=END, pad_token=END)


def _right(model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    """Share of the labels that the model predicts."""
    ids, labels = (torch.tensor(part, device=model.device) for part in zip(*rows, strict=True))
    asked = labels[:, 1:] != IGNORED
    found = model(input_ids=ids).logits[:, :-1].argmax(-1)
    return round(float((found == labels[:, 1:])[asked].float().mean()), 4)


class _Curve(transformers.TrainerCallback):
    """What the model recalls on the way."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.points: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds a point: the training loss, and the shares of right answers."""
        if "loss" not in (logs := kwargs["logs"]):
            return
        point = {"step": state.global_step, "loss": round(float(logs["loss"]), 4)}
        self.points.append(point | self._mixture.figures(kwargs["model"]))
        log.info("%s", self.points[-1])


def _arguments(recipe: Recipe, folder: Path) -> transformers.TrainingArguments:
    steps = {"max_steps": recipe.steps, "warmup_steps": recipe.warmup, "seed": recipe.seed}
    rate = {"learning_rate": recipe.learning_rate, "lr_scheduler_type": "cosine", "bf16": bf16_pays()}
    order = {"train_sampling_strategy": "sequential"}
    return arguments(folder, batch=1, log_every=recipe.steps // 40, **steps, **rate, **order)


def _only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """An item of `Mixture` is a batch already."""
    (batch,) = items
    return batch
