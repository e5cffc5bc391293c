"""One vector a text: pooling and normalising at the end of an exported program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from prunepass.errors import OptionError, option
from prunepass.graph.capture import export_again
from prunepass.graph.inputs import TOKENS_TO_TRACE, fake_value
from prunepass.passes.take import take

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["MODES", "STATES", "VECTOR", "Pooling", "pooled_program", "read_pooling"]

#: name of the output that holds one vector a text
VECTOR = "sentence_embedding"
#: name of the output that holds each token's state, as models, and servers that pool, call it
STATES = "last_hidden_state"
MODES = ("mean", "cls", "last")
#: of sentence-transformers: how it writes the three, now and in older files
_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one vector.

    Attributes:
        mode: "mean" of its tokens, the state of the first ("cls") or of the last one.
        normalize: whether the vector gets length 1.
        side: where padding stands, "left" or "right"; None where that is not known, so that both must work.
        form: what the program puts out: "vector" [B, D], "token" [B, 1, D] (a text of one token, for servers that pool
            once more), or "both", the second as ``last_hidden_state``.
    """

    mode: str
    normalize: bool
    side: str | None = None
    form: str = "vector"


def read_pooling(folder: Path | None, pooling: str | None, normalize: bool | None) -> tuple[str, bool]:
    """How to pool, and whether to normalise: what is given, or else what the model's folder says.

    Args:
        folder: that the model was loaded from; sentence-transformers' ``modules.json`` may lie in it.
        pooling: one of `MODES`; None asks the folder.
        normalize: None asks the folder; where that says nothing of it, vectors are normalised.

    Raises:
        OptionError: neither says how to pool, or the folder says what cannot be written.
    """
    if pooling is not None and pooling not in MODES:
        raise OptionError(f"{option('pooling', pooling)} is not known; choose one of {', '.join(MODES)}.")
    modules = _modules(folder)
    if modules is None:
        if pooling is None:
            where = f"there is no modules.json in {folder}" if folder else "the model was not loaded from a folder"
            raise OptionError(
                f"How to pool is not known: {where}. {_give()}: mean suits most sentence encoders, cls those of the "
                "BGE and Snowflake kind, last those made of decoders; the model's card says which."
            )
        return pooling, True if normalize is None else normalize
    assert folder is not None
    normalizes = "Normalize" in modules
    if pooling is None:
        _check_written(modules, folder)
        pooling = _pooling_of(folder / modules["Pooling"])
    return pooling, normalizes if normalize is None else normalize


def _give() -> str:
    return f"Give {option('pooling', 'mean')}, {option('pooling', 'cls')} or {option('pooling', 'last')}"


def _modules(folder: Path | None) -> dict[str, str] | None:
    """The folder of each module of sentence-transformers, by class; None where there is no list of them."""
    file = folder / "modules.json" if folder is not None else None
    if file is None or not file.is_file():
        return None
    entries = _json(file)
    try:
        return {str(entry["type"]).rpartition(".")[2]: str(entry["path"]) for entry in entries}
    except (TypeError, KeyError):
        raise OptionError(f"{file} is no list of modules as sentence-transformers writes it. {_give()}.") from None


def _check_written(modules: Mapping[str, str], folder: Path) -> None:
    others = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise OptionError(
            f"{folder / 'modules.json'} has {', '.join(others)} besides Transformer, Pooling and Normalize, which is "
            f"not written into the file. {_give()} to leave it out, or export without {option('pooled')}."
        )
    if "Pooling" not in modules:
        raise OptionError(f"{folder / 'modules.json'} has no Pooling. {_give()}.")


def _pooling_of(folder: Path) -> str:
    file = folder / "config.json"
    if not file.is_file():
        raise OptionError(f"There is no {file}, which is to say how to pool. {_give()}.")
    config = _json(file)
    if not isinstance(config, dict):
        raise OptionError(f"{file} holds no settings of a pooling. {_give()}.")
    said = config.get("pooling_mode")
    if said is None:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        said = [_FLAGS.get(flag, flag.removeprefix("pooling_mode_")) for flag in flags] or ["mean"]
    names = [said] if isinstance(said, str) else list(said)
    if len(names) != 1 or names[0] not in _NAMES:
        raise OptionError(
            f"{file} asks for pooling by {' and '.join(map(str, names))}, which is not written into the file. "
            f"{_give()} if one of them will do."
        )
    if config.get("include_prompt") is False:
        raise OptionError(
            f"{file} leaves the prompt's tokens out of the pooling, and a program does not know which they are. "
            f"{_give()} to pool over all tokens."
        )
    return _NAMES[names[0]]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise OptionError(f"{file} cannot be read: {' '.join(str(e).split())}. {_give()}.") from None


