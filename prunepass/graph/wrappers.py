"""The door: what stands around a model is looked through, and what is no model is sent back with what to pass."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from prunepass.errors import OptionError, RefusalError

__all__ = ["MARK", "is_pruned", "refuse_pruned", "unwrapped"]

#: key of a node's ``meta``, and of its ``meta["custom"]``, which torch.export keeps: a pass of ours inserted it
MARK = "prunepass"

_TAKES = "a torch.nn.Module, an ExportedProgram or a GraphModule"
#: wrappers that compute what the module in this attribute computes
_TRANSPARENT = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
#: objects that hold a model: first name of the class's module -> the attribute to pass instead
_HOLDERS = {
    "transformers.pipelines": "pipeline.model",
    "sentence_transformers.SentenceTransformer": "sentence_transformer[0].auto_model",
    "sentence_transformers.sentence_transformer": "sentence_transformer[0].auto_model",
    "sentence_transformers.cross_encoder": "cross_encoder.model",
    "deepspeed": "engine.module",
}


def unwrapped(model: Any, verb: str = "prune") -> Any:
    """The model inside wrappers that compute the same: `torch.compile`'s, data parallel ones, adapters of PEFT.

    Args:
        model: what the user passed.
        verb: the function it was passed to, for messages.

    Returns:
        A module, an exported program or a graph; ``model`` itself where nothing is around it.

    Raises:
        OptionError: it is no model: a class, a path, a pipeline; the message says what to pass.
        RefusalError: it is a model whose Python code or whole weights cannot be read.
    """
    if isinstance(model, ExportedProgram):
        return model
    _refuse_other(model, verb)
    while (inside := _inside(model)) is not None:
        model = inside
    _refuse_unreadable(model)
    return model


def is_pruned(model: Any) -> bool:
    """Whether a graph in a module, or an exported program, was rewritten by the passes."""
    if isinstance(model, ExportedProgram):
        return _is_marked(model.graph_module)
    return isinstance(model, nn.Module) and any(_is_marked(m) for m in model.modules() if isinstance(m, GraphModule))


def refuse_pruned(model: Any) -> None:
    """Raises `RefusalError` for a model that is pruned already: which tokens are live in it, its inputs do not say."""
    if is_pruned(model):
        raise RefusalError(
            "this model is pruned already, and which tokens are live in it cannot be read from its inputs.",
            hint="Prune the original model, with one plan that holds all stages.",
        )


def _is_marked(gm: GraphModule) -> bool:
    return any(MARK in node.meta or MARK in (node.meta.get("custom") or {}) for node in gm.graph.nodes)


def _refuse_other(model: Any, verb: str) -> None:
    if isinstance(model, type):
        raise OptionError(
            f"{verb}() takes {_TAKES}, but {model.__name__} is a class. Pass an instance: {model.__name__}(...), or "
            f"{model.__name__}.from_pretrained(folder)."
        )
    for known in (f"{c.__module__}." for c in type(model).__mro__):
        for start, attribute in _HOLDERS.items():
            if known.startswith(start + "."):
                raise OptionError(
                    f"{verb}() takes {_TAKES}. {type(model).__name__} holds a model with what stands around it: pass "
                    f"the model, {attribute}."
                )
    if isinstance(model, (str, os.PathLike)):
        raise OptionError(
            f"{verb}() takes {_TAKES}, not {model!r}. Load it first: AutoModel.from_pretrained(folder), or "
            "torch.export.load(file)."
        )
    if not isinstance(model, nn.Module):
        raise OptionError(f"{verb}() takes {_TAKES}, not {type(model).__name__}.")


def _inside(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper hands its inputs to; None where ``model`` is no wrapper."""
    kind = type(model)
    attribute = _TRANSPARENT.get(f"{kind.__module__}.{kind.__qualname__}")
    if attribute is not None:
        found = getattr(model, attribute)
        return found if isinstance(found, nn.Module) else None
    if any(c.__module__.startswith("peft.") and c.__name__ in ("PeftModel", "PeftMixedModel") for c in kind.__mro__):
        return _inside_adapter(model)
    return None


def _inside_adapter(model: Any) -> nn.Module:
    """The model that PEFT put its layers into; it computes what the wrapper computes, adapters and all."""
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise RefusalError(
            f"{type(model).__name__} puts learned tokens or keys before the text ({config.peft_type.value}), which no "
            "input says, so which tokens are live cannot be read.",
            hint="Prune the model without its prompt, or train an adapter of another kind, such as LoRA.",
        )
    inside = model.get_base_model()
    assert isinstance(inside, nn.Module)
    return inside


def _refuse_unreadable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or type(module).__name__
        kind = type(module)
        if kind.__module__.startswith("torch.jit.") or any(c.__module__ == "torch.jit._script" for c in kind.__mro__):
            raise RefusalError(
                "this is TorchScript, which torch.export cannot trace.",
                where=where,
                hint="Pass the Python module that it was scripted or traced from.",
            )
        sharded = any("FullyShardedDataParallel" in c.__name__ or c.__name__ == "FSDPModule" for c in kind.__mro__)
        if sharded or any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False)):
            raise RefusalError(
                "its weights are sharded over several processes, so the graph would see a part of them.",
                where=where,
                hint="Prune the module before it is sharded, or load its checkpoint into one process first.",
            )
