"""Example inputs: what they must be, and a plain sentence where they are not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from prunepass.errors import OptionError
from prunepass.graph.inputs import check_mask

__all__ = ["checked", "longest", "why_not"]

_SAMPLE = "dict(tokenizer(['some text', 'more'], padding=True, return_tensors='pt'))"
#: names of integer inputs of shape [batch, length]
_IDS = ("input_ids", "decoder_input_ids", "token_type_ids", "position_ids")


def checked(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Args:
        model: what is to be called with them.
        inputs: keyword arguments (a mapping), positional ones (a sequence), or a single tensor.

    Raises:
        OptionError: they are of another kind, or cannot be inputs of this model; the message names what to pass.
        RefusalError: the attention mask does not say which tokens are live.
    """
    args, kwargs = _split(inputs)
    named = {**{f"input {i}": value for i, value in enumerate(args)}, **kwargs}
    _check_names(model, kwargs)
    for name, value in named.items():
        _check_value(name, value)
    if not any(isinstance(v, torch.Tensor) and v.dim() > 1 for v in named.values()):
        raise OptionError(
            f"The example inputs hold no tensor of shape [batch, length, ...]; given: {', '.join(named) or 'nothing'}. "
            f"Give the keyword arguments of a real call, for instance {_SAMPLE}."
        )
    _check_device(model, named)
    _check_shapes(model, named)
    check_mask(kwargs.get("attention_mask"))
    return args, _with_every_row(kwargs)


