"""A pruned model as a folder that runs with the runtime alone: OpenVINO IR, ONNX, or a ``.pt2`` program."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.errors import CaptureError, ExportError, OptionError, RefusalError
from prunepass.generation.stateful import WITHOUT_CACHE, generates, stateful_program
from prunepass.graph.examples import longest
from prunepass.graph.wrappers import is_pruned, unwrapped
from prunepass.plan import PrunePlan
from prunepass.plan.choice import DEFAULT, AnyPlan, choose
from prunepass.plan.folders import as_path, check_writable, filled, writing

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from prunepass.graph.capture import Inputs
    from prunepass.pipeline import PrunedModule
    from prunepass.plan.annotations import Format

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
    plan: AnyPlan,
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
        out: folder to make. It must not exist, or be empty; it appears only once everything in it is written.
        to: "openvino" (``openvino_model.xml`` and ``.bin``), "onnx" (``model.onnx``) or "pt2" (``model.pt2``).
        example_inputs: keyword arguments, or positional ones, of the model; made from its config where left out.
        length: fix the number of tokens.
        batch: fix the number of rows.
        tokenizer: written beside the model; where left out, the files in the folder the model came from are copied.
        compress_to_fp16: halve OpenVINO's weights. They are float32 by default, as the model's own.
        int8: quantise the pruned model after training. For "openvino" a list of calibration batches, each the model's
            keyword arguments (``input_ids`` [B, S], ...): ranges are measured on them, so take some tens of real
            inputs. For "onnx" True: ranges are taken anew at every call, and batches are not needed. Scores,
            predictors and the choice of tokens are computed in floating point all the same.
        stateful: write a causal model with its key-value cache inside, as states, for generation with
            ``openvino-genai`` or by hand: ``input_ids`` and ``position_ids`` [B, S], ``attention_mask`` [B, P + S] over
            past and present tokens, ``beam_idx`` [B]; ``logits`` [B, 1, V] of the last token come back. Every call of
            more than one token prunes those it brings. None does so for "openvino" where ``model`` can generate and
            neither ``example_inputs``, a fixed size nor ``int8`` asks for another program.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is not empty or cannot be written, the disk is full, the length is more than the model
            takes, inputs cannot be made up, the quantiser fails, or the model's cache or attention is of a kind that
            cannot be shortened.
        OptionError: the format is not known, or ``int8`` is not for it, is empty or does not fit the model's inputs;
            ``stateful=True`` for another format or model, or with options that it does not go with.
        MissingExtraError: the runtime's package is not installed, or nncf for int8 with OpenVINO.
        PruneError: the runtime has no kernels for the model's dtype; ``model.float()`` is what it takes.
        RefusalError: the model cannot be pruned soundly. Nothing is written in any of these cases.
    """
    from prunepass.backends._plain import plain
    from prunepass.export.writers import writer_for

    model = unwrapped(model, "export")
    writer = writer_for(to, compress_to_fp16=compress_to_fp16, int8=int8)
    half, quarter = compress_to_fp16, int8 is not False
    folder = check_folder(out, needed_bytes=_bytes_to_write(model, half=half, quarter=quarter))
    limit = longest(model)
    if length is not None and limit is not None and length > limit:
        raise ExportError(f"length={length} is more than the {limit} positions this model has.")
    if stateful is None:
        fixed = example_inputs is not None or length is not None or batch is not None or int8 is not False
        stateful = to == "openvino" and not fixed and generates(model)
    choice = choose(plan, None if is_pruned(model) else model)  # what is pruned has its plan inside
    asks_default = choice.plan is None and plan is not None
    if asks_default and stateful:
        choice = replace(choice, plan=_default_with_cache(model))
    chosen = choice.plan
    if stateful:
        sizes = {"length": length, "batch": batch, "int8": int8, "example_inputs": example_inputs}
        with choice.blamed():
            write = _stateful_writer(model, chosen, to, compress_to_fp16, limit, sizes)
    else:
        with choice.blamed():
            program, chosen = _program(model, DEFAULT if asks_default else chosen, example_inputs)
        signature, program = plain(program, length=length, batch=batch, limit=limit, widen=to != "pt2")
        write = partial(writer, program, signature)
    with filled(folder) as unfinished:
        write(unfinished)
        _write_config(model, tokenizer, unfinished, cached=bool(stateful))
        if chosen is not None:
            chosen.save_pretrained(unfinished)
    logger.info("wrote %s, %s", folder, "unpruned" if chosen is None else f"by {choice.source}")
    return folder


