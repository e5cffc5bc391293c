"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import inspect
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from prunepass.cli.app import app

_TYPES = {int: "number", float: "number", str: "text", Path: "path"}


def markdown() -> str:
    """One section a command, with a table of its arguments and one of its options."""
    root: Any = typer.main.get_command(app)
    parts = ["## prunepass", *_options(root)]
    for name, command in root.commands.items():
        parts += [f"## prunepass {name}", _prose(command.help), f"```text\n{_usage(name, command)}\n```"]
        parts += [*_arguments(command), *_options(command)]
    return "\n\n".join(parts) + "\n"


def _usage(name: str, command: Any) -> str:
    shown = [_argument(p) if p.required else f"[{_argument(p)}]" for p in _of(command, "argument")]
    return " ".join(["prunepass", name, *shown, "[OPTIONS]"])


def _of(command: Any, kind: str) -> list[Any]:
    return [p for p in command.params if p.param_type_name == kind and not getattr(p, "hidden", False)]


def _argument(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _arguments(command: Any) -> list[str]:
    rows = [f"| `{_argument(p)}` | {_cell(p.help)} |" for p in _of(command, "argument")]
    return ["\n".join(["| argument | meaning |", "|---|---|", *rows])] if rows else []


def _options(command: Any) -> list[str]:
    hints = typing.get_type_hints(command.callback)
    rows = [f"| {_names(p, hints.get(p.name))} | {_cell(p.help)} | {_default(p)} |" for p in _of(command, "option")]
    return ["\n".join(["| option | meaning | default |", "|---|---|---|", *rows])] if rows else []


def _names(option: Any, hint: Any) -> str:
    names = ", ".join(f"`{n}`" for n in (*option.opts, *option.secondary_opts))
    kind = _kind(hint)
    return f"{names} *{kind}*" if kind else names


def _kind(hint: Any) -> str:
    """In a word, what an option takes; empty for flags."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, list):
        return next((kind for part in typing.get_args(hint) if (kind := _kind(part))), "")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(str(member.value) for member in hint)
    return _TYPES.get(hint, "")


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or callable(value) or value in ((), []):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def _prose(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("\f", "")


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
