"""Deterministic costs: floating-point operations by torch's own registry, and allocated bytes, not resident memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _convolution_backward(grad: Any, x: Any, w: Any, biases: Any, *settings: Any, out_val: Any = None) -> int:
    # Each of the two derivatives costs what the convolution did. torch's own count multiplies the weight's by the groups, of which
    # vmap makes one per task.
    *how, wanted = settings
    once: int = flop_registry[torch.ops.aten.convolution](x, w, None, *how, out_val=grad)
    return once * (wanted[0] + wanted[1])


def _matrix_vector(*tensors: Any, out_val: Any = None, **factors: Any) -> int:
    return 2 * int(tensors[-2].numel())


_COUNTS = {
    **flop_registry,
    torch.ops.aten.convolution_backward: _convolution_backward,
    **dict.fromkeys((torch.ops.aten.mv, torch.ops.aten.addmv), _matrix_vector),
}


class _Work(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def work(fn: Callable[[], Any]) -> int:
    """Floating-point operations of ``fn()``: matrix products, convolutions and attention, by torch's flop registry for the most part.

    Eager code only: under a dispatch mode a compiled function runs as its eager original.

    >>> work(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
    48
    """
    with _Work() as counter:
        fn()
    return counter.total


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak of the bytes that ``fn()`` has allocated on a device at one time, above what was there before.

    On a CPU from the profiler's memory events, on CUDA from its own counter. Run ``fn`` once before, where its first call allocates
    what stays.

    >>> 4_000_000 <= peak_bytes(lambda: torch.ones(1_000_000)) < 4_100_000
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its C++ writes every start and stop to stderr
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*acc_events")  # of some releases, about cycles, which there are none of
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            fn()
    # One event per allocation (positive) and release (negative), in the order of time.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