def _stateful_writer(
    model: Any, plan: PrunePlan | None, to: str, compress_to_fp16: bool, limit: int | None, unfit: Mapping[str, Any]
) -> Callable[[Path], None]:
    """Everything but the writing.

    Args:
        unfit: options that do not go with it.
    """
    from prunepass.backends import openvino as target
    from prunepass.backends._openvino_stateful import convert_stateful
    from prunepass.export.writers import save_openvino

    if to != "openvino":
        raise OptionError(f"stateful=True is for to='openvino'; {to!r} has no states. Leave it out.")
    if given := [name for name, value in unfit.items() if value is not None and value is not False]:
        raise OptionError(
            f"A model with its cache inside takes any batch and length, in floating point: leave out {given[0]}, or "
            "pass stateful=False (--no-stateful)."
        )
    if not generates(model):
        raise OptionError(
            f"{type(model).__name__} does not generate text from text, so stateful=True is not for it. Pass an "
            "unpruned causal model, such as one of AutoModelForCausalLM."
        )
    target.require()
    try:
        found = stateful_program(model, plan)
    except RefusalError as e:
        raise RefusalError(e.reason, where=e.where, hint=" ".join(filter(None, (e.hint, WITHOUT_CACHE)))) from e
    except CaptureError as e:
        raise ExportError(f"{type(model).__name__} could not be traced with its cache. {WITHOUT_CACHE} {e}") from e

    def write(folder: Path) -> None:
        converted = convert_stateful(found, limit)  # its constants are found's
        save_openvino(converted, folder / "openvino_model.xml", compress_to_fp16=compress_to_fp16)
        with writing(folder):
            model.generation_config.save_pretrained(folder)

    return write


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


def _program(model: Any, plan: PrunePlan | str | None, example_inputs: Any) -> tuple[ExportedProgram, PrunePlan | None]:
    """The program to write, and the plan in it: that given, or the default one where its name is."""
    from torch.export import ExportedProgram

    from prunepass.graph.capture import capture_module
    from prunepass.pipeline import PrunedModule, prune

    given = plan if isinstance(plan, PrunePlan) else None
    prunes = plan == DEFAULT or (given is not None and bool(given.stages))
    if isinstance(model, PrunedModule):
        if prunes and plan != model.plan:
            raise ExportError(
                "This module is pruned already. Pass plan=None to write it as it is, or the original model."
            )
        return model.exported, model.plan
    if isinstance(model, ExportedProgram):
        return prune(model, plan) if prunes else model, given
    inputs = example_inputs if example_inputs is not None else _made_up_inputs(model)
    if not prunes:
        return capture_module(model, inputs).exported, given
    pruned = prune(model, plan, inputs)
    if isinstance(pruned, PrunedModule):
        return _warned(pruned).exported, pruned.plan
    return capture_module(model, inputs).exported, given  # every keep is 1


def _warned(pruned: PrunedModule) -> PrunedModule:
    from prunepass.passes.default_plan import head_warning

    if pruned.result.restored and (warning := head_warning(pruned.plan.restore, pruned.result.reads)):
        logger.warning("%s", warning)
    return pruned


def _default_with_cache(model: Any) -> PrunePlan:
    """The default plan for generation, which goes on from the prompt's last token."""
    plan = PrunePlan.default(int(model.config.get_text_config().num_hidden_layers))
    return replace(plan, protect=replace(plan.protect, last=1))


def _made_up_inputs(model: nn.Module) -> dict[str, Any]:
    """Two rows of tokens, from the model's config and the arguments that its ``forward`` takes."""
    import inspect

    import torch

    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    arguments = inspect.signature(model.forward).parameters
    if vocabulary is None or "input_ids" not in arguments:
        raise ExportError(
            f"{type(model).__name__} has no config with a vocab_size, or takes no input_ids, so example inputs cannot "
            "be made up. Pass example_inputs, for instance {'input_ids': ..., 'attention_mask': ...}."
        )
    length = min(16, longest(model) or 16)
    ids = torch.arange(2 * length).reshape(2, length) % vocabulary
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in arguments:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in arguments and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    return inputs


def _write_config(model: Any, tokenizer: Any, folder: Path, *, cached: bool) -> None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        if cached:
            config = deepcopy(config)
            config.use_cache = True
        with writing(folder):
            config.save_pretrained(folder)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)
        return
    source = Path(getattr(config, "_name_or_path", "") or "")
    if source == Path() or not source.is_dir():
        return
    with writing(folder):
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if not hasattr(tokenizer, "save_pretrained"):
        raise OptionError(f"tokenizer must be one of transformers, not {type(tokenizer).__name__}.")
    try:
        tokenizer.save_pretrained(folder)
    except Exception as e:  # the tokenizers package raises plain ones where the disk refuses
        raise ExportError(f"The tokenizer could not be written: {' '.join(str(e).split())}") from e
