"""Optimizers written elsewhere: is their update a pure function with the right derivative?

Some of torchopt's are not, and a hypergradient through them is wrong without a word. Each foreign one is probed once, on a few
numbers in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metacal import tree
from metacal._device import device_of
from metacal._typing import Tree
from metacal.optim.transformation import GradientTransformation, is_differentiable, moved

OptimizerLike: TypeAlias = "GradientTransformation | Callable[[Tree], GradientTransformation]"
"""A transformation, or ``hparams -> transformation``."""


def resolve(optimizer: OptimizerLike, hparams: Tree) -> GradientTransformation:
    """The transformation itself, or the one built for ``hparams``; a foreign one is probed the first time it is seen.

    Cost: one look-up per call; the probe once per optimizer (or factory) takes some milliseconds.

    Errors:
        TypeError: it is neither a transformation nor a function that returns one.
        ValueError: a foreign one fails the probe (see :func:`probe`).

    >>> import metacal.optim as optim
    >>> rate = torch.tensor(0.1)
    >>> transformation = resolve(lambda hparams: optim.sgd(hparams["lr"]), {"lr": rate})
    """
    transformation = _build(optimizer, hparams)
    if not is_differentiable(transformation):
        complaint = _verdict(optimizer, hparams)
        if complaint is not None:
            raise ValueError(complaint)
    return transformation


def probe(optimizer: OptimizerLike, hparams: Tree = ()) -> None:
    """Raises ValueError unless the optimizer's ``update(..., inplace=False)`` is a pure function with the right derivative.

    On a handful of float64 numbers, with a non-zero state, small and large gradients: equal input gives equal output, also from
    an optimizer built anew; the input is left alone; the first state holds no values of the params; the ``torch.func.vjp`` by
    gradient, state, params and (for a factory) hparams equals central differences. No random numbers are drawn. Cost: some tens of updates.

    Not seen: an error at other values than the probe's (a threshold, a late step of a schedule), and inexact arithmetic
    (torchopt corrects Adam's bias in float32).

    Errors:
        ValueError: names what failed, what that does to a hypergradient, and what to use instead.
    """
    complaint = _complaint(optimizer, hparams)
    if complaint is not None:
        raise ValueError(complaint)


def moves_at_zero_gradient(optimizer: OptimizerLike, hparams: Tree, params: Tree) -> bool:
    """Whether a zero gradient moves all-ones params from a fresh state: weight decay inside the optimizer.

    The fixed points of such an optimizer are not the zeros of the objective's gradient. Looked at for three steps (a warm-up's first
    may stand still), in float64 whatever the params' dtype, which may round a small decay away, and on the first entry of every leaf,
    which stands for all of them: what depends on a leaf's size, and not on its name, dimensions or settings, is not seen. Reads one
    value from the device: call it outside ``torch.compile``.

    >>> import metacal.optim as optim
    >>> params = {"w": torch.zeros(100)}
    >>> moves_at_zero_gradient(optim.adam(), {}, params), moves_at_zero_gradient(optim.adamw(), {}, params)
    (False, True)
    """
    transformation = _build(optimizer, hparams)
    return moves_at_rest(transformation.init, lambda grads, w, state: moved(transformation, grads, state, w), params)


def moves_at_rest(init: Callable[[Tree], Any], update: Callable[[Tree, Tree, Any], tuple[Tree, Any]], params: Tree) -> bool:
    """:func:`moves_at_zero_gradient` of an ``update(grads, params, state) -> (params, state)`` and its ``init(params)``."""
    params = tree.detach(params)
    for like in (tree.map(lambda w: w[(slice(1),) * w.ndim], params), params):
        try:  # in float32, 1 - rate * decay is 1 where the product is below 3e-8
            wide = tree.map(lambda w: torch.ones_like(w, dtype=torch.promote_types(w.dtype, torch.float64)), like)
            return _moves(init, update, wide)
        except (RuntimeError, TypeError, ValueError):
            continue  # a setting for every entry, an update that computes in one precision, a device that lacks another
    return _moves(init, update, tree.map(torch.ones_like, params))


def _moves(init: Callable[[Tree], Any], update: Callable[[Tree, Tree, Any], tuple[Tree, Any]], ones: Tree) -> bool:
    state, still, found = init(ones), tree.zeros_like(ones), []
    for _ in range(3):  # a warm-up's first step may stand still
        there, state = update(still, ones, state)
        found += [(_plain(w) != 1).any() for w in tree.leaves(there)]
    return bool(found) and bool(torch.stack(found).any())


def _build(optimizer: OptimizerLike, hparams: Tree) -> GradientTransformation:
    if isinstance(optimizer, GradientTransformation):
        return optimizer
    wanted = "`optimizer` should be a metacal.optim or torchopt transformation, or a function hparams -> transformation"
    if isinstance(optimizer, (type, torch.optim.Optimizer)) or not callable(optimizer):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"{wanted}; got {got}. For torch.optim.{{SGD, Adam, ...}} use metacal.optim.{{sgd, adam, ...}}(lr, ...).")
    built = optimizer(hparams)
    if not isinstance(built, GradientTransformation):
        raise TypeError(f"{wanted}; the function returned {type(built).__name__}. Return for instance metacal.optim.sgd(hparams['lr']).")
    return built


# Verdicts, by identity. A transformation is a tuple, which takes no weak reference: its update function stands for it. Refusals
# are kept too: the probe itself uses up the hidden first call of torchopt's momentum, so that a second probe would pass.
_verdicts: dict[int, str | None] = {}


def _verdict(optimizer: OptimizerLike, hparams: Tree) -> str | None:
    seen = optimizer.update if isinstance(optimizer, GradientTransformation) else optimizer
    if id(seen) in _verdicts:
        return _verdicts[id(seen)]
    complaint = _complaint(optimizer, hparams)
    if type(seen).__weakrefoffset__:  # without, nothing tells when the identity is given to another object
        _verdicts[id(seen)] = complaint
        weakref.finalize(seen, _verdicts.pop, id(seen)).atexit = False
    return complaint


_REPLAY = "so that a replayed step would be another step, and the hypergradient that of a run which never took place"
_WRONG = "so that the hypergradient would be wrong"
_MOMENTUM = "For momentum use metacal.optim.sgd(lr, momentum=...) or rmsprop(..., momentum=...): their state holds all they remember."
_OURS = (
    "Use metacal.optim.{sgd, adam, adamw, adamax, nadam, radam, adagrad, adadelta, rmsprop, rprop, asgd, lars, lamb, lion, muon, "
    "adafactor}, whose hyperparameters may be tensors; metacal.optim.clip_by_global_norm and clip_by_value for clipping, "
    "add_decayed_weights and scale for what goes before or after, and metacal.optim.schedules."
)


def _complaint(optimizer: OptimizerLike, hparams: Tree) -> str | None:
    """What is wrong with an optimizer, in words; None if nothing is."""
    concrete = () if isinstance(optimizer, GradientTransformation) else tree.map(_stand_in, hparams)
    update = _build(optimizer, concrete).update
    name = f"{update.__module__}.{getattr(update, '__qualname__', type(update).__name__).split('.')[0]}"
    try:
        # Large gradients too: with a small one, clipping does nothing.
        findings = [_finding(optimizer, concrete, gradient_size) for gradient_size in (1.0, 1e6)]
    except Exception as error:  # whatever foreign code raises on plain input is the finding
        findings = [f"its update raised {type(error).__name__} ({error}) when differentiated. {_OURS}"]
    return next((f"`optimizer` ({name}) cannot be differentiated through: {f}" for f in findings if f is not None), None)


def _finding(optimizer: OptimizerLike, hparams: Tree, gradient_size: float) -> str | None:
    device = device_of(hparams)
    params = {"a": 2 * _numbers(0, (3,), device), "b": 2 * _numbers(1, (2, 2), device)}
    gradient = tree.map(lambda p: gradient_size * (p - 1.3), params)
    first, second = _build(optimizer, hparams), _build(optimizer, hparams)
    # Not zero: a decay that is forgotten shows only then.
    state, state_from = tree.partition(first.init(params))
    if not _equal(state, tree.partition(first.init(tree.scale(2.0, params)))[0]):
        return (
            "its init puts values of the params into the state, and what the initial params do through that would be left out. Begin with "
            "zeros, and let the update at step 0 read the params it is given."
        )
    state = [_numbers(2 + i, s.shape, device) for i, s in enumerate(state)]

    inputs = {"gradient": gradient, "state": state, "params": params, "hparams": tree.partition(hparams)[0]}
    hparams_from = tree.partition(hparams)[1]

    def run(transformation: GradientTransformation, x: dict[str, Tree]) -> tuple[Tree, Tree]:
        return transformation.update(x["gradient"], state_from(x["state"]), params=x["params"], inplace=False)

    untouched = tree.clone(inputs)
    results = [run(transformation, inputs) for transformation in (first, first, second)]
    if not _equal(inputs, untouched):
        return f"update(..., inplace=False) writes into its input, {_REPLAY}. {_OURS}"
    if not _equal(results[0], results[1]):
        return f"a second update with equal input gives another result (it keeps hidden state), {_REPLAY}. {_MOMENTUM}"
    if not _equal(results[1], results[2]):
        return f"built anew, it gives another result for equal input (it keeps hidden state), {_REPLAY}. {_MOMENTUM}"

    def outputs(x: dict[str, Tree]) -> list[Tensor]:
        return tree.partition(run(_build(optimizer, hparams_from(x["hparams"])), x))[0]

    wrong = _wrong_derivative(outputs, inputs)
    return wrong and f"its derivative with respect to the {wrong} is not that of what it computes, {_WRONG}. {_OURS}"


def _wrong_derivative(outputs: Callable[[dict[str, Tree]], list[Tensor]], inputs: dict[str, Tree]) -> str | None:
    """The first input by which vjp and central differences disagree, in a direction relative to its values."""
    values, pull = torch.func.vjp(outputs, inputs)[:2]
    # Scaled to equal size, an update of 1e-3 counts as much as a second moment of 1e12 beside it.
    weights = [_numbers(i, v.shape, v.device) / (1e-30 + v.abs().max()) for i, v in enumerate(values)]
    (cotangents,) = pull(weights)
    h = 1e-5
    for kind, x in inputs.items():
        leaves, treedef = tree.flatten(x)
        # Relative: a learning rate of 0 must not become negative.
        direction = tree.unflatten(treedef, [leaf * _numbers(i, leaf.shape, leaf.device) for i, leaf in enumerate(leaves)])
        there, back = (tree.vdot(weights, outputs({**inputs, kind: tree.axpy(s, direction, x)})) for s in (h, -h))
        claimed, truth = _plain(tree.vdot(cotangents[kind], direction)), _plain(there - back) / (2 * h)
        if not bool(((claimed - truth).abs() <= 1e-6 * (1 + truth.abs())).all()):
            return kind
    return None


def _numbers(salt: int, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Scattered numbers in [0.6, 0.75), without drawing from a generator.

    Positive, for they stand for second moments; and a second moment less the square of a first stays positive.
    """
    n = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64, device=device)
    return (0.6 + 0.15 * ((0.6180339887498949 * n + 0.37 * salt) % 1)).reshape(shape)


def _plain(x: Tensor) -> Tensor:
    return torch.func.debug_unwrap(x).detach()


def _stand_in(leaf: Any) -> Any:
    """In float64, a leaf's value without what transforms wrap around it."""
    value = tree.stand_in(leaf)
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def _equal(a: Tree, b: Tree) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(torch.allclose(_plain(x), _plain(y), rtol=0, atol=0, equal_nan=True) if isinstance(x, Tensor) else x == y for x, y in pairs)
