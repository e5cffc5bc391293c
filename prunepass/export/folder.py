"""A pruned model as a folder that runs with the runtime alone: OpenVINO IR, ONNX, or a ``.pt2`` program."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.errors import ExportError, OptionError, option
from prunepass.export.manifest import write_levels
from prunepass.export.parts import language_choice, plans_to_write, streams_pruned, towers_to_write
from prunepass.export.pooling import Pooling as Pooled
from prunepass.export.pooling import read_pooling
from prunepass.export.programs import Exportable, whole, with_cache
from prunepass.export.served import Served, model_folder, write_for_servers
from prunepass.generation.stateful import generates
from prunepass.graph.examples import longest
from prunepass.graph.vision import image_decoder
from prunepass.graph.wrappers import is_pruned, unwrapped
from prunepass.plan.choice import AnyPlans, choose, names_streams
from prunepass.plan.draft import Several
from prunepass.plan.folders import as_path, check_writable, filled, writing

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from prunepass.graph.capture import Inputs
    from prunepass.plan.annotations import Format, Pooling

__all__ = ["check_folder", "export"]

logger = logging.getLogger(__name__)

#: what a tokenizer is saved as; copied from the model's own folder where no tokenizer is given
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@contextlib.contextmanager
def _outside_autocast() -> Iterator[None]:
    """A file holds the model in its own dtype, whatever block of `torch.autocast` it is written in."""
    import torch

    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@_outside_autocast()
def export(
    model: nn.Module | ExportedProgram,
    plan: AnyPlans,
    out: str | os.PathLike[str],
    to: Format = "openvino",
    *,
    example_inputs: Inputs | None = None,
    length: int | None = None,
    batch: int | None = None,
    tokenizer: Any = None,
    compress_to_fp16: bool = False,
    int8: bool | Iterable[Mapping[str, Any]] = False,
    stateful: bool | None = None,
    pooled: bool = False,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
) -> Path:
    """Prune a model and write it to a folder, with its config, its tokenizer and the plan beside it.

    Inputs and outputs are named as the model's own (``input_ids``, ``last_hidden_state``), but for causal models with
    their cache, see ``stateful``. Batch and length stay open, the length up to what the model takes; a batch or length
    of 1 is fine. Weights keep the model's dtype, also in a `torch.autocast` block; for "openvino" and "onnx", inputs
    and outputs of a model in float16 or bfloat16 are float32.

    Args:
        model: a module, a pruned module or an exported program.
        plan: a `PrunePlan`, a folder or JSON text of one, or "default". None takes the plan in the folder that the
            model was loaded from; where there is none, and for a plan without stages, the model is written as it is.
            A list of plans makes one program with an input ``level``, [1] int64, that chooses at each call: 0 keeps all
            tokens, i is the i-th plan; a call that leaves it out runs at 1, and one that there is not is taken for the
            nearest. ``levels.json`` names them. For a vision-language model with images, a mapping of streams to
            plans: {"language_model": ..., "vision_tower": ...}, by the path of a module or its end; likewise of a model
            with several residual streams in one graph, whose plans are in ``streams/``. See `prune`.
        out: folder to make. It must not exist, or be empty; it appears only once everything in it is written.
        to: "openvino" (``openvino_model.xml`` and ``.bin``), "onnx" (``model.onnx``) or "pt2" (``model.pt2``).
        example_inputs: keyword arguments, or positional ones, of the model; made from its config where left out. Of a
            vision-language model with ``pixel_values`` among them the language model and its head are written: it takes
            ``inputs_embeds`` [B, S, D] with the features of images in place, ``input_ids`` [B, S], which say where
            images are, ``attention_mask`` [B, S], ``position_ids`` [B, S] or [B, S, 3] (Qwen-VL: time, height, width),
            and where the model has them ``token_type_ids`` [B, S] and ``deepstack_visual_embeds_0``, ... [B, S, D],
            zero but at images. See `PrunedVision.language_inputs`. Towers that are pruned as well stand in folders
            named by their paths (``model.vision_tower/``), each with the tensors that the model calls it with as
            inputs; the projector between stays in PyTorch.
        length: fix the number of tokens; of a vision-language model those of its language model.
        batch: fix the number of rows, likewise.
        tokenizer: written beside the model; where left out, the files in the folder the model came from are copied. One
            that is given is converted as well where "openvino" writes a model that servers call with texts: to
            ``openvino_tokenizer.xml`` beside vectors (``pooled``) and classifiers, to ``openvino_detokenizer.xml`` as
            well beside a model with its cache inside. That takes openvino-tokenizers; the log says where it was not.
        compress_to_fp16: halve OpenVINO's weights. They are float32 by default, as the model's own.
        int8: quantise the pruned model after training. For "openvino" a list of calibration batches, each the model's
            keyword arguments (``input_ids`` [B, S], ...): ranges are measured on them, so take some tens of real
            inputs. For "onnx" True: ranges are taken anew at every call, and batches are not needed. Scores,
            predictors and the choice of tokens are computed in floating point all the same.
        stateful: write a causal model with its key-value cache inside, as states, for generation with
            ``openvino-genai`` or by hand: ``input_ids`` and ``position_ids`` [B, S], ``attention_mask`` [B, P + S] over
            past and present tokens, ``beam_idx`` [B]; ``logits`` [B, 1, V] of the last token come back. Every call of
            more than one token prunes those it brings. None does so for "openvino" where ``model`` can generate and
            neither ``example_inputs``, a fixed size, ``int8`` nor a list of plans asks for another program. True with
            ``example_inputs`` that hold images writes a vision-language model's language model with its cache.
        pooled: write an encoder that puts out one vector a text, ``sentence_embedding``, float32, in place of the
            states of its tokens and whatever else it puts out. For "onnx" and "pt2" it is [B, D]. For "openvino" it is
            [B, 1, D], also named ``last_hidden_state``, and "onnx" has that beside it: a text of one token, as servers
            want it that pool by the first token, their default. Files of sentence-transformers, and for "openvino" a
            converted tokenizer, are written beside it.
        pooling: "mean" of a text's tokens, the state of its first one ("cls") or of its last one ("last"). None reads
            it from the files of sentence-transformers in the folder that the model was loaded from.
        normalize: whether vectors get length 1. None reads it from the same place, and is True where that says nothing.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is not empty or cannot be written, the disk is full, the length is more than the model
            takes, inputs cannot be made up, the quantiser fails, or the model's cache or attention is of a kind that
            cannot be shortened.
        OptionError: the format is not known, or ``int8`` is not for it, is empty or does not fit the model's inputs;
            ``stateful=True`` for another format or model, or with options that it does not go with; ``pooled`` for a
            model without states of its tokens, or where it is not known how to pool; a mapping of streams without
            images, or with one of these.
        MissingExtraError: the runtime's package is not installed, or nncf for int8 with OpenVINO.
        PruneError: the runtime has no kernels for the model's dtype; ``model.float()`` is what it takes.
        RefusalError: the model cannot be pruned soundly. Nothing is written in any of these cases.
    """
    from prunepass.export.writers import writer_for

    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        kind = type(tokenizer).__name__
        raise OptionError(f"tokenizer must be one of transformers, AutoTokenizer.from_pretrained(...), not {kind}.")
    model = unwrapped(model, "export")
    writer = writer_for(to, compress_to_fp16=compress_to_fp16, int8=int8)
    half, quarter = compress_to_fp16, int8 is not False
    folder = check_folder(out, needed_bytes=_bytes_to_write(model, half=half, quarter=quarter))
    pool = _pooling(model, tokenizer, to, pooled, pooling, normalize, stateful)
    limit = longest(model)
    if length is not None and limit is not None and length > limit:
        raise ExportError(f"{option('length', length)} is more than the {limit} positions this model has.")
    model, plan = streams_pruned(model, plan, example_inputs)
    sizes = {"length": length, "batch": batch, "int8": int8, "example_inputs": example_inputs}
    fixed = [name for name, value in sizes.items() if value is not None and value is not False]
    plans = None
    if names_streams(plan):
        plans = plans_to_write(model, plan, example_inputs, int8=int8, pooled=pooled)
        choice = language_choice(plans)
    else:
        choice = choose(plan, None if is_pruned(model) else model)  # what is pruned has its plan inside
    several = isinstance(choice.plan, Several)
    if stateful is None:
        stateful = pool is None and to == "openvino" and not fixed and not several and generates(model)
    if stateful:
        images = example_inputs if image_decoder(model, example_inputs) is not None else None
        _check_stateful(to, [n for n in fixed if images is None or n != "example_inputs"], several=several)
        made = with_cache(model, choice, images)
    else:
        if several and pool is None and generates(model):
            logger.warning(
                "The file has no key-value cache, as there are several plans: each call computes the whole text. For "
                "generation export one plan."
            )
        made = whole(model, choice, example_inputs, length=length, batch=batch, widen=to != "pt2", pooling=pool)
    towers = towers_to_write(model, plans, example_inputs, widen=to != "pt2")
    with filled(folder) as unfinished:
        writer(made, unfinished)
        _write_beside(made, unfinished)
        for path, tower in towers.items():
            with writing(unfinished / path):
                (unfinished / path).mkdir()
            writer(tower, unfinished / path)
            _write_beside(tower, unfinished / path)
        _write_tokenizer(tokenizer, model, unfinished)
        write_for_servers(unfinished, Served(made, model, tokenizer, to, pool is not None, length))
    unpruned = made.plan is None and made.levels is None
    by = f"by plans for {', '.join(made.streams)}" if made.streams else f"by {choice.source}"
    logger.info("wrote %s, %s", folder, "unpruned" if unpruned and not made.streams else by)
    for path, tower in towers.items():
        logger.info("wrote %s, by %r", folder / path, tower.plan)
    return folder


def _pooling(
    model: Any,
    tokenizer: Any,
    to: str,
    pooled: bool,
    pooling: str | None,
    normalize: bool | None,
    stateful: bool | None,
) -> Pooled | None:
    """How to pool, of what the caller says of it and the files beside the model; None without ``pooled``."""
    if not pooled:
        given = {"pooling": pooling, "normalize": normalize}
        for name in [name for name, value in given.items() if value is not None]:
            raise OptionError(f"{option(name)} goes with {option('pooled', True)}, which is not given.")
        return None
    if stateful:
        raise OptionError(
            f"{option('pooled', True)} writes one vector a text, and {option('stateful', True)} a model that "
            "generates. Leave one of them out."
        )
    mode, normalizes = read_pooling(model_folder(model), pooling, normalize)
    side = getattr(tokenizer, "padding_side", None)
    return Pooled(mode, normalizes, side, {"openvino": "token", "onnx": "both"}.get(to, "vector"))


def _check_stateful(to: str, fixed: Sequence[str], *, several: bool) -> None:
    """Raises `OptionError` where a format, sizes or several plans do not go with a cache inside."""
    if to != "openvino":
        raise OptionError(
            f"{option('stateful', True)} is for {option('to', 'openvino')}; {to!r} has no states. Leave it out."
        )
    if several:
        raise OptionError(
            "A model with its cache inside takes one plan, as a cache holds the tokens that one level kept. Give a "
            f"single plan, or pass {option('stateful', False)}."
        )
    if fixed:
        raise OptionError(
            "A model with its cache inside takes any batch and length, in floating point: leave out "
            f"{option(fixed[0])}, or pass {option('stateful', False)}."
        )


def check_folder(out: str | os.PathLike[str], *, needed_bytes: int = 0) -> Path:
    """The folder to export to, if it can be made there.

    Raises:
        ExportError: it exists and is not empty, cannot be written, or the disk has less space left than that.
        OptionError: a file stands above it, or it is no name of a folder.
    """
    folder = as_path(out)
    with writing(folder):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ExportError(
                f"{folder} exists already and is not empty, so nothing was written. Choose another folder or remove it."
            )
    check_writable(folder, needed_bytes=needed_bytes)
    return folder


def _bytes_to_write(model: Any, *, half: bool, quarter: bool) -> int:
    """At least so many will be written: the weights alone."""
    from torch.export import ExportedProgram

    if isinstance(model, ExportedProgram):
        tensors = list(model.state_dict.values())
    else:
        tensors = [*model.parameters(), *model.buffers()]
    total: int = sum(t.numel() * t.element_size() for t in tensors)
    return total // (4 if quarter else 2 if half else 1)


def _write_beside(made: Exportable, folder: Path) -> None:
    for one in made.beside:
        with writing(folder):
            one.save_pretrained(folder)
    if made.plan is not None:
        made.plan.save_pretrained(folder)
    if made.levels is not None:
        write_levels(made.levels, folder)
    for stream, plan in made.streams.items():
        plan.save_pretrained(folder / "streams" / stream)


def _write_tokenizer(tokenizer: Any, model: Any, folder: Path) -> None:
    """The one given, or the files in the folder that the model was loaded from."""
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
        return
    source = model_folder(model)
    if source is None:
        return
    with writing(folder):
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as e:  # the tokenizers package raises plain ones where the disk refuses
        raise ExportError(f"The tokenizer could not be written: {' '.join(str(e).split())}") from e
