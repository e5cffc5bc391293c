"""Watching the calls of functions compiled with ``tokprune``, so that Dynamo does not quietly run one unpruned.

Dynamo hands a backend graphs and no more. Where it makes none, as after ``torch._dynamo.config.recompile_limit`` graphs
of one function, it runs the function as it is, and the backend is not told. What it does tell is that a call begins and
ends: a backend may name a context for that, ``backend_ctx_ctor``. Ours raises Dynamo's limits during the call, for it
alone, and sees at its end whether a pruned graph ran.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from prunepass.errors import RefusalError

__all__ = ["install", "marked", "watched"]

#: graphs of one function that a call may reach; each costs a compilation, and memory for as long as the process lives
_LIMIT = 1024
#: the same, over all calls of ``torch.compile`` that share the function
_TOTAL = 16 * _LIMIT

#: takes what went wrong in a call that a fallback covers, and the options that torch.compile got
Report = Callable[[str, Mapping[str, Any]], None]
#: takes a module that is compiled, and the options of one that is compiled in place
Look = Callable[[Any, Mapping[str, Any] | None], None]


class _Open(threading.local):
    """The watched calls that this thread is in, outermost first; each says whether a graph of ours ran."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_open = _Open()


def watched() -> bool:
    """Whether this thread is in a call that is watched."""
    return bool(_open.calls)


def marked(lowered: Callable[..., Any]) -> Callable[..., Any]:
    """``lowered``, which also tells the calls it runs in that a graph of ours ran."""

    def run(*args: Any) -> Any:
        for call in _open.calls:
            call.ran = True
        return lowered(*args)

    return run


class _Call:
    """One call of a compiled function, entered and left by Dynamo."""

    def __init__(self, calls: _Calls) -> None:
        self.calls = calls
        self.ran = False

    def __enter__(self) -> None:
        self.before = sys.exc_info()[1]
        self.restore = self.calls.patch()
        _open.calls.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.calls.remove(self)
        self.restore()
        raised = sys.exc_info()[1]  # Dynamo passes None always
        if raised is not None and raised is not self.before:
            if type(raised).__name__ == "FailOnRecompileLimitHit":
                raise RefusalError(*_limit_hit()) from raised
            return
        if not self.ran and _stance() == "default":
            self.calls.ran_unpruned(_module_of(sys._getframe(1)))


class _Calls:
    """The calls of what one ``torch.compile`` returned.

    Args:
        options: what it was given.
    """

    def __init__(self, options: Mapping[str, Any], report: Report) -> None:
        self.options, self.report = options, report
        self.dense = options.get("fallback") == "dense"
        self.started = self.reported = False
        config: Any = torch._dynamo.config
        limits = {
            "recompile_limit": max(config.recompile_limit, _LIMIT),
            "accumulated_recompile_limit": max(config.accumulated_recompile_limit, _TOTAL),
        }
        # "suppress_errors" would run what we refuse
        strict = {} if self.dense else {"fail_on_recompile_limit_hit": True, "suppress_errors": False}
        self.patch: Callable[[], Callable[[], None]] = config._make_closure_patcher(**limits, **strict)

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        if not self.started:
            self.started = True
            _reopen()
        return _Call(self)

    def ran_unpruned(self, module: str | None) -> None:
        """Raises `RefusalError` for a compiled module, unless the fallback covers it. A function may have returned
        before it came to a tensor, which is no fault."""
        _reopen()
        reason = (
            f"{module or 'the compiled function'} was called and Dynamo made no graph of it: nothing was pruned. It is "
            "disabled (torch.compiler.disable, torch._dynamo.disable), or Dynamo cannot trace it."
        )
        if module is not None and not self.dense:
            raise RefusalError(
                reason,
                hint="TORCH_LOGS=graph_breaks says what stands in the way. Modules of torch.nn itself are traced by "
                "torch.compile(module), not by module.compile(). Compile a module that can be traced, or give the "
                "option fallback='dense' to run it unpruned.",
            )
        if not self.reported:
            self.reported = True
            self.report(reason, self.options)


