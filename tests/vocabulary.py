"""A real, tiny tokenizer for the models of `zoo`: letters, pieces of words, and a few whole words."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from zoo import PAD, POSITIONS, VOCABULARY, tiny

WORDS = ("the", "cat", "sat", "on", "mat", "good", "bad", "film", "who", "where", "?", ".")
SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
PIECES = [*SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *WORDS]


def tiny_tokenizer(max_length: int = POSITIONS, **options: Any) -> Any:
    """WordPiece over `PIECES`, with [CLS] and [SEP] as BERT has them; ``cats`` is ``cat`` and nothing shorter of it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {piece: i for i, piece in enumerate(PIECES)}
    assert ids["[PAD]"] == PAD
    assert len(ids) <= VOCABULARY
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("unk", "pad", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
        **options,
    )


def save_model(folder: Path, head: str = "sequence", labels: tuple[str, ...] = ("bad", "good"), **options: Any) -> Path:
    """Write a tiny BERT with this head and the tokenizer to ``folder``."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model: Any = tiny("bert", head, dtype=torch.float32, **(names if head in ("sequence", "token") else {}), **options)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
