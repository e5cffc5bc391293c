"""From declared options to what typer reads: a command takes dataclasses, its users give one flag a field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, get_type_hints

import typer

from prunepass.cli.common import clear_errors
from prunepass.errors import options_written
from prunepass.training.data.declare import Declared, declared

__all__ = ["taking_flags"]


@dataclass(frozen=True)
class _Flag:
    """One field as a parameter of the command.

    Attributes:
        path: names of the fields that lead to it, from the function's own parameter on.
    """

    path: tuple[str, ...]
    annotation: Any
    default: Any
    said: Declared

    @property
    def name(self) -> str:
        """Of the parameter: the field's."""
        return self.path[-1]

    @property
    def shown(self) -> str:
        """As messages name it."""
        if self.said.metavar is not None:
            return self.said.metavar
        return _flags(self)[0].partition("/")[0]

    def parameter(self) -> inspect.Parameter:
        """For typer."""
        said = self.said
        if said.metavar is not None:
            info: Any = typer.Argument(metavar=said.metavar, help=said.help)
        else:
            info = typer.Option(*_flags(self), help=said.help)
        kind = self.annotation if said.parse is None else (str | None)
        default = None if said.parse is not None and self.default is not MISSING else self.default
        empty = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=Annotated[kind, info]
        )

    def value(self, given: Any) -> Any:
        """What the field gets."""
        if self.said.parse is None:
            return given
        return self.default if given is None else self.said.parse(given)


def _flags(flag: _Flag) -> tuple[str, ...]:
    return flag.said.flags or ("--" + flag.name.replace("_", "-"),)


def taking_flags(
    *, leave_out: Iterable[str] = (), helps: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: each parameter that is a dataclass of declared options becomes one flag a field.

    The command runs within `clear_errors`, and messages name its flags.

    Args:
        leave_out: fields that this command does not ask for; they keep their defaults.
        helps: by field, what it is for in this command, where that is not what the field itself says.
    """
    left_out, helps = frozenset(leave_out), dict(helps or {})

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        flags = {name: [_helped(f, helps) for f in _of(kind, (name,), left_out)] for name, kind in groups.items()}
        own = inspect.signature(function).parameters
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name in groups:
                parameters += [flag.parameter() for flag in flags[name]]
            else:
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters.append(parameter.replace(kind=keyword, annotation=hints[name]))
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)  # what must be given, first
        written = {flag.path[-1]: flag.shown for name in groups for flag in flags[name]}

        def run(**given: Any) -> None:
            with clear_errors(), options_written(lambda name, *value: _written(written, name, *value)):
                made: dict[str, Any] = {name: given[name] for name in own if name not in groups}
                for name, kind in groups.items():
                    values = {flag.path: flag.value(given[flag.name]) for flag in flags[name]}
                    made[name] = _made(kind, (name,), values)
                function(**made)

        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # where inspect looks for it
        return run

    return decorate


def _of(kind: Any, path: tuple[str, ...], left_out: frozenset[str]) -> Iterable[_Flag]:
    """The flags of a dataclass; of fields that are dataclasses, theirs."""
    defaults = {f.name: f.default for f in fields(kind)}
    for name, (annotation, said) in declared(kind).items():
        if name in left_out:
            continue
        if is_dataclass(annotation):
            yield from _of(annotation, (*path, name), left_out)
        elif said is not None:
            yield _Flag((*path, name), annotation, defaults[name], said)


def _helped(flag: _Flag, helps: Mapping[str, str]) -> _Flag:
    return replace(flag, said=replace(flag.said, help=helps.get(flag.name, flag.said.help)))


def _made(kind: Any, path: tuple[str, ...], values: Mapping[tuple[str, ...], Any]) -> Any:
    """The dataclass of these values, by path."""
    arguments = {}
    for name, (annotation, _) in declared(kind).items():
        here = (*path, name)
        if here in values:
            arguments[name] = values[here]
        elif is_dataclass(annotation):
            arguments[name] = _made(annotation, here, values)
    return kind(**arguments)


def _written(flags: Mapping[str, str], name: str, *value: object) -> str:
    """An option as one writes it in a shell."""
    flag = flags.get(name, "--" + name.replace("_", "-"))
    if not value or value[0] is True:
        return flag
    if value[0] is False:
        return flag.replace("--", "--no-", 1)
    shown = value[0]
    return f"{flag} {','.join(map(str, shown)) if isinstance(shown, (list, tuple)) else shown}"