def _limit_hit() -> tuple[str]:
    return (
        "Dynamo has compiled this function as often as it may, and would run it unpruned from now on. Each kind of "
        "argument, each plan and, with dynamic=False, each length is a graph of its own. Make lengths dynamic "
        f"(dynamic=True), call torch.compiler.reset() between plans, or give torch.compile a recompile_limit above "
        f"the {_LIMIT} graphs taken where none is given.",
    )


def _stance() -> str:
    from torch._dynamo import eval_frame

    return str(getattr(getattr(eval_frame, "_stance", None), "stance", "default"))


def _module_of(frame: Any) -> str | None:
    """The class of the module whose call ends in Dynamo's ``frame``, if it is one."""
    called = frame.f_locals.get("fn")
    called = getattr(called, "__wrapped__", called)  # torch.compile puts a function around modules of torch.nn
    owner = getattr(called, "__self__", called)
    return type(owner).__name__ if isinstance(owner, torch.nn.Module) else None


def _reopen() -> None:
    """Let functions compile again that another backend has brought to Dynamo's limit: Dynamo runs those as they are,
    for every backend, without asking."""
    from torch._dynamo import convert_frame, eval_frame, types

    hooks: Any = eval_frame
    kinds: Any = types
    limit = torch._dynamo.config.recompile_limit
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        if code is not None and len(hooks._debug_get_cache_entry_list(code)) >= limit:
            default = kinds.FrameAction.DEFAULT
            hooks.set_code_exec_strategy(code, kinds.FrameExecStrategy(default, default))


class _Context:
    """``backend_ctx_ctor`` of the wrapper that torch puts around each backend: ours for one, none for the others."""

    def __init__(self, backend: Callable[..., Any], report: Report, look: Look) -> None:
        self.backend, self.report, self.look = backend, report, look

    def __get__(self, wrapper: Any, owner: Any = None) -> Any:
        options: dict[str, Any] = {}
        if wrapper is None or not _unwraps_to(wrapper, self.backend, options):
            return contextlib.nullcontext
        model, in_place = _compiled_now(sys._getframe(1))
        if model is not None:
            self.look(model, options if in_place else None)
        return _Calls(options, self.report)


def _compiled_now(frame: Any) -> tuple[torch.nn.Module | None, bool]:
    """The module that ``torch.compile`` was called with, somewhere above ``frame``, and whether it is compiled in
    place."""
    while frame is not None and frame.f_code is not torch.compile.__code__:
        frame = frame.f_back
    given = frame.f_locals.get("model") if frame is not None else None
    model = getattr(given, "__self__", given)  # Module.compile gives a method of the module
    return (model, model is not given) if isinstance(model, torch.nn.Module) else (None, False)


def _unwraps_to(wrapper: Any, backend: Any, options: dict[str, Any]) -> bool:
    """Whether ``wrapper`` calls ``backend``; collects the options it gives."""
    for _ in range(8):
        given = getattr(wrapper, "kwargs", None) or getattr(wrapper, "keywords", None) or {}
        options.update(given.get("options") or {})
        if wrapper is backend:
            return True
        inner = (getattr(wrapper, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn", "func"))
        wrapper = next((one for one in inner if one is not None), None)
        if wrapper is None:
            return False
    return False


def install(backend: Callable[..., Any], report: Report, look: Look) -> None:
    """Have Dynamo tell of calls of what is compiled with ``backend``.

    Args:
        report: called for calls that ran unpruned and do not raise.
        look: called with each module that is compiled, and where that is in place (``module.compile``), its options.
    """
    from torch._dynamo.repro.after_dynamo import WrapBackendDebug

    WrapBackendDebug.backend_ctx_ctor = _Context(backend, report, look)  # type: ignore[attr-defined]  # torch looks for it
