"""Seconds of a model's parts as functions of the token count, measured on the machine and runtime that will run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunepass.cost.curve import Curve
from prunepass.cost.measure import Conditions, Setup, StageParts, measure
from prunepass.errors import OptionError
from prunepass.plan import ScorerSpec
from prunepass.plan.annotations import Leave

__all__ = ["Conditions", "LatencyTable"]

FORMAT, VERSION = "prunepass-latency", 1


@dataclass(frozen=True)
class LatencyTable:
    """A `CostModel` in seconds a row: the time of a batch divided by its rows.

    The dense model is timed whole. A block's time at n tokens is the block's share of the FLOPs of the dense time at
    length n, so a block of a pruned model is taken to run as it would in a dense model of its length. What that leaves
    out, the work of scoring, selecting and putting back, is timed too: a model pruned at one place with keep near 1
    does all of it at full length.

    Attributes:
        lengths: ascending, the token counts that were timed.
        blocks: for each block its seconds at each of them.
        outside: seconds of what lies outside the blocks.
        stages: seconds of one stage.
    """

    lengths: tuple[int, ...]
    blocks: tuple[tuple[float, ...], ...]
    outside: tuple[float, ...]
    stages: tuple[float, ...]
    conditions: Conditions
    unit: str = "s"

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def at(self, block: int, n: Tensor) -> Tensor:
        """Seconds of one block on ``n`` tokens."""
        return Curve(self.lengths, self.blocks[block])(n)

    def rest(self, n: Tensor) -> Tensor:
        """Seconds outside the blocks, at the row's unpruned length ``n``."""
        return Curve(self.lengths, self.outside)(n)

    def stage(self, n: Tensor) -> Tensor:
        """Seconds of one stage that ``n`` tokens reach: scoring, selecting, gathering, and its part of putting back."""
        return Curve(self.lengths, self.stages)(n)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: Mapping[str, Any],
        *,
        target: str = "openvino",
        lengths: Sequence[int] | None = None,
        max_length: int | None = None,
        batch: int = 1,
        precision: str = "auto",
        scorer: ScorerSpec | str | Mapping[str, Any] = "attention",
        hidden: int | None = None,
        lens: int = 0,
        positions: bool = False,
        leave: Leave = "drop",
        repeats: int = 9,
        config: Mapping[str, Any] | None = None,
        on_step: Callable[[str], None] | None = None,
    ) -> LatencyTable:
        """Time ``model`` on ``target``, dense and with one stage, in turns, and take medians.

        A small encoder takes under a minute on two cores, most of it compiling.

        Args:
            model: in evaluation mode.
            example_inputs: keyword arguments of the model; their rows and tokens are repeated to each size.
            target: "openvino", "onnxruntime", "inductor", "eager", or a target of one's own.
            lengths: token counts to time; by default from 8, by halves and doubles, up to ``max_length``.
            max_length: the longest; by default what the model takes, but no more than 512.
            batch: rows a call; all are of one length.
            precision: "auto", or for OpenVINO "f32" or "bf16". Elsewhere the model's own dtype decides.
            scorer, hidden, lens, positions: of the stage, as for `BlockCosts.of`.
            leave: how tokens leave at it.
            repeats: timings of each length.
            config: the runtime's own settings.
            on_step: called with a word on what runs, ``len(table.lengths) * (repeats + 1)`` times.

        Raises:
            OptionError: a length that the model does not take, a size below 1, a precision that the target cannot set.
            PruneError: whatever the model or the target is refused for.
        """
        stage = StageParts(ScorerSpec.of(scorer), hidden, lens, positions, leave)
        setup = Setup(target, batch, precision, stage, repeats, dict(config or {}))
        return cls(**vars(measure(model, example_inputs, setup, lengths, max_length, on_step or (lambda _: None))))

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON. Returns the path."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote. Raises `OptionError` where it is missing, damaged, or something else."""
        file = Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as e:
            raise OptionError(f"The latency table {file} cannot be read: {e.strerror}.") from None
        except ValueError as e:
            raise OptionError(f"The latency table {file} is not valid JSON: {e}") from None
        return cls.from_dict(data, str(file))

    @classmethod
    def from_dict(cls, data: Any, where: str = "the mapping") -> LatencyTable:
        """A table from `to_dict`'s form. Raises `OptionError` naming ``where`` it came from."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise OptionError(f"{where} is not a latency table that prunepass wrote. Measure one with `measure`.")
        if data.get("version") != VERSION:
            raise OptionError(
                f"{where} has format version {data.get('version')}; this prunepass reads {VERSION}. Measure it again."
            )
        try:
            table = cls(
                lengths=tuple(int(n) for n in data["lengths"]),
                blocks=tuple(_seconds(block) for block in data["blocks"]),
                outside=_seconds(data["outside"]),
                stages=_seconds(data["stages"]),
                conditions=Conditions(**data["conditions"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise OptionError(
                f"{where} is a damaged latency table ({type(e).__name__}: {e}). Measure it again."
            ) from None
        table._check(where)
        return table

    def _check(self, where: str) -> None:
        rows = (*self.blocks, self.outside, self.stages)
        ascending = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        if not self.lengths or not self.blocks or not ascending or any(len(r) != len(self.lengths) for r in rows):
            raise OptionError(f"{where} is a damaged latency table: its rows do not fit its lengths. Measure it again.")


def _seconds(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
