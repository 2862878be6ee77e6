"""What an optimizer is: torchopt's pair ``(init, update)``, and what all of ours share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import reduce
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metacal import tree
from metacal._typing import Tree

with warnings.catch_warnings():
    # torchopt reaches torch.func through its former home, the deprecated `functorch`.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import torchopt
    from torchopt.base import ChainedGradientTransformation
    from torchopt.base import GradientTransformation as GradientTransformation

Hyperparameter: TypeAlias = "float | Tensor | Callable[[Tensor], float | Tensor]"
"""A number, a 0-dim tensor, or a schedule: ``step count -> value``.

A schedule is given the number of steps already taken (0 at the first) as a 0-dim *floating* tensor in the params' precision,
so that ``lambda t: 0.1 * 0.9**t`` loses no digits; write ``rates[t.long()]`` to look a value up.
"""


class DifferentiableTransformation(GradientTransformation):
    """A ``torchopt`` transformation known to be a pure, differentiable function: it needs no probe."""


def is_differentiable(transformation: GradientTransformation) -> bool:
    """Whether a transformation is ours, or a torchopt chain of ours."""
    if isinstance(transformation, ChainedGradientTransformation):
        return all(is_differentiable(part) for part in transformation.transformations)
    return isinstance(transformation, DifferentiableTransformation)


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other; ours and torchopt's mix.

    A chain of our own parts is ours again, and needs no probe; so is one built by ``torchopt.chain``.

    >>> from metacal import optim
    >>> optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1, momentum=0.9))
    """
    whole = torchopt.chain(*transformations)
    return DifferentiableTransformation(whole.init, whole.update) if all(map(is_differentiable, transformations)) else whole


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """``params + updates``, out of place."""
    return tree.add(params, updates)


class Multiple(NamedTuple):
    """The update ``factor direction``, not multiplied out: it can be added to the params in one pass."""

    factor: float | Tensor
    direction: Tree


Rule: TypeAlias = Callable[[Tensor, Tree, "Tree | None", Any], "tuple[Tree | Multiple, Any]"]
"""``(t, grads, params, state) -> (updates, state)``: a step's formula; t counts the steps before this one, as a floating tensor."""


class RuleTransformation(DifferentiableTransformation):
    """One that :func:`transformation` made: with ``added=True`` its update returns the params after the step, not the updates."""


