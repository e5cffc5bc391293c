"""What changes parameters: the optimiser that the arguments name, and its learning rate over the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prunepass.errors import OptionError

__all__ = ["optimizer_of", "schedule"]


def schedule(args: Any, steps: int, warmup: int) -> Callable[[int], float]:
    """The share of the learning rate at each of ``steps`` steps, by ``args.lr_scheduler_type``.

    Args:
        args: ``TrainingArguments``.
        warmup: steps over which the rate rises.

    Raises:
        OptionError: the schedule goes by something other than steps, or ``lr_scheduler_kwargs`` do not fit it.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind == "linear":
        return lambda step: max(0.0, min(step / warmup if warmup else 1.0, (steps - step) / max(1, steps), 1.0))
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=args.learning_rate)  # schedules want one
    try:
        made: Any = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as e:
        raise OptionError(f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} do not fit {kind}: {e}.") from None
    if not isinstance(made, LambdaLR):
        raise OptionError(f"lr_scheduler_type={kind!r}: it does not go by steps alone. Take linear or cosine.")
    share: Callable[[int], float] = made.lr_lambdas[0]
    return share


def optimizer_of(args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and options of the optimiser that ``args`` name, tried on a single number.

    Raises:
        OptionError: its package is missing, its options do not fit, or it is built from a model's layers.
    """
    from transformers import Trainer

    name = f"optim={str(getattr(args.optim, 'value', args.optim))!r}"
    if args.optim_args:
        name += f" with optim_args={args.optim_args!r}"
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
            raise OptionError(f"{name}: it is built from a model's layers, and training runs traced graphs.")
        made([nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, TypeError, ValueError) as e:
        if isinstance(e, OptionError):
            raise
        raise OptionError(f"{name}: it cannot be made: {e}") from None
    return made, options
