"""Checks of what users hand in: each message names the argument, what was expected, what came and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metacal import tree
from metacal._typing import Tree


def same_structure(name: str, got: Tree, like_name: str, like: Tree) -> None:
    """Raises ValueError naming the first path at which two trees differ in structure or shape."""
    if tree.structure(got) == tree.structure(like) and all(
        a.shape == b.shape for a, b in zip(tree.leaves(got), tree.leaves(like), strict=True)
    ):
        return
    for path, wanted in zip_longest(tree.paths(got), tree.paths(like)):
        if path != wanted:
            raise ValueError(
                f"`{name}` should have the structure of `{like_name}`; they first differ at "
                f"'{path if path is not None else '(nothing)'}' where `{like_name}` has "
                f"'{wanted if wanted is not None else '(nothing)'}'."
            )
    for path, a, b in zip(tree.paths(got), tree.leaves(got), tree.leaves(like), strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"`{name}` should have the shapes of `{like_name}`; at '{path}' it has {tuple(a.shape)} where "
                f"`{like_name}` has {tuple(b.shape)}."
            )


def differentiable_tree(name: str, value: Tree) -> None:
    """Raises TypeError unless every leaf is a floating-point tensor."""
    for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
        where = f"`{name}`" + (f" at '{path}'" if path else "")
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, nn.Module):
                raise TypeError(
                    f"{where} should be a tensor, got the module {type(leaf).__name__}. Pass its tensors by name: "
                    "dict(module.named_parameters()), whose .grad a backward pass fills, or the copies metacal.functional(module).params; "
                    "metacal.functional(module).apply takes either."
                )
            raise TypeError(f"{where} should be a tensor, got {type(leaf).__name__}. Wrap numbers: torch.tensor({leaf!r}).")
        if leaf.is_inference():
            raise TypeError(f"{where} was made under torch.inference_mode() and cannot be differentiated. Clone it outside: x.clone().")
        if not tree.is_floating(leaf):
            raise TypeError(
                f"{where} should be floating point to be differentiated, got {leaf.dtype}. Keep integers in the batch or in "
                "`carry`, or convert with .float()."
            )


def one_device(**trees: Tree) -> None:
    """Raises ValueError if the trees' tensors with at least one dimension live on several devices."""
    first: tuple[str, torch.device] | None = None
    for name, value in trees.items():
        for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:  # torch mixes 0-dim CPU tensors with any device
                continue
            here = f"`{name}`" + (f" at '{path}'" if path else "")
            if first is None:
                first = (here, leaf.device)
            elif leaf.device != first[1]:
                raise ValueError(
                    f"All tensors should be on one device: {first[0]} is on {first[1]}, {here} is on {leaf.device}. "
                    "Move them with metacal.tree.to(tree, device)."
                )


def batches(value: Any) -> None:
    """Raises TypeError unless ``value`` can be read again: a sequence."""
    if isinstance(value, Sequence) or (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        if isinstance(value, (Tensor, dict, str)):
            raise TypeError(
                f"`batches` should be a sequence with one batch per step, got a {type(value).__name__}. For one step pass "
                "[batch]; for n steps on the same batch pass metacal.repeat(batch, n)."
            )
        if isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value) and len({x.shape[1:] for x in value}) > 1:
            raise TypeError(
                "`batches` should be a sequence with one batch per step, got a tuple of tensors of shapes "
                f"{[tuple(x.shape) for x in value]}, which looks like one batch. For one step pass [batch]; for n steps on the same batch "
                "pass metacal.repeat(batch, n)."
            )
        return
    raise TypeError(
        "`batches` should be a sequence: it is read again when steps are recomputed. Got a "
        f"{type(value).__name__}; pass list(batches), or metacal.take(loader, n) for a DataLoader."
    )


def scalar(name: str, value: Any) -> Tensor:
    """Returns ``value`` if it is a scalar tensor, else raises."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` should return a scalar tensor, got {type(value).__name__}. To return logs beside the loss, wrap it: "
            "metacal.with_aux(objective)."
        )
    if value.numel() != 1:
        raise ValueError(f"`{name}` should return a scalar, got a tensor of shape {tuple(value.shape)}. Reduce it: .mean() or .sum().")
    return value if value.ndim == 0 else value.reshape(())


_COPY = "Change a copy: x = x + noise and not x += noise, x.clone(), no inplace=True in a network's first layer."
_INSTEAD = {
    "params": "What moves them belongs in the step after it: solver._replace(step=...), or the optimizer.",
    "carry": "Return new tensors; for a module's buffers use metacal.functional(module).apply(params, x, carry=carry).",
}


@contextmanager
def left_alone(**arguments: Tree) -> Iterator[None]:
    """Raises ValueError if a tensor among the objective's arguments is changed in place inside: steps are taken again from them."""
    before = {name: _versions(value) for name, value in arguments.items()}
    yield
    for name, value in arguments.items():
        if (now := _versions(value)) != before[name]:
            path = next(path for path, a, b in zip(tree.paths(value), before[name], now, strict=True) if a != b)
            where = f"`{name}`" + (f" at '{path}'" if path else "")
            raise ValueError(f"`objective` changed its {where} in place, and steps are taken again from it. {_INSTEAD.get(name, _COPY)}")


def _versions(value: Tree) -> list[int]:
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else 0 for x in tree.leaves(value)]


def pair(name: str, value: Any, what: str) -> tuple[Any, Any]:
    """Returns ``value`` if it is a pair, else raises TypeError."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"`{name}` should return {what}, got {type(value).__name__}.")
    return value


def one_of(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless ``value`` is one of the values of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def whole(name: str, value: Any, at_least: int = 1) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"`{name}` should be an integer of at least {at_least}, got {value!r}.")


def number(name: str, value: Any, remedy: str, *, positive: bool = False) -> None:
    """Raises unless ``value`` is a number of at least 0 (``positive``: above), or a tensor, at which nobody looks."""
    if isinstance(value, Tensor):
        return
    least = "positive" if positive else "at least 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` should be a number, {least}, got {value!r}; {remedy}.")
    if not (float(value) > 0 if positive else float(value) >= 0):
        raise ValueError(f"`{name}` should be {least}, got {value!r}; {remedy}.")
