"""Which of several ways to compute the same thing is the fastest here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from metacal._device import wait


def fastest(ways: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """The name of the way whose better one of two runs was the shortest; they take turns. One that raises is left out.

    Errors:
        Whatever the first of them raised, if all did.
    """
    seconds: dict[str, float] = {}
    errors: dict[str, Exception] = {}
    for _ in range(2):
        for name, way in ways.items():
            if name in errors:
                continue
            wait(device)
            began = time.perf_counter()
            try:
                way()
            except Exception as error:
                errors[name] = error
                continue
            wait(device)
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - began)
    if not seconds:
        raise errors[next(iter(ways))]
    return min(seconds, key=seconds.__getitem__)