def moved(transformation: GradientTransformation, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """A step out of place, ``(params + updates, state)``: in one pass over the params where the rule allows it."""
    if isinstance(transformation, RuleTransformation):
        after: tuple[Tree, Any] = transformation.update(grads, state, params=params, inplace=False, added=True)  # type: ignore[call-arg]
        return after
    updates, state = transformation.update(grads, state, params=params, inplace=False)
    return tree.add(params, updates), state


def transformation(init: Callable[[Tree, Tensor], Any], rule: Rule) -> RuleTransformation:
    """Makes torchopt's pair of ``init(params, step)`` and a rule; ``state.step`` counts the steps taken, in int64."""

    def init_fn(params: Tree) -> Any:
        leaves = tree.leaves(params)
        for path, leaf in zip(tree.paths(params), leaves, strict=True):
            if leaf.is_complex():
                raise TypeError(
                    f"`params` should be real, as all rules of metacal.optim are; got {leaf.dtype}{f' at {path!r}' if path else ''}. Keep "
                    "torch.view_as_real(tensor) as the parameter and use torch.view_as_complex inside the objective."
                )
        device = leaves[0].device if leaves else None
        return init(params, torch.zeros((), dtype=torch.int64, device=device))

    def update_fn(updates: Tree, state: Any, *, params: Tree | None = None, inplace: bool = True, added: bool = False) -> tuple[Tree, Any]:
        if _in_forward_mode():
            updates, params = tree.map(_with_its_tangent, (updates, params))
        found, new_state = rule(state.step.to(precision(updates)), updates, params, state)
        if isinstance(found, Multiple):
            found = tree.axpy(*found, params) if added else tree.scale(*found)
        elif added:
            found = tree.add(params, found)
        after: tuple[Tree, Any] = tree.map(_in_precision_of, (params if added else updates, state), (found, new_state))
        return after

    return RuleTransformation(init_fn, update_fn)


def precision(values: Tree) -> torch.dtype:
    """The widest floating type of the leaves, and at least float32: bfloat16 cannot count beyond 256."""
    return reduce(torch.promote_types, (x.dtype for x in tree.leaves(values)), torch.float32)


def _in_precision_of(like: Tensor, value: Tensor) -> Tensor:
    # Of 0-dim values alone: a 0-dim float64 hyperparameter promotes a 0-dim float32 parameter, a number its tangent.
    value = value if value.dtype == like.dtype else value.to(like.dtype)
    return _with_its_tangent(value) if value.ndim == 0 and _in_forward_mode() else value


def _in_forward_mode() -> bool:
    """Whether tangents are computed beside the values."""
    return forward_ad._current_level >= 0


def _with_its_tangent(x: Tensor) -> Tensor:
    """x with a tangent of its own dtype: torch.func's of ``number * y`` is float64 for a 0-dim y, and lerp and matmul want one."""
    if not torch._C._functorch.is_batchedtensor(x):  # vmap does not let one look
        tangent = forward_ad.unpack_dual(x).tangent
        if tangent is None or tangent.dtype == x.dtype:
            return x
    return x.to(x.dtype, copy=True)


def at(t: Tensor, *hyperparameters: Hyperparameter) -> tuple[Any, ...]:
    """The values of hyperparameters at step ``t``: schedules are evaluated."""
    return tuple(h(t) if callable(h) else h for h in hyperparameters)


def is_off(hyperparameter: Hyperparameter) -> bool:
    """Whether a hyperparameter is the number 0: what it switches on needs no state. (A tensor's value is not looked at.)"""
    return isinstance(hyperparameter, (int, float)) and hyperparameter == 0


def checked(name: str, value: Any, *, low: float = 0.0, high: float = float("inf")) -> Any:
    """Returns a hyperparameter if it is one: a number in ``[low, high)``, a 0-dim tensor, or a schedule.

    Only numbers are compared: reading a tensor would wait for the device, and a tracer has no value to read.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                f"`{name}` should be a 0-dim tensor, got shape {tuple(value.shape)}. Index it (value[0]) or .reshape(()); for several "
                "values at once use torch.vmap, for one rate per tensor metacal.optim.meta_sgd or metacal.optim.scale."
            )
        return value
    if isinstance(value, Real):
        number = float(value)
        if not low <= number <= high or number == high != float("inf"):
            bound = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g})"
            raise ValueError(f"`{name}` should be {bound}, got {value}.")
        return value
    if not callable(value):
        raise TypeError(
            f"`{name}` should be a number, a 0-dim tensor or a schedule (step count -> value), got {type(value).__name__}. "
            "Pick the leaf out of a tree of hyperparameters: lambda hparams: optim.sgd(hparams['lr'])."
        )
    return value


def checked_pair(name: str, value: Any, *, low: float = 0.0, high: float = float("inf")) -> tuple[Any, Any]:
    """Two hyperparameters, each :func:`checked`."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"`{name}` should be a pair of hyperparameters, got {value!r}. Pass for instance {name}=(0.5, 0.9).")
    return checked(f"{name}[0]", value[0], low=low, high=high), checked(f"{name}[1]", value[1], low=low, high=high)


def spread(name: str, prefix: Tree, full: Tree) -> list[Any]:
    """For every leaf of ``full``, in order, the leaf of ``prefix`` at or above its place."""
    try:
        return tree.structure(full).flatten_up_to(_spread(prefix, full))
    except ValueError:
        raise ValueError(
            f"`{name}` should be a tree like the params {tree.paths(full)}, or a prefix of it; got {tree.paths(prefix)}. Leave no "
            "leaf out, or give one value for all leaves below it."
        ) from None


def _spread(prefix: Tree, full: Tree) -> Tree:
    # By hand: torch.compile cannot flatten a tree of constants, which labels are.
    if isinstance(prefix, dict):
        if not isinstance(full, dict) or prefix.keys() != full.keys():
            raise ValueError
        return {key: _spread(prefix[key], full[key]) for key in full}
    if isinstance(prefix, (tuple, list)):
        if type(prefix) is not type(full):
            raise ValueError
        parts = [_spread(p, f) for p, f in zip(prefix, full, strict=True)]
        return type(full)(*parts) if hasattr(full, "_fields") else type(full)(parts)
    return tree.map(lambda _: prefix, full)
