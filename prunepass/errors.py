"""Every error prunepass raises on purpose. Each message says what was found, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "CaptureError",
    "ContractError",
    "DataError",
    "ExportError",
    "MissingExtraError",
    "OptionError",
    "PlanError",
    "PruneError",
    "RefusalError",
    "WeightsError",
]  # `option` and `options_written` are for our own messages


class PruneError(Exception):
    """Base class of all errors raised by prunepass."""


class PlanError(PruneError, ValueError):
    """The plan itself is wrong: a keep outside (0, 1], rising keeps, a layer that the model does not have."""


class WeightsError(PlanError):
    """A predictor weights file is damaged, foreign, or made for a model of another width."""


class OptionError(PruneError, ValueError):
    """An option that is not known, or has a value that it cannot take."""


class DataError(PruneError, ValueError):
    """A data file or data set that cannot be read, or does not fit the model's head: columns, labels, lengths."""


class CaptureError(PruneError):
    """The model could not be brought into a graph that the pass can read."""


class ContractError(PruneError):
    """A pass did not find or did not leave the graph as it must be: a fault of prunepass, which a report helps to mend.

    Attributes:
        pass_name: the pass, with its place where it works at one: ``narrow before block 3``.
        before: the passes that ran before it, in order.
        node: name of the node that breaks the contract, if it is one.
        what: what is wrong, in one sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        pass_name: str,
        before: tuple[str, ...] = (),
        node: str | None = None,
        where: str | None = None,
        when: str = "After",
    ) -> None:
        self.what, self.pass_name, self.before, self.node = what, pass_name, before, node
        place = f"{node} in {where}: " if node and where else f"{node}: " if node else ""
        super().__init__(
            f"{when} the pass {pass_name} the graph is wrong: {place}{what} Passes before it: "
            f"{', '.join(before) or 'none'}. This is a fault of prunepass, not of the model or the plan. Please report "
            "it with this message, the model's class and the plan; PRUNEPASS_DUMP=folder writes the graph after each "
            "pass. fallback='dense' of torch.compile runs the model unpruned."
        )


class RefusalError(PruneError):
    """The model cannot be pruned soundly at the asked place.

    Attributes:
        reason: why, in one sentence.
        where: the module path (``encoder.layer.3.conv``) or node that stands in the way, if there is one.
    """

    def __init__(self, reason: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.reason = reason
        self.where = where
        self.hint = hint
        parts = [f"{where}: {reason}" if where else reason]
        if hint:
            parts.append(hint)
        super().__init__(" ".join(parts))


class ExportError(PruneError):
    """The pruned model could not be written, or its folder already exists."""


class MissingExtraError(PruneError, ImportError):
    """An optional dependency is not installed; the message carries the exact install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package}. Install it with: pip install "prunepass[{extra}]"')
        self.package = package
        self.extra = extra


def _as_parameter(name: str, *value: object) -> str:
    return "".join([name, *(f"={v!r}" for v in value)])


#: how messages write options; the command line writes flags
_WRITTEN: ContextVar[Callable[..., str]] = ContextVar("prunepass_written", default=_as_parameter)


def option(name: str, *value: object) -> str:
    """An option as the reader of a message writes it: ``batch_size=3`` in Python, ``--batch-size 3`` in a shell.

    Args:
        name: of the parameter.
        value: none, or the one to show.
    """
    return _WRITTEN.get()(name, *value)


@contextmanager
def options_written(write: Callable[..., str]) -> Iterator[None]:
    """Meanwhile messages write options as ``write(name)`` and ``write(name, value)`` give them."""
    token = _WRITTEN.set(write)
    try:
        yield
    finally:
        _WRITTEN.reset(token)
