"""FLOPs of modules that run as they are, without a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from prunepass.cost.formulas import formula_of

__all__ = ["EagerFlops"]


class EagerFlops(TorchDispatchMode):
    """Counts the FLOPs of what runs inside ``with``, as `cost.formulas` counts them.

    Attributes:
        flops: by the name of the part that they were spent in; "" for all else.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.flops: Counter[str] = Counter()
        self._part = ""

    def counted_as(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, with what it spends counted as that part's."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._inside(part):
                return run(*args, **kwargs)

        return counted

    @contextmanager
    def _inside(self, part: str) -> Iterator[None]:
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = formula_of(func)
        if formula is not None:
            self.flops[self._part] += int(formula(result, *args, **kwargs))
        return result
