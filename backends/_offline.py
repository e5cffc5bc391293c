"""What every runtime outside PyTorch needs between Dynamo's graph and its own session.

`OfflineGraph` is the callable that Dynamo gets. It builds a session from an exported program when it first can, builds
another when parameters changed or sizes leave the range of the first, and gives each caller tensors of its own.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from prunepass.backends import cache
from prunepass.backends._binding import Layout, Roles, export
from prunepass.backends._graph_key import NoKeyError
from prunepass.backends._programs import Session, Shapes
from prunepass.backends._stored import Files, Stored, session_key
from prunepass.errors import PruneError
from prunepass.graph.inputs import fake_value

__all__ = ["OfflineGraph", "refuse_dtypes"]

logger = logging.getLogger(__name__)

#: sets of weights (with the values of numbers) kept for one graph, and sessions for each; older ones are dropped
MAX_SESSIONS = 8
#: elements of each weight that are compared at each call, at least where it has as many
_SAMPLED = 8
#: by their size in bytes, what elements are read as
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True)
class _Variant:
    """A session and the sizes it holds for."""

    layout: Layout
    session: Session
    shapes: Shapes


@dataclass
class _Weights:
    """The sessions made of one set of weights.

    Attributes:
        tensors: the weights, detached: they keep the memory alive, so that its addresses stay theirs, where a parameter
            is given other memory (``parameter.data = other``).
        versions: how often each had been changed in place.
        samples, state: a few elements of each, and what they were.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    samples: tuple[Any, ...]
    state: bytes
    variants: list[_Variant] = field(default_factory=list)
    tried_dynamic: bool = False

    @classmethod
    def of(cls, weights: Sequence[Tensor], versions: tuple[int, ...]) -> _Weights:
        tensors = tuple(w.detach() for w in weights)
        samples = tuple(s for t in tensors if (s := _sample(t)) is not None)
        return cls(tensors, versions, samples, _bytes_of(samples))

    def are_as_before(self, versions: tuple[int, ...]) -> bool:
        return self.versions == versions and self.state == _bytes_of(self.samples)