# -- the program -----------------------------------------------------------------------------------------------------


def pooled_program(program: ExportedProgram, pooling: Pooling, name: str) -> ExportedProgram:
    """``hidden states [B, S, D], ...`` -> ``sentence_embedding``, float32, of the form that ``pooling`` asks for.

    What only other outputs need goes. Means are taken over the tokens at which ``attention_mask`` is not 0; without
    such an input, over all.

    Args:
        name: of the model's class, for messages.

    Raises:
        OptionError: the program has no output with each token's state.
        CaptureError: it carries no example inputs.
    """
    from prunepass.backends._plain import output_names

    gm = program.module(check_guards=False)
    names = output_names(program)
    output = gm.graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    hidden = dict(zip(names, leaves, strict=True)).get(STATES)
    if not isinstance(hidden, Node) or fake_value(hidden).dim() != 3:
        raise OptionError(
            f"{name} puts out {', '.join(names)}, and no {STATES} [batch, tokens, width], so there is nothing to pool. "
            f"Load the encoder without its head (AutoModel.from_pretrained), or leave {option('pooled')} out: "
            "classifiers and rerankers are served by their logits."
        )
    masks = [n for n in gm.graph.find_nodes(op="placeholder") if n.target == "attention_mask"]
    mask = masks[0] if masks and fake_value(masks[0]).dim() == 2 else None
    graph = gm.graph
    with graph.inserting_before(output):
        vector = graph.call_function(_vector, (hidden, mask, pooling.mode, pooling.normalize, pooling.side))
        made = {VECTOR: vector}
        if pooling.form != "vector":
            made[VECTOR if pooling.form == "token" else STATES] = graph.call_function(torch.unsqueeze, (vector, 1))
    output.args = (tuple(made.values()),)
    spec = pytree.tree_flatten(dict.fromkeys(made, 0))[1]
    codegen: Any = gm.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return export_again(gm, program, program.graph_module.meta.get(TOKENS_TO_TRACE, 0))


def _vector(states: Tensor, mask: Tensor | None, mode: str, normalize: bool, side: str | None) -> Tensor:
    """[B, D] float32 from states [B, S, D] and a mask [B, S]; see `Pooling`."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    live = None if mask is None else mask != 0
    if mode == "mean":
        vector = _mean(wide, live)
    elif mode == "cls":
        vector = _first(wide, None if side == "right" else live)
    else:
        vector = _last(wide, None if side == "left" else live)
    if normalize:
        vector = torch.nn.functional.normalize(vector, dim=-1)
    return vector.to(torch.float32)


def _mean(states: Tensor, live: Tensor | None) -> Tensor:
    """`passes.pool` knows it by its form."""
    if live is None:
        return states.mean(dim=1)
    weight = live.to(states.dtype)
    # divided before they are summed, so that no sum is large where a runtime computes in float16
    share = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    # padding may hold what is no number
    return (states.masked_fill(~live[..., None], 0.0) * share[..., None]).sum(dim=1)


def _first(states: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return states[:, 0]
    end = states.shape[1] - 1
    return _at(states, end - (live.to(torch.int64) * (end - _slots(states))).amax(dim=1, keepdim=True))


def _last(states: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return states[:, -1]
    return _at(states, (live.to(torch.int64) * _slots(states)).amax(dim=1, keepdim=True))


def _slots(states: Tensor) -> Tensor:
    return torch.arange(states.shape[1], device=states.device)[None, :]


def _at(states: Tensor, index: Tensor) -> Tensor:
    """[B, D]: the state at ``index`` [B, 1] of each row."""
    return take(states, index, 1, 0)[:, 0]
