"""Dropout of a tensor whose memory is in another order than its axes: torch.func and compiled code draw another mask than eager code.

On a CPU eager code fills the mask in the order of memory, the others in the order of the axes. (On CUDA nothing was looked at.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DROPOUTS = {F.dropout, F.alpha_dropout, torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_}


def is_reordered(x: Tensor) -> bool:
    """Whether the two would differ."""
    return x.device.type == "cpu" and not x.is_contiguous() and 0 not in x.stride()


def as_eager(dropout: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One of ``DROPOUTS`` with the mask of eager code."""
    if not is_reordered(x):
        return dropout(x, *args, **kwargs)
    by_memory = sorted(range(x.ndim), key=x.stride, reverse=True)
    dropped = dropout(x.permute(by_memory).contiguous(), *args, **kwargs).permute([by_memory.index(axis) for axis in range(x.ndim)])
    in_place = kwargs.get("inplace", len(args) > 2 and args[2]) or dropout.__name__.endswith("_")
    return x.copy_(dropped) if in_place else dropped


class Refused(TorchFunctionMode):
    """Inside, such a dropout raises RuntimeError: what follows is compiled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPOUTS and is_reordered(args[0] if args else kwargs["input"]):
            raise RuntimeError(
                "The objective drops out entries of a tensor that is not contiguous, and compiled code draws another mask there than eager "
                "code does: step and pullback would see different noise. Write dropout(x.contiguous()), or pass compile=False."
            )
        return func(*args, **(kwargs or {}))
