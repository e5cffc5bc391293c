"""A pruned model as a module: called, moved and copied as other modules are, or with a sentence on why not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.graph.calls import Expected
from prunepass.graph.capture import Captured, export_again
from prunepass.graph.inputs import TOKENS_TO_TRACE
from prunepass.passes.result import PruneResult
from prunepass.plan.levels import LEVEL, chosen_level, level_example

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from prunepass.plan import PrunePlan

__all__ = ["PrunedModule"]


class PrunedModule(nn.Module):
    """A pruned model: the signature and the output type of the model it came from.

    It keeps the dtype and the device that it was traced with, as both stand in the graph.

    Attributes:
        plan: what was asked for; of several plans, the stages of all, each as deep as the deepest. Without stages where
            streams have plans of their own.
        streams: by stream, the plan of each, where several were pruned.
        result: what the passes did.
        graph_module: the rewritten graph. Its parameters are the model's own; the keys of its ``state_dict`` are the
            model's after ``graph_module.``.
    """

    plan: PrunePlan
    streams: Mapping[str, PrunePlan]
    result: PruneResult
    graph_module: GraphModule

    def __init__(self, captured: Captured, result: PruneResult, model: nn.Module | None = None) -> None:
        super().__init__()
        self.graph_module = result.graph_module
        self.plan = result.plan
        self.streams = {str(one.plan.stream): one.plan for one in result.streams}
        self.result = result
        self.config = getattr(model, "config", None)
        self._name = "a graph" if model is None else type(model).__name__
        self._captured = captured
        self._signature = None if model is None else inspect.signature(model.forward)
        self._expected = Expected.of(captured.exported, None if result.inputs is None else result.inputs.rows)
        self._traced = self._place()
        self._exported: ExportedProgram | None = None
        self._levels = 0 if result.levels is None else len(result.levels.plans)
        self.training = False

    def __repr__(self) -> str:
        if self.streams:
            return f"PrunedModule({self._name}, {', '.join(map(repr, self.streams.values()))})"
        several = f"{self._levels} plans, of all stages " if self._levels else ""
        return f"PrunedModule({self._name}, {several}{self.plan!r})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the inputs that the model was traced with, by position or by name, and returns what the model does.

        A mask may be of any dtype; what has one row stands for all rows. With several plans there is also ``level``, a
        whole number: 0 for all tokens, i for the i-th plan. Where it is left out, `prunepass.level` says it; else it is
        1.

        Raises:
            OptionError: other inputs than those, or of another shape, dtype or device; no such level; the weights were
                moved or cast.
        """
        if self._place() != self._traced:
            raise OptionError(_moved(self._traced, *self._place()))
        chosen = {}
        if self._levels:
            number = chosen_level(self._levels, kwargs.pop(LEVEL, None))
            chosen[LEVEL] = torch.tensor([number], device=self.device)
        elif LEVEL in kwargs and self._signature is not None and LEVEL not in self._signature.parameters:
            raise OptionError(
                f"This model has one plan. Give prunepass.prune a list of plans for calls with a {LEVEL}."
            )
        args, kwargs = self._arranged(args, kwargs)
        args, kwargs = self._expected.fitted(args, kwargs)
        return self.graph_module(*args, **kwargs, **chosen)

    def _arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs as they stood in the traced call, which the graph insists on."""
        traced = self._captured.exported.example_inputs
        if traced is None or self._signature is None:
            return args, kwargs
        positional, named = len(traced[0]), tuple(traced[1])
        if len(args) == positional and set(kwargs) == set(named):
            return args, {n: kwargs[n] for n in named}
        names = tuple(self._signature.parameters)[:positional] + named
        try:
            given = dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as e:
            raise OptionError(f"The pruned model takes {', '.join(names)}: {e}.") from None
        for rest in [p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
            given |= given.pop(rest, {})
        given = {k: v for k, v in given.items() if v is not None or k in names}
        if set(given) != set(names):
            raise OptionError(
                f"The pruned model was traced with {', '.join(names)}, but is called with "
                f"{', '.join(given) or 'nothing'}. "
                "Pass the same inputs, or prune the model with example inputs like those of this call."
            )
        return tuple(given[n] for n in names[:positional]), {n: given[n] for n in named}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._place()[1]

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the model's parameters."""
        return self._place()[0]

    def can_generate(self) -> bool:
        """False, as pipelines ask: the graph holds one forward pass; ``generate()`` is pruned by torch.compile."""
        return False

    def _place(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the first floating parameter or buffer."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
        return torch.get_default_dtype(), torch.device("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedModule:
        """What ``to``, ``half``, ``cuda`` and their kin call: refused where it would change the dtype or the device."""
        dtype, device = self._place()
        changed = fn(torch.empty(0, dtype=dtype, device=device))
        if (changed.dtype, changed.device) != (dtype, device):
            raise OptionError(_moved((dtype, device), changed.dtype, changed.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        """A module with weights of its own. What is only read (plan, result, the traced program) is shared."""
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        memo[id(self)] = made
        shared = {k: v for k, v in self.__dict__.items() if k not in made.__dict__}
        made.__dict__.update(shared, _exported=None, training=self.training)
        made.graph_module = copy.deepcopy(self.graph_module, memo)
        made.config = copy.deepcopy(self.config, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OptionError(
            "A pruned module cannot be pickled: its graph is code, and reading it back would run code. "
            "Prune the model again, or write it to a folder with prunepass.export(model, plan, folder, to='pt2')."
        )

    def train(self, mode: bool = True) -> PrunedModule:
        """Sets the flag only: dropout was fixed when the model was traced (trace it in train mode for dropout)."""
        self.training = mode
        return self

    @property
    def exported(self) -> ExportedProgram:
        """The rewritten model as an exported program with dynamic batch and length, for lowering.

        With several plans it takes ``level``, [1] int64, besides; one that there is not is taken for the nearest.
        """
        if self._exported is None:
            tokens = self.graph_module.meta.get(TOKENS_TO_TRACE, self.plan.tokens_to_trace)
            extra = {LEVEL: level_example(self.device)} if self._levels else {}
            self._exported = export_again(self.graph_module, self._captured.exported, tokens, extra)
        return self._exported


def _moved(traced: tuple[torch.dtype, torch.device], dtype: torch.dtype, device: torch.device) -> str:
    was, now = (f"{str(t).removeprefix('torch.')} on {d}" for t, d in (traced, (dtype, device)))
    return (
        f"This pruned module was traced in {was}, which its graph holds to, and its weights would be {now}. Cast or "
        "move the original model first, then prune it again."
    )
