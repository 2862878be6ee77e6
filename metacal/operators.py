"""Second derivatives of an inner objective: products with its Hessian and its mixed derivative.

Each takes the cheapest engine that is right where it is called, and remembers which ones an objective's operations do not support.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metacal import _checks, _dropout, _random, tree
from metacal._typing import Tree
from metacal.derivatives import (
    accumulator,
    attached,
    differentiable_attention,
    graph_nodes,
    in_dtype_of,
    leaves_of,
    pullbacks,
    released,
    seen_through,
    transforming,
    value_and_grad,
    vjp,
)


@dataclass
class _Seen:
    """What was seen of one solver: of its objective's operations, whether its optimizer's settings are constants, and the tensors
    that require grad beside its arguments.

    Never of another's, however alike their code is: what they close over may differ.
    """

    has_forward_mode: bool = True
    has_plain_dual_numbers: bool = True
    is_twice_differentiable: bool = False
    leaves_arguments_alone: bool = False
    has_constant_settings: bool = False
    has_constant_closures: bool = False
    closed_over: list[Tensor] = field(default_factory=list)
    draws_nothing: bool = False


@dataclass(frozen=True)
class Loss:
    """An inner objective in its full form, ``(params, hparams, batch, carry) -> (loss, carry)``.

    With ``num_chunks`` > 1 the batch is cut along its first axis and the loss is the mean over the pieces, one at a time.
    """

    fn: Callable[[Tree, Tree, Tree, Tree], tuple[Tensor, Tree]]
    num_chunks: int = 1
    compiled: bool = False  # products take the way that can be compiled, from the first eager call on
    seen: _Seen = field(default_factory=_Seen, compare=False, repr=False)

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        values = []
        for piece in self.pieces(batch):
            value, carry = self.fn(params, hparams, piece, carry)
            values.append(value)
        return torch.stack(values).mean() if len(values) > 1 else values[0], carry

    def pieces(self, batch: Tree) -> list[Tree]:
        """The batch, or its ``num_chunks`` equal pieces."""
        return [batch] if self.num_chunks == 1 else chunks(batch, self.num_chunks)


def chunks(batch: Tree, n: int) -> list[Tree]:
    """Cuts every tensor of a batch into ``n`` equal pieces along its first axis."""
    for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] % n):
            raise ValueError(
                f"`batch` at '{path}' has shape {tuple(leaf.shape)}: its first axis should be divisible by the {n} micro-batches, "
                "or their mean is not the mean over the batch. Change the batch size or `n`."
            )
    return [tree.map(lambda x, i=i: x.chunk(n)[i] if isinstance(x, Tensor) else x, batch) for i in range(n)]


def gradient(loss: Loss, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tree, Tree]:
    """``(grad_w L, new carry)``. Work: one forward and one backward pass."""
    total = accumulator(params) if loss.num_chunks > 1 else None
    for piece in loss.pieces(batch):
        g, carry = _gradient(loss, params, hparams, piece, carry)
        total = g if total is None else tree.add(total, g)
    return (total if loss.num_chunks == 1 else _average(total, loss.num_chunks, params)), tree.detach(carry)


def mixed_products(loss: Loss, params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> tuple[Tree, Tree]:
    """``(H_ww d, H_hw d)``, by symmetry of the full Hessian from one pass.

    A double backward, the pullback of ``(w, h) -> grad_w L`` at d, is what took least time and memory on every network that was
    measured. Inside a transform it is ``jvp((w, h) -> grad_{w,h} L, (d, 0))``, forward over reverse; the zero tangent is not
    materialised: h is a constant of the forward pass. Work: two to three gradients.
    """
    products: tuple[Tree, Tree] = _products(loss, params, hparams, batch, carry, direction, lambda w: (w, hparams))
    return products


def hessian_product(loss: Loss, params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> Tree:
    """``H_ww d`` alone. Work: two to three gradients."""
    return _products(loss, params, hparams, batch, carry, direction, lambda w: (w,))[0]


class Linearised(NamedTuple):
    """The gradient at a point and its derivatives there, for what asks for them again and again.

    Attributes:
        gradient: ``() -> grad_w L``.
        hessian: ``d -> H_ww d``.
        mixed: ``d -> H_hw d``.
    """

    gradient: Callable[[], Tree]
    hessian: Callable[[Tree], Tree]
    mixed: Callable[[Tree], Tree]


def linearised(loss: Loss, params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> Linearised | None:
    """The gradient, recorded once: each product is a backward pass through it.

    Work: a gradient, and one to two for each product; memory: its graph, some two of a gradient's, for as long as the result lives.
    None for what takes each product afresh: micro-batches, compiled code, and what somebody differentiates.
    """
    if loss.num_chunks > 1 or loss.compiled or attached(params, hparams):
        return None
    g, (H_ww, H_hw) = pullbacks(lambda w, h: _gradient(loss, w, h, batch, carry)[0], params, hparams)
    return Linearised(lambda: g, H_ww, H_hw)


Variables = Callable[[Tree], tuple[Tree, ...]]


def _products(loss: Loss, params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree, variables: Variables) -> Any:
    """The rows of the full Hessian for ``variables(w)``, times d: ``(H_ww d,)`` or ``(H_ww d, H_hw d)``."""
    keep_graph = attached(params, hparams, direction)
    like = variables(params)
    total = accumulator(like) if loss.num_chunks > 1 else None
    for piece in loss.pieces(batch):
        # An attempt may draw (dropout) before it fails: the next has to see the same noise.
        before = None if torch.compiler.is_compiling() else _random.noise(params)
        while True:
            engine = _engine(loss, keep_graph)
            try:
                with (
                    torch.enable_grad(),
                    differentiable_attention(),
                    nullcontext() if engine is _reverse_over_reverse or torch.compiler.is_compiling() else _watching(loss),
                ):
                    products, moved = engine(loss, params, hparams, piece, carry, direction, variables)
                if engine is _reverse_over_reverse or loss.seen.has_forward_mode:
                    break
            except (RuntimeError, NotImplementedError) as error:
                if engine is _reverse_over_reverse:
                    raise
                _remember_or_raise(loss, error)
            if before is not None:
                _random.restore(before)
        carry = moved
        products = released(products, keep_graph)
        total = products if total is None else tree.add(total, products)
    return total if loss.num_chunks == 1 else _average(total, loss.num_chunks, like)


class _Stops(TorchFunctionMode):
    """Sees whether something is made a constant that forward mode does not take for one: under ``torch.no_grad``, or by ``x.data``.

    Inside of a transform dropout draws as it does outside, where the run may have been.
    """

    of_no_grad = of_data = False

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self.of_data and transforming() and not any(raised):
            raise RuntimeError(
                "The objective reads x.data, which a torch.func transform (vmap, grad, jvp ...) takes for a constant in its first "
                "derivative and not in its second. Write x.detach()."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0]:
            callers = sys._getframe(1).f_code, getattr(sys._getframe(1).f_back, "f_code", None)
            # Leaving enable_grad inside of an autograd.Function switches it off too.
            self.of_no_grad |= all(code is None or code.co_name != "__exit__" for code in callers)
        self.of_data |= getattr(func, "__self__", None) is torch.Tensor.data  # the getter of the property
        if func in _dropout.DROPOUTS and transforming():
            return _dropout.as_eager(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _watching(loss: Loss) -> Iterator[None]:
    # A constant to a backward pass that is none to forward mode would make the Hessian unsymmetric. A double backward then takes it
    # for the constant that it is meant to be. An objective may change its ways, so that every product is looked at.
    with _Stops() as stops:
        yield
    if stops.of_no_grad or stops.of_data:
        loss.seen.has_forward_mode = False


def _average(total: Tree, n: int, like: Tree) -> Tree:
    return tree.map(lambda x, y: (x / n).to(y.dtype), total, like)


def _engine(loss: Loss, keep_graph: bool) -> Callable[..., tuple[Tree, Tree]]:
    """The cheapest way to a product that is right here and not known to fail."""
    forward = transforming() or (loss.compiled and not keep_graph)
    if not (forward and loss.seen.has_forward_mode):
        return _reverse_over_reverse
    return _dual_numbers if loss.seen.has_plain_dual_numbers and not keep_graph else _forward_over_reverse


class NoForwardModeWarning(UserWarning):
    """Second-order products take the reverse-over-reverse way, because an operation has no forward-mode derivative."""


def _remember_or_raise(loss: Loss, error: Exception) -> None:
    message = str(error)
    missing = any(sign in message for sign in ("forward AD", "forward mode AD", "setup_context"))
    fails = "ZeroTensors are immutable" in message  # F.mse_loss has a forward-mode derivative that fails (torch issue 123996)
    if not (missing or fails):
        raise error
    if loss.seen.has_plain_dual_numbers:  # torch.func has more: it nests, and GroupNorm's backward is one of its rules
        loss.seen.has_plain_dual_numbers = False
        return
    if missing:
        warnings.warn(
            "Second-order products are computed by a double backward pass, with more memory: an operation of the objective has no "
            f"forward-mode derivative ({message.split('. ')[0]})."
            + (" Write it with setup_context(ctx, inputs, output) and jvp." if "setup_context" in message else ""),
            NoForwardModeWarning,
            stacklevel=2,
        )
    loss.seen.has_forward_mode = False


def _dual_numbers(
    loss: Loss, params: Tree, hparams: Tree, piece: Tree, carry: Tree, direction: Tree, variables: Variables
) -> tuple[Tree, Tree]:
    # As below, without torch.func's wrappers around every tensor: nobody differentiates this. Inside an autograd.Function torch
    # switches forward mode off, and every tangent would be zero.
    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        duals = tree.map(lambda w, d: forward_ad.make_dual(w.detach(), d.detach()).requires_grad_(), params, direction)
        w, *h = variables(duals)
        h = tree.map(lambda x: x.detach().requires_grad_(), h)
        flat, treedef = tree.flatten((w, *h))
        value, moved = loss.fn(w, h[0] if h else tree.detach(hparams), piece, carry)
        value = _checks.scalar("objective", value)
        grads = torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else [None] * len(flat)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
    products = [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, flat, strict=True)]
    return tree.unflatten(treedef, products), tree.detach(moved)


def _forward_over_reverse(
    loss: Loss, params: Tree, hparams: Tree, piece: Tree, carry: Tree, direction: Tree, variables: Variables
) -> tuple[Tree, Tree]:
    w_flat, w_def = tree.flatten(params)
    structure = tree.structure(variables(params))
    # The floating part of the carry is a primal of its own, with a zero tangent: BatchNorm writes the dual batch mean into it.
    c_flat, combine = tree.partition(carry)

    def gradients(w: list[Tensor], c: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def scalar(leaves: list[Tensor], c: list[Tensor]) -> tuple[Tensor, Tree]:
            w, *h = tree.unflatten(structure, leaves)
            value, moved = loss.fn(w, h[0] if h else hparams, piece, combine(c))
            return _checks.scalar("objective", value), moved

        gradient, moved = seen_through(torch.func.grad(scalar, has_aux=True), tree.leaves(variables(tree.unflatten(w_def, w))), c)
        return gradient, tree.partition(moved)[0]

    still = [torch.zeros_like(c) for c in c_flat]
    g, products, moved = torch.func.jvp(gradients, (w_flat, c_flat), (tree.leaves(direction), still), has_aux=True)  # type: ignore[misc]
    return tree.unflatten(structure, in_dtype_of(g, products)), combine(moved)


def _reverse_over_reverse(
    loss: Loss, params: Tree, hparams: Tree, piece: Tree, carry: Tree, direction: Tree, variables: Variables
) -> tuple[Tree, Tree]:
    # By symmetry of the full Hessian: the pullback of (w, h) -> grad_w L at d.
    moved = carry

    def gradient(w: Tree, *h: Tree) -> Tree:
        nonlocal moved
        g, moved = _gradient(loss, w, h[0] if h else hparams, piece, carry)
        return g

    _, pull = vjp(gradient, *variables(params), constants=hparams)
    return tuple(pull(direction)), tree.detach(moved)


def _gradient(loss: Loss, w: Tree, h: Tree, piece: Tree, carry: Tree) -> tuple[Tree, Tree]:
    """``grad_w L`` of one piece, and the carry."""
    compiling = torch.compiler.is_compiling()
    look = not (compiling or loss.seen.leaves_arguments_alone)  # once: what objectives do, and below the graph
    before = _random.noise(w) if look else None

    def objective(alias: Tree) -> tuple[Tensor, Tree]:
        found = loss.fn(alias, h, piece, carry)
        if look and not attached(w, h):  # else their own graph is not told from one that is closed over
            loss.seen.closed_over = leaves_of(found[0], besides=alias)
        return found

    with (
        _Stops() if transforming() and not compiling else nullcontext(),
        _checks.left_alone(params=w, hparams=h, batch=piece) if look else nullcontext(),
        # On CUDA fused attention drops out other entries than the kernels of the step that is taken again.
        nullcontext() if loss.seen.draws_nothing else differentiable_attention(),
    ):
        _, moved, (g,) = value_and_grad(objective, w, constants=h)
    if before is not None:
        loss.seen.leaves_arguments_alone = True
        loss.seen.draws_nothing = _random.same_or(before, _random.noise(w)) is before
    if not transforming() and not loss.seen.is_twice_differentiable and any(leaf.requires_grad for leaf in tree.leaves(g)):
        _refuse_once_differentiable(g)
        loss.seen.is_twice_differentiable = True
    return g, moved


def _refuse_once_differentiable(g: Tree) -> None:
    # torch raises where a backward pass reaches such a node, but the gradient by given tensors goes around it and is zero.
    for node in graph_nodes(g):
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "The objective calls a torch.autograd.Function whose backward is marked @once_differentiable: its second derivative, which "
                "this hypergradient needs, would be zero without a word. Write its backward with differentiable operations and take the "
                "mark away, or use an adjoint without second derivatives (FiniteDifference, FirstOrder)."
            )
