"""Real text that every machine has: the documentation strings of installed packages."""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

__all__ = ["DOCUMENTED_MODULES", "docstrings", "lengths_in_words"]

logger = logging.getLogger(__name__)

#: Modules with long, readable documentation. Those not installed are passed over.
DOCUMENTED_MODULES = (
    *("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random"),
    *("scipy.cluster.hierarchy", "scipy.cluster.vq", "scipy.differentiate", "scipy.fft", "scipy.integrate"),
    *("scipy.interpolate", "scipy.io", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal"),
    *("scipy.signal.windows", "scipy.sparse", "scipy.sparse.csgraph", "scipy.sparse.linalg", "scipy.spatial"),
    *("scipy.spatial.distance", "scipy.spatial.transform", "scipy.special", "scipy.stats", "scipy.stats.qmc"),
    *("torch", "torch.autograd", "torch.autograd.functional", "torch.cuda", "torch.distributed"),
    *("torch.distributions", "torch.export", "torch.fft", "torch.func", "torch.fx", "torch.jit", "torch.library"),
    *("torch.linalg", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.utils", "torch.optim"),
    *("torch.optim.lr_scheduler", "torch.profiler", "torch.special", "torch.utils.checkpoint", "torch.utils.data"),
)


def docstrings(
    modules: Sequence[str] = DOCUMENTED_MODULES, *, minimum_characters: int = 800, limit: int | None = None
) -> dict[str, str]:
    """Documentation of the public names of ``modules`` and of their classes' methods, each text once.

    Args:
        modules: names of modules to read; one that is not installed is passed over.
        minimum_characters: shorter texts are left out.
        limit: stop after this many.

    Returns:
        ``{"numpy.linalg.svd": "Singular Value Decomposition. ...", ...}`` in the order of ``modules``.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at a deprecated name is no use of it
        for name, text in _all_texts(modules):
            if limit is not None and len(found) >= limit:
                break
            if len(text) >= minimum_characters and text not in seen:
                seen.add(text)
                found[name] = text
    return found


def lengths_in_words(lengths: Sequence[int]) -> str:
    """How long texts of so many tokens are: the most that half and nine tenths of them have."""
    ordered = sorted(lengths)
    half, most = (ordered[(len(ordered) * tenths - 1) // 10] for tenths in (5, 9))
    texts = "1 text" if len(ordered) == 1 else f"{len(ordered)} texts"
    return f"{texts}: half have up to {half} tokens, nine tenths up to {most}, the longest {ordered[-1]}."


def _all_texts(modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    for module_name in modules:
        module = _import(module_name)
        if module is None:
            continue
        for name, value in _public(module):
            yield from _text(f"{module_name}.{name}", value)
            if not inspect.isclass(value):
                continue
            for method in sorted(vars(value)):
                if not method.startswith("_"):
                    yield from _text(f"{module_name}.{name}.{method}", inspect.getattr_static(value, method))


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        logger.debug("%s is not installed; its documentation is left out", name)
        return None


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name in sorted(set(getattr(module, "__all__", dir(module)))):
        value = None if name.startswith("_") else getattr(module, name, None)
        if callable(value):
            yield name, value


def _text(name: str, value: object) -> Iterator[tuple[str, str]]:
    text = inspect.getdoc(value)
    if text:
        yield name, text
