"""Modules inside a model that are pruned by themselves, as the tower that reads images: found by name, called as the
model calls them, and put back into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from prunepass.errors import CaptureError, PlanError, RefusalError
from prunepass.graph.language_part import CallReader, by_name

__all__ = ["call_inside", "module_named", "part_blamed", "reading_with", "refuse_packed"]


def module_named(model: nn.Module, name: str) -> str:
    """The path of the module that ``name`` is the path of, or the end of the path; of several the one least deep.

    Raises:
        PlanError: there is none, or there are several as deep.
    """
    paths = [path for path, _ in model.named_modules() if path and f".{path}".endswith(f".{name}")]
    if name in paths:
        return name
    least = min((path.count(".") for path in paths), default=0)
    found: list[str] = [path for path in paths if path.count(".") == least]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} modules, {', '.join(found[:3])}" if found else "no module"
    parts = [path for path, _ in model.named_modules() if 0 < len(path.split(".")) <= 2]
    raise PlanError(
        f"{name!r} names {what} of {type(model).__name__}. Name a stream by the path of its module; the first ones are "
        f"{', '.join(parts)}."
    )


@contextmanager
def part_blamed(path: str) -> Iterator[None]:
    """A refusal, or a plan that does not fit, of one part of a model says which part."""
    try:
        yield
    except RefusalError as e:
        where = path if e.where in (None, path) else f"{path}: {e.where}"
        raise RefusalError(e.reason, where=where, hint=e.hint) from e
    except (PlanError, CaptureError) as e:
        raise type(e)(f"{path}: {e}") from e


def refuse_packed(path: str, given: Mapping[str, Any]) -> None:
    """Raises `RefusalError` for a module that gets all images in one row, without an axis for each.

    Args:
        path: of the module.
        given: what it is called with, by name.
    """
    states = next((v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if states is None or states.dim() > 2:
        return
    raise RefusalError(
        f"it is called with the patches of all images in one row, {list(states.shape)}, and attends within each image, "
        "or within windows of it, by lengths that are read from tensors. There is no axis of images along which each "
        "could keep its share.",
        where=path,
        hint="Prune the language model alone: leave this module out of the mapping of plans.",
    )


class _Called(BaseException):
    """The module is called; what would follow is not run. No `Exception`, so that no handler on the way takes it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given


def call_inside(reader: CallReader, path: str, example: Mapping[str, Any]) -> dict[str, Any]:
    """What the first call of a module inside an outer model gets, by name, without what is None.

    Args:
        path: of the module, outside the language model.
        example: keyword arguments of the outer model.

    Raises:
        RefusalError: it is not called; or as `refuse_packed`.
    """
    names = inspect.signature(reader.model.get_submodule(path).forward)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Called(by_name(names, args, kwargs))

    try:
        reading_with(reader, {path: stop}).read(**example)
    except _Called as call:
        given = {name: value for name, value in call.given.items() if value is not None}
        refuse_packed(path, given)
        return given
    raise RefusalError(
        f"{type(reader.model).__name__} does not call it on these inputs, or calls it from a forward() that was put "
        "into a module around it, as accelerate's hooks are. So what it would be pruned for is not known.",
        where=path,
        hint="Give example inputs with images, and a model on one device without hooks.",
    )


def reading_with(reader: CallReader, forwards: Mapping[str, Callable[..., Any]]) -> CallReader:
    """A reader whose outer model shares all with the given one's, but has another ``forward`` for some modules.

    The given model is left as it is, so that it may be called meanwhile.

    Args:
        forwards: by the path of a module.
    """
    made = _sharing(reader.model)
    for path, forward in forwards.items():
        *above, name = path.split(".")
        holder = made
        for step in above:
            holder._modules[step] = _sharing(holder.get_submodule(step))
            holder = holder.get_submodule(step)
        part = _sharing(holder.get_submodule(name))
        part.__dict__["forward"] = forward
        holder._modules[name] = part
    return replace(reader, model=made)


def _sharing(module: nn.Module) -> nn.Module:
    """Another module object with the same parameters, hooks and children; not what `nn.Module.compile` made of it."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__, _modules=module._modules.copy(), _compiled_call_impl=None)
    return made
