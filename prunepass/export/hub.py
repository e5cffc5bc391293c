"""A Hugging Face model, its tokenizer and real inputs for it, from one name. Safetensors only; no remote code."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.errors import MissingExtraError, OptionError, PruneError, option
from prunepass.plan.files import PLAN_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Loaded", "load"]

logger = logging.getLogger(__name__)

#: that weights are loaded as
DTYPES = ("float32", "bfloat16", "float16")
#: inputs longer than this are cut, however many positions the model has, unless the caller asks for more
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and the tokenizer that belongs to it.

    Attributes:
        tokenizer: of a model that reads images, its image processor; of one that reads sound, its feature extractor.
        max_length: the most tokens that both of them take.
        num_layers: number of blocks, as the model's configuration has it.
    """

    model: nn.Module
    tokenizer: Any
    max_length: int
    num_layers: int

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """Inputs of the model for ``texts``: int64 tensors [len(texts), longest text], padded on the tokenizer's side.

        Args:
            max_length: longer texts are cut to this many tokens; at most 512 of them where it is not given.

        Raises:
            OptionError: ``max_length`` is more than the model takes.
        """
        wanted = self._limit(max_length)
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=wanted, return_tensors="pt")
        return dict(batch)

    def lengths(self, texts: Sequence[str], *, max_length: int | None = None) -> list[int]:
        """How many tokens `encode` gives each text, padding aside."""
        return [
            len(ids)
            for ids in self.tokenizer(list(texts), truncation=True, max_length=self._limit(max_length))["input_ids"]
        ]

    def _limit(self, max_length: int | None) -> int:
        wanted = max_length or min(self.max_length, DEFAULT_MAX_LENGTH)
        if wanted > self.max_length:
            raise OptionError(
                f"The model takes at most {self.max_length} tokens; {option('max_length')} asks for {wanted}."
            )
        return wanted

    def batches(self, texts: Sequence[str], *, rows: int = 1, length: int | None = None) -> list[dict[str, Tensor]]:
        """Inputs of ``rows`` texts each: int64 tensors [rows, longest text], or [rows, length]. Surplus texts are left
        out, unless there are too few for one batch; then they are repeated."""
        wanted = length or min(self.max_length, DEFAULT_MAX_LENGTH)
        padding = True if length is None else "max_length"
        enough = [*texts, *itertools.islice(itertools.cycle(texts), max(0, rows - len(texts)))]
        groups = [enough[i : i + rows] for i in range(0, len(enough) - rows + 1, rows)]
        options = {"truncation": True, "max_length": wanted, "return_tensors": "pt"}
        return [dict(self.tokenizer(group, padding=padding, **options)) for group in groups]


def load(name: str, *, dtype: str = "float32", media: bool = False) -> Loaded:
    """Load ``name``, a folder of this machine or a model of the hub, as the class its configuration names.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        media: whether a model may read images or sound in the place of texts. Of an encoder and decoder that reads
            sound the encoder alone is given.

    Raises:
        OptionError: there is no such model, or it has no tokenizer (image processor, feature extractor) or no
            safetensors weights; it reads images or sound, and must not.
        MissingExtraError: transformers is not installed, or what reads images.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", "Loading a model by name") from None
    if dtype not in DTYPES:
        raise OptionError(
            f"The type of the weights, {option('dtype')}, must be one of {', '.join(DTYPES)}, not {dtype!r}."
        )
    if _is_path(name) and not Path(name).is_dir():
        raise OptionError(f"There is no folder {name}; give the folder of a saved model, or a model's name on the hub.")
    _refuse_plan_alone(name)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model_class = _model_class(transformers, config, name)
        read = _READS.get(str(_main_input(transformers, model_class, config)), "texts")
        if read != "texts" and not media:
            raise OptionError(_READS_MEDIA.format(name=name, read=read))
        tokenizer = _prepares(transformers, read, name)
        model = model_class.from_pretrained(name, config=_without_cache(config), dtype=dtype, use_safetensors=True)
    except PruneError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise OptionError(f"{name!r} could not be loaded: {_first_line(e)}") from e
    if read != "texts":
        if read == "sound" and config.is_encoder_decoder and not hasattr(model, "classifier"):
            model = _encoder_alone(model, name)
        return Loaded(model.eval(), tokenizer, 0, int(getattr(config, "num_hidden_layers", 0)))  # of a pyramid: none
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model.eval(), tokenizer, _max_length(config, tokenizer), int(config.num_hidden_layers))


def _encoder_alone(model: Any, name: str) -> Any:
    encoder = model.get_encoder()
    if encoder is not model:
        logger.warning("%s has an encoder and a decoder: its encoder alone is read, for embeddings.", name)
    return encoder


#: what a model reads, by the name of its input; texts by any other
_READS = {"pixel_values": "images", "input_values": "sound", "input_features": "sound"}
_READS_MEDIA = (
    "{name} reads {read}, and this command takes texts. Models that read {read} are known to prunepass train; in "
    "Python to prune(), explain(), export() and torch.compile, which take example inputs."
)


def _main_input(transformers: Any, model_class: Any, config: Any) -> str | None:
    """The name of the input that the model makes its tokens of."""
    if model_class is transformers.AutoModel:
        model_class = transformers.MODEL_MAPPING.get(type(config), model_class)
    return getattr(model_class, "main_input_name", None)


def _prepares(transformers: Any, read: str, name: str) -> Any:
    """The tokenizer, image processor or feature extractor in a folder."""
    from importlib.util import find_spec

    if read == "texts":
        return transformers.AutoTokenizer.from_pretrained(name)
    if read == "sound":
        return transformers.AutoFeatureExtractor.from_pretrained(name)
    if find_spec("PIL") is None:
        raise MissingExtraError("pillow", "images", "Reading images")
    return transformers.AutoImageProcessor.from_pretrained(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _refuse_plan_alone(name: str) -> None:
    folder = Path(name)
    if (folder / PLAN_FILE).is_file() and not (folder / "config.json").exists():
        raise OptionError(
            f"{name} holds a plan and no model (training with {option('freeze_model', True)} and search write such "
            f"folders). Give the model that the plan is for, and {option('plan', name)}."
        )


def _model_class(transformers: Any, config: Any, folder: str) -> Any:
    if (Path(folder) / "modules.json").is_file():  # of sentence-transformers, which pools the encoder's own output
        return transformers.AutoModel
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
        part = _part_of(transformers, config, name)
        if part is not None:
            return part
    return transformers.AutoModel


def _part_of(transformers: Any, config: Any, name: str) -> Any:
    """A class that transformers does not name at its top, beside the model of that configuration: its encoder."""
    import sys

    if not name.endswith("Encoder") or type(config) not in transformers.MODEL_MAPPING:
        return None
    whole = transformers.MODEL_MAPPING[type(config)]
    return getattr(sys.modules[whole.__module__], name, None)


def _without_cache(config: Any) -> Any:
    """A pruned pass over a whole text has no use for a key-value cache, and a cache cannot be an exported output."""
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def _max_length(config: Any, tokenizer: Any) -> int:
    # Tokenizers without a limit of their own say 10 ** 30.
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return int(min(limit for limit in limits if limit is not None and limit > 0))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
