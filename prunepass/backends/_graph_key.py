"""A name for a graph and its weights that is the same in every process: equal names, equal computations."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import fake_value

__all__ = ["NoKeyError", "digest", "environment", "graph_text", "tensor_digest"]

#: operators of PyTorch itself: the version of torch says what they compute
_NAMESPACES = {"aten", "prims", "prim", "quantized_decomposed"}
_MODULES = {"_operator", "operator", "math", "builtins"}
_LITERALS = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, slice)


class NoKeyError(Exception):
    """Something in a graph has no text that would be the same in another process."""


def digest(parts: Iterable[Any]) -> str:
    """64 hexadecimal digits for plain data (what JSON can hold)."""
    try:
        text = json.dumps(list(parts), sort_keys=True)
    except TypeError as e:
        raise NoKeyError(f"{e}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> list[Any]:
    """Dtype, shape and a hash of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    values = hashlib.sha256(content).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), values]


def graph_text(gm: GraphModule) -> list[Any]:
    """The graph as plain data: operators, arguments, the traced inputs' shapes, and hashes of the tensors it holds.

    Nodes and symbolic sizes are numbered in order, as their names may differ from one trace to the next.

    Raises:
        NoKeyError: it holds something that only this process knows, such as a function of one's own.
    """
    numbers: dict[Node, int] = {}
    symbols: dict[Any, str] = {}
    lines: list[Any] = []
    for node in gm.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            lines.append(["placeholder", _shape(fake_value(node), symbols)])
        elif node.op == "get_attr":
            lines.append(["get_attr", _held(gm, str(node.target))])
        elif node.op in ("call_function", "call_method", "output"):
            target = node.target if isinstance(node.target, str) else _function(node.target)
            lines.append([node.op, target, _plain(node.args, numbers), _plain(node.kwargs, numbers)])
        else:
            raise NoKeyError(f"{node.op} {node.target}")
    return lines


def _held(gm: GraphModule, name: str) -> list[Any]:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, GraphModule):
        return graph_text(value)
    if isinstance(value, Tensor):
        return tensor_digest(value)
    raise NoKeyError(f"the graph holds {type(value).__name__} {name}")


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in _NAMESPACES:
            return str(target)
    elif isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher order {target.name()}"
    else:
        module, name = getattr(target, "__module__", None) or "", getattr(target, "__qualname__", "<")
        if (module in _MODULES or module.partition(".")[0] == "torch") and "<" not in name:
            return f"{module}.{name}"
    raise NoKeyError(f"the function {target} is not PyTorch's own")


def _shape(value: Any, symbols: dict[Any, str]) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), [_size(size, symbols) for size in value.shape]]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return [type(value).__name__, _size(value, symbols)]
    return [type(value).__name__]  # its value counts where it is read, and is keyed there


def _size(size: Any, symbols: dict[Any, str]) -> Any:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(symbol, f"s{len(symbols)}")
    # renamed at once: two names may trade places
    return str(expression.xreplace({old: type(old)(f"_{new}") for old, new in symbols.items()}))


def _plain(value: Any, numbers: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": numbers[value]}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex() if math.isfinite(value) else str(value)}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_plain(v, numbers) for v in value)]
    if isinstance(value, dict):
        return {"dict": [[_plain(k, numbers), _plain(v, numbers)] for k, v in value.items()]}
    if value is Ellipsis or isinstance(value, _LITERALS):
        return {type(value).__name__: str(value)}
    raise NoKeyError(f"an argument is {type(value).__name__}")


@functools.cache
def environment(runtimes: Sequence[str]) -> list[Any]:
    """What a lowered graph depends on besides itself: versions of prunepass, torch and ``runtimes``, the code that
    lowers, and the kind of CPU."""
    from importlib.metadata import version

    from prunepass import __version__

    code = [f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py"))]
    lowering = hashlib.sha256(b"\0".join(code)).hexdigest()
    return [__version__, lowering, torch.__version__, {name: version(name) for name in runtimes}, _cpu()]


def _cpu() -> list[str]:
    """Model and abilities of the CPU, for which a runtime may choose other code."""
    kind = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return kind
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return [*kind, *(fields.get(name, "") for name in ("model name", "flags", "Features"))]