class OfflineGraph:
    """A graph that runs on a runtime of constant weights and tensor inputs. Threads may call it at once.

    Weights are taken at the first call (at once where ``example_inputs`` holds real tensors). A later call with other
    parameters, or with parameters changed in place, gets a session of its own. Changes through ``tensor.data`` are not
    counted by PyTorch; those of whole tensors show in a few elements that are compared at each call. To change single
    elements assign with ``copy_`` under ``torch.no_grad()`` instead, as optimizers do.

    Args:
        graph_module: Dynamo's or an ATen graph; ``meta`` of its placeholders says what is a parameter.
        example_inputs: one value a placeholder.
        build: makes a session of an exported program.
        target: the runtime's name, for messages.
        files: how the runtime keeps a model on disk, if it can; `prunepass.backends.cache.current` says where.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        build: Callable[[ExportedProgram], Session],
        target: str,
        files: Files | None = None,
    ) -> None:
        self._graph_module = graph_module
        self._build = build
        self._target = target
        folder = cache.current()
        self._files = files
        self._entries = cache.Entries(folder) if folder is not None and files is not None else None
        self._roles = Roles.of(graph_module.graph, example_inputs)
        self._own_weights = (*graph_module.parameters(), *graph_module.buffers())
        self._dynamic = _has_open_dims(graph_module, self._roles)
        self._sessions: OrderedDict[Any, _Weights] = OrderedDict()
        self._lock = threading.Lock()
        if all(_is_real(example_inputs[i]) for i in self._roles.read):
            self._variant(example_inputs)

    def __call__(self, *args: Any) -> Any:
        variant = self._variant(args)
        tensors = [args[i] for i in self._roles.tensors]
        outputs = variant.session(tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self._weights_of(args))):
            outputs = forward_only(outputs, self._target)
        return variant.layout.unflatten(outputs)

    def _weights_of(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        return (*(args[i] for i in self._roles.constants), *self._own_weights)

    def _variant(self, args: Sequence[Any]) -> _Variant:
        sizes = tuple(tuple(args[i].shape) for i in self._roles.tensors)
        with self._lock:
            entry = self._entry(args)
            for variant in entry.variants:
                if variant.shapes.cover(sizes):
                    return variant
            variant = self._make(args, entry, sizes)
            entry.variants[MAX_SESSIONS - 1 :] = []
            entry.variants.insert(0, variant)
            return variant

    def _entry(self, args: Sequence[Any]) -> _Weights:
        weights = self._weights_of(args)
        numbers = tuple(float(args[i]) for i in self._roles.scalars)
        key = (numbers, tuple(w.data_ptr() for w in weights))
        versions = tuple(_version(w) for w in weights)
        entry = self._sessions.get(key)
        if entry is None or not entry.are_as_before(versions):
            entry = self._sessions[key] = _Weights.of(weights, versions)
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return entry

    def _make(self, args: Sequence[Any], entry: _Weights, sizes: Sequence[Any]) -> _Variant:
        if self._dynamic and not entry.tried_dynamic:
            entry.tried_dynamic = True
            try:
                variant = self._build_variant(args, dynamic=True)
            except PruneError as e:
                # what is wrong with open sizes only, fixed ones do without; anything else fails again below
                logger.info("%s: no session for all sizes, so one for each: %s", self._target, e)
                return self._build_variant(args, dynamic=False)
            if variant.shapes.cover(sizes):
                return variant
            entry.variants.append(variant)
        return self._build_variant(args, dynamic=False)

    def _build_variant(self, args: Sequence[Any], *, dynamic: bool) -> _Variant:
        logger.debug("%s: building a session, %s sizes", self._target, "open" if dynamic else "fixed")
        # where Dynamo is compiling, neither export nor conversion may write into its guards and fake tensors
        with torch._guards.tracing(None):
            try:
                return self._stored_variant(args, dynamic) or self._new_variant(args, dynamic)
            except NoKeyError as e:
                logger.info("%s: a graph is not kept on disk: %s", self._target, e)
                cache.count("skipped")
                return self._new_variant(args, dynamic)

    def _new_variant(self, args: Sequence[Any], dynamic: bool) -> _Variant:
        bound, program = export(self._graph_module, self._roles, args, dynamic=dynamic)
        shapes = Shapes.of(program)  # before what builds can narrow them
        return _Variant(bound.layout, self._build(program), shapes)

    def _stored_variant(self, args: Sequence[Any], dynamic: bool) -> _Variant | None:
        """From the cache on disk, or new and written there; None where there is no cache or it cannot be written."""
        if self._entries is None or self._files is None:
            return None
        gm = self._graph_module
        key = session_key(gm, self._roles, args, self._files, dynamic=dynamic)
        stored = Stored.read(self._entries, key, self._files, gm)
        if stored is not None:
            cache.count("hits")
            logger.info("%s: a session from %s", self._target, self._entries.folder / key)
        else:
            _, program = export(gm, self._roles, args, dynamic=dynamic)
            stored = Stored.write(self._entries, key, self._files, gm, program)
            cache.count("misses")
        return None if stored is None else _Variant(stored.layout, stored.session, stored.shapes)


def _has_open_dims(gm: GraphModule, roles: Roles) -> bool:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return any(isinstance(s, torch.SymInt) for i in roles.tensors for s in fake_value(placeholders[i]).shape)


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, FakeTensor)
    return isinstance(value, (int, float, bool))  # not SymInt and its kin


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; inference tensors keep no count (and may be changed in inference mode only)."""
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Any:
    """A few elements of a weight, as an array that sees later changes; None where it lies outside the CPU's memory."""
    if (
        type(tensor) is not Tensor
        or tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or not tensor.numel()
    ):
        return None
    # through the dimensions in the order of their strides, weights that were transposed are one stretch of memory
    dense = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if not dense.is_contiguous():
        return None
    words = dense.view(-1).view(_WORDS[tensor.element_size()])
    step = max(1, words.numel() // _SAMPLED - 1)  # no multiple of a row's size, to see more than one column
    return words.numpy()[::step]


def _bytes_of(samples: Sequence[Any]) -> bytes:
    return b"".join([sample.tobytes() for sample in samples])


def refuse_dtypes(program: ExportedProgram, dtypes: set[torch.dtype], why: str, *, inside: bool = False) -> None:
    """Raise `PruneError` where an input or a weight has one of ``dtypes``, which the runtime cannot honour.

    Args:
        why: what follows "NAME is DTYPE and".
        inside: refuse values computed in these dtypes, too. Under `torch.autocast` inputs and weights are float32.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            continue
        found = f"{node.name} is {str(value.dtype).removeprefix('torch.')} and {why}"
        if node.op == "placeholder":
            raise PruneError(
                f"{found}. Cast the model and its inputs first, for instance with model.float(), or choose another "
                "target."
            )
        if inside:
            raise PruneError(
                f"{found}. If this runs under torch.autocast, leave its block; else take out the cast to that dtype, "
                "or choose another target."
            )


class _ForwardOnly(torch.autograd.Function):
    """Marks outputs as differentiable, as eager's would be, and says at ``backward`` why they are not."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, target: str, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.target = target
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return tuple(o.view_as(o) for o in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise PruneError(
            f"backward() through target {ctx.target!r}, which computes forward passes only. Run it under "
            "torch.no_grad(), or train with target='inductor'."
        )


def forward_only(outputs: Sequence[Tensor], target: str) -> list[Tensor]:
    """The outputs as differentiable tensors whose ``backward`` raises `PruneError`."""
    anchor = torch.empty(0, requires_grad=True)
    return list(_ForwardOnly.apply(anchor, target, *outputs))  # type: ignore[no-untyped-call]  # torch's own
