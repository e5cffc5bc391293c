#!/usr/bin/env bash
# Converting a tokenizer of transformers with a length for OpenVINO changes the tokenizer that was given.
#
# Guess: convert_tokenizer(tokenizer, max_length=8) reads the tokenizer and gives a model that cuts at 8 tokens; the tokenizer
# itself cuts where it did before.
#
# What happens: its limit is 8 from then on, in Python too:
#   before: limit 64, tokens of a long text 64
#   after: limit 8, tokens of a long text 8
# A program that exports a tokenizer and goes on to use it cuts its texts short, with no error.
#
# Seen with: openvino-tokenizers 2026.4.1.0, openvino 2026.4.1, transformers 5.23.0, tokenizers 0.23.3, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

from openvino_tokenizers import convert_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "word": 2}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
)


def seen(when):
    count = len(tokenizer("word " * 100, truncation=True)["input_ids"])
    print(f"{when}: limit {tokenizer.model_max_length}, tokens of a long text {count}")
    return tokenizer.model_max_length, count


before = seen("before")
convert_tokenizer(tokenizer, max_length=8)
after = seen("after")
if (before, after) != ((64, 64), (8, 8)):
    sys.exit("Changed: the tokenizer that was given keeps its limit")
PY
