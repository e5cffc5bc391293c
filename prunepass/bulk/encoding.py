"""From texts to token ids, with the tokenizer of a folder and without its model library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunepass.errors import ExportError, MissingExtraError, option

__all__ = ["Encoded", "Encoder", "Text", "read_json"]

#: a text, or two for a model of pairs
Text = str | tuple[str, str]
#: tokenizers without a limit of their own say 10 ** 30
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Encoded:
    """A text as the model takes it.

    Attributes:
        ids: with the special tokens.
        types: which of two texts each token is of; all 0 for one text.
    """

    ids: Sequence[int]
    types: Sequence[int]


class Encoder:
    """The tokenizer in a folder.

    Args:
        folder: that `prunepass.export` wrote with ``tokenizer=``.

    Attributes:
        longest: tokens that its files say a text may have; None where they say nothing.
        pad: id of the padding token.
        pads_left: whether rows are padded in front.

    Raises:
        ExportError: there is no tokenizer, or its files cannot be read.
        MissingExtraError: the package tokenizers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError("tokenizers", "bulk", "A tokenizer in a folder") from None
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ExportError(
                f"{folder} has no tokenizer.json. Export it again with the model's tokenizer ({option('tokenizer')}); "
                "it must be a fast one."
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # it raises Exception itself
            raise ExportError(f"{file} cannot be read: {' '.join(str(e).split())[:200]}. Export it again.") from None
        said = read_json(folder / "tokenizer_config.json")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cut_side = "left" if said.get("truncation_side") == "left" else "right"
        self.pads_left = said.get("padding_side") == "left"
        token = said.get("pad_token")
        name = token.get("content") if isinstance(token, Mapping) else token
        self.pad = (self._tokenizer.token_to_id(name) if isinstance(name, str) else None) or 0
        lengths = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        limits = [limit for limit in (said.get("model_max_length"), lengths) if isinstance(limit, int)]
        self.longest: int | None = min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)

    def cut(self, length: int | None) -> None:
        """Cut texts to so many tokens from now on, special ones included; None leaves them whole."""
        if length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(length, direction=self._cut_side)

    def __call__(self, texts: Sequence[Text]) -> list[Encoded]:
        """Each text with its special tokens."""
        found = self._tokenizer.encode_batch_fast(list(texts))
        return [Encoded(one.ids, one.type_ids) for one in found]


def read_json(file: Path) -> Mapping[str, Any]:
    """The settings in a file; nothing where there is none.

    Raises:
        ExportError: it cannot be read, or holds something else.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ExportError(f"{file} cannot be read: {' '.join(str(e).split())}. Export the model again.") from None
    if not isinstance(found, dict):
        raise ExportError(f"{file} holds no settings. Export the model again.")
    return found