def longest(model: Any) -> int | None:
    """How many positions a model has a learnt vector for; None where it has no such table (rotary, relative)."""
    size = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(size, int) or not isinstance(model, nn.Module):
        return None
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in leaf or leaf == "wpe"):
            # RoBERTa and its kin count positions from behind the padding id
            return size - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def why_not(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    """A sentence on why tracing failed: the inputs do not run through the model either, or only tracing fails."""
    kind = type(model).__name__
    if not isinstance(model, GraphModule):
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception as e:  # whatever the model raises is what is to be told
            return (
                f"The example inputs do not run through {kind} itself: {type(e).__name__}: {_first_line(e)} "
                f"Given: {_described({**dict(enumerate(args)), **kwargs})}. {_takes(model)}"
            )
    return (
        f"The model itself runs on these inputs, but {kind} could not be traced by torch.export: {_cause(error)} "
        "Pass use_cache=False for decoders, and no inputs that are not tensors."
    )


def _cause(error: Exception) -> str:
    """What torch.export says, in the words of the model's author where it is one of the usual causes."""
    text = str(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        lines = [line.strip() for line in text.splitlines()]
        places = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
        where = f" ({places[-1]})" if places else ""
        return f"its code branches on a value that is computed from the inputs{where}, which a graph cannot follow."
    cache = re.search(r"Found <class '[\w.]*?(\w*Cache\w*)'> in output", text)
    if cache:
        return (
            f"it returns a {cache.group(1)}, which a graph cannot hold. Set use_cache=False in the model's config and "
            "in those of its parts (model.config.get_text_config().use_cache = False)."
        )
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "(no message)"
    return text if text.endswith((".", "!", "?")) else text + "."


def _described(named: Mapping[Any, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return type(value).__name__

    return ", ".join(f"{name}: {one(value)}" for name, value in named.items()) or "nothing"


def _takes(model: nn.Module) -> str:
    names = [p.name for p in _parameters(model) if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return f"It takes {', '.join(names)}." if names else ""


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        unnamed = [key for key in inputs if not isinstance(key, str)]
        if unnamed:
            raise OptionError(f"Example inputs given as a mapping have names as keys, not {unnamed[0]!r}.")
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (str, bytes)):
        raise OptionError(f"Example inputs are tensors, not text. Tokenize it first: {_SAMPLE}.")
    if not isinstance(inputs, Sequence):
        raise OptionError(
            "Example inputs are keyword arguments (a mapping) or positional ones (a sequence of tensors), not "
            f"{type(inputs).__name__}. For instance {_SAMPLE}."
        )
    return tuple(inputs), {}


def _check_names(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    if isinstance(model, GraphModule):
        return
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for name in kwargs:
        if name not in known:
            raise OptionError(f"{type(model).__name__} takes no input {name!r}. {_takes(model)}")


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, (str, bytes)) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        raise OptionError(f"The example input {name!r} is text. Tokenize it first: {_SAMPLE}.")
    numbers = value
    while isinstance(numbers, (list, tuple)) and numbers:
        numbers = numbers[0]
    if isinstance(value, (list, tuple)) and isinstance(numbers, (int, float)):
        raise OptionError(
            f"The example input {name!r} is a list of numbers, not a tensor. Call the tokenizer with "
            "return_tensors='pt', or wrap it in torch.tensor(...)."
        )
    if type(value).__module__ == "numpy":
        raise OptionError(f"The example input {name!r} is a numpy array. Pass torch.from_numpy(...).")
    if not isinstance(value, torch.Tensor):
        return
    if value.dim() and not value.shape[0]:
        raise OptionError(f"The example input {name!r} has shape {list(value.shape)}: no rows. Pass at least one.")
    if value.dim() > 1 and not value.shape[1]:
        raise OptionError(f"The example input {name!r} has shape {list(value.shape)}: no tokens. Pass at least one.")
    if name not in _IDS:
        return
    if value.dim() == 1 and name != "position_ids":
        raise OptionError(
            f"The example input {name!r} has shape {list(value.shape)}; a batch is [batch, length]. Pass {name}[None]."
        )
    if value.is_floating_point():
        raise OptionError(f"The example input {name!r} is {value.dtype}; ids are integers. Pass {name}.long().")


def _check_device(model: nn.Module, named: Mapping[str, Any]) -> None:
    places = {p.device for p in model.parameters()}
    if len(places) != 1:
        return
    place = places.pop()
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.device != place:
            raise OptionError(
                f"The example input {name!r} is on {value.device} and the model on {place}. Move the inputs: "
                "{k: v.to(model.device) for k, v in inputs.items()}."
            )


def _with_every_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A mask or positions of one row for all are written out, so that the graph reads those of each row."""
    ids = kwargs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return kwargs
    made = dict(kwargs)
    for name in ("attention_mask", "position_ids", "token_type_ids"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == 1 < ids.shape[0]:
            made[name] = value.expand(ids.shape[0], -1).contiguous()
    return made


def _check_shapes(model: nn.Module, named: Mapping[str, Any]) -> None:
    ids = named.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return
    limit = longest(model)
    if limit is not None and ids.shape[1] > limit:
        raise OptionError(
            f"The example inputs have {ids.shape[1]} tokens a row, more than the {limit} positions that "
            f"{type(model).__name__} has. Pass fewer, or call the tokenizer with truncation=True, max_length={limit}."
        )
    _check_vocabulary(model, ids)
    mask = named.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or named.get("past_key_values") is not None:
        return
    if mask.shape[1] != ids.shape[1] or mask.shape[0] not in (1, ids.shape[0]):
        raise OptionError(
            f"The example inputs 'attention_mask' {list(mask.shape)} and 'input_ids' {list(ids.shape)} must have one "
            "shape, [batch, length]. Pass those of one call of the tokenizer."
        )


def _check_vocabulary(model: nn.Module, ids: torch.Tensor) -> None:
    """Tracing does not look at values, but a run would end in an index out of range. Models that see or hear as well
    may mark images by ids beyond the table."""
    config: Any = getattr(model, "config", None)
    find = getattr(model, "get_input_embeddings", None)
    if not callable(find) or not hasattr(config, "get_text_config") or config.get_text_config() is not config:
        return
    try:
        table = find()
    except NotImplementedError:  # transformers' answer where a model has none
        return
    if type(ids) is not torch.Tensor or ids.device.type == "meta" or not isinstance(table, nn.Embedding):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= table.num_embeddings:
        raise OptionError(
            f"The example input 'input_ids' holds the id {low if low < 0 else high}, but {type(model).__name__} has "
            f"{table.num_embeddings} tokens. Take the tokenizer of this model."
        )
