"""Which model torch.compile is at work on. Its backends get a graph and the parameters in it, but not the model: that
stands on the stack, which one function here walks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from inspect import currentframe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.errors import OptionError
from prunepass.plan.choice import plan_folder

if TYPE_CHECKING:
    from torch import nn

__all__ = ["bound_to_folder", "model_of", "modules_called"]


def modules_called(*, up_to: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The methods of modules that are under way, innermost first: each method's name and its module.

    Args:
        up_to: name of the function at which to stop; by default, at the outermost.
    """
    from torch import nn

    frame = currentframe()
    while frame is not None and frame.f_code.co_name != up_to:
        if "self" in frame.f_code.co_varnames and isinstance(module := frame.f_locals.get("self"), nn.Module):
            yield frame.f_code.co_name, module
        frame = frame.f_back


def model_of(values: Sequence[Any]) -> nn.Module | None:
    """The module that is being called, with one of ``values`` among its parameters: the innermost on the stack.

    None where a plain function is compiled that calls a model: nothing on the stack tells of that.
    """
    from torch import nn

    wanted = {id(value) for value in values if isinstance(value, nn.Parameter)}
    called = modules_called() if wanted else ()
    return next((module for _, module in called if any(id(p) in wanted for p in module.parameters())), None)


def bound_to_folder(
    lowered: Callable[..., Any], example_inputs: Sequence[Any], folder: Path | None
) -> Callable[..., Any]:
    """``lowered``, refused to models from other folders.

    Dynamo takes a graph that it has for any model of the same class and shapes, as parameters are inputs. The plan was
    taken for the model of one folder, so a call with other parameters is looked at.

    Args:
        example_inputs: of the graph, parameters among them.
        folder: from which the plan was taken; None where the model's folder holds none.
    """
    from torch import nn

    at = next((i for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)), None)
    if at is None:
        return lowered
    known = weakref.ref(example_inputs[at])

    def run(*args: Any) -> Any:
        nonlocal known
        if args[at] is not known():
            _check(args, folder)
            known = weakref.ref(args[at])
        return lowered(*args)

    return run


def _check(args: Sequence[Any], folder: Path | None) -> None:
    model = model_of(args)
    other = None if model is None else plan_folder(model)
    if other == folder:
        return
    first = "the default plan" if folder is None else f"the plan in {folder}"
    second = "another folder, without a plan" if other is None else f"{other}, which holds a plan of its own"
    raise OptionError(
        f"torch.compile takes a graph that was pruned by {first} for a model of the same class from {second}. "
        f"Say which plan each model gets, as in options={{'plan': {str(other or 'default')!r}}}."
    )
