"""Tensors to NumPy arrays and back without a copy, for runtimes that speak NumPy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunepass.errors import PruneError

__all__ = ["from_numpy", "to_numpy"]


def to_numpy(tensor: Tensor) -> Any:
    """The tensor's memory as an array of the same shape; bfloat16 comes as its bits in uint16 (NumPy has no such type).

    The array is valid as long as the tensor. Non-contiguous tensors are copied first.
    """
    if tensor.device.type != "cpu":
        raise PruneError(
            f"An input is on {tensor.device}, but this runtime takes tensors in main memory. Move the inputs with "
            ".cpu(), or use target='inductor'."
        )
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_numpy(array: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the array's memory, of ``dtype``. Arrays of 16 raw bits are read as bfloat16 where that is asked."""
    if dtype == torch.bfloat16 and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
