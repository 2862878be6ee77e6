"""Ways to run an inner problem: gradient descent, tied to an anchor, any update rule, and none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from metacal import _checks, _compile, operators, optim, tree
from metacal._objective import as_loss
from metacal._typing import Objective, Tree
from metacal.inner import Descent, DescentStep, Gradient, InnerSolver, InnerState, linearised_of, pullback_of, rest, step_of
from metacal.optim import OptimizerLike


def descent(objective: Any, optimizer: OptimizerLike, *, carry: Tree | None = None, compile: bool | str = False) -> InnerSolver:
    """Gradient descent on ``objective(params, hparams, batch)`` with a differentiable optimizer.

    Args:
        objective: a scalar loss. With ``carry`` it is ``(params, hparams, batch, carry) -> (loss, carry)``.
        optimizer: a GradientTransformation, or ``hparams -> GradientTransformation`` to learn its settings.
        carry: the first value of what changes along the way and is never differentiated.
        compile: compile the step, its pullback and the second-order products, each as one graph, by ``torch.compile``: ``True``
            by inductor, ``"cuda-graphs"`` by inductor and replayed as CUDA graphs (what is kept is copied out of their buffers),
            another string by the backend of that name. Noise is drawn as in eager mode. Eager code runs at the first call, where
            somebody differentiates it (inside ``torch.func`` transforms, in ``mode="graph"``, the pullback of ``mode="reverse"``), and
            for the second-order parts of an objective that has no forward-mode derivative.

    Work of a step: one gradient. Params in less than float32 are rounded at each step, as with torch.optim; sums over micro-batches
    and steps are in float32 at least. Errors: an optimizer of another library that cannot be differentiated is refused with the
    name of its ``metacal.optim`` equivalent; an objective that ``torch.compile`` cannot take in one piece raises RuntimeError.

    >>> import torch, metacal
    >>> solver = metacal.descent(lambda w, h, x: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> state = solver.init(torch.zeros(2), torch.ones(2))
    >>> metacal.run(solver, state, torch.ones(2), metacal.repeat(None, 2)).params
    tensor([0.7500, 0.7500])
    """
    if not callable(objective):
        raise TypeError(f"`objective` should be a function (params, hparams, batch) -> scalar, got {type(objective).__name__}.")
    if not callable(optimizer):  # a function of the hparams is looked at where there are some
        optim.resolve(optimizer, ())
    _compile.refuse_without_cuda(compile)
    loss = replace(as_loss(objective, with_carry=carry is not None), compiled=bool(compile))

    def gradient(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> tuple[Tree, Tree]:
        return operators.gradient(loss, params, hparams, batch, carry)

    def products(params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> tuple[Tree, Tree]:
        return operators.mixed_products(loss, params, hparams, batch, carry, direction)

    def product(params: Tree, hparams: Tree, batch: Tree, carry: Tree, direction: Tree) -> Tree:
        return operators.hessian_product(loss, params, hparams, batch, carry, direction)

    def linearised(params: Tree, hparams: Tree, batch: Tree, carry: Tree) -> operators.Linearised:
        recorded = operators.linearised(loss, params, hparams, batch, carry)
        return linearised_of(gradient, products, product)(params, hparams, batch, carry) if recorded is None else recorded

    def update(grads: Tree, params: Tree, opt_state: Tree, hparams: Tree) -> tuple[Tree, Tree]:
        return optim.moved(optim.resolve(optimizer, hparams), grads, opt_state, params)

    step, pullback = step_of(gradient, update), pullback_of(products, update)

    def init(params: Tree, hparams: Tree) -> InnerState:
        _checks.differentiable_tree("params", params)
        _checks.differentiable_tree("hparams", hparams)
        _compile.refuse_without_cuda(compile, params)
        return InnerState(params, optim.resolve(optimizer, hparams).init(params), () if carry is None else tree.clone(carry))

    if compile:
        gradient, step = (_compile.compiled(fn, compile) for fn in (gradient, step))
        products, product, pullback = (_compile.compiled(fn, compile, second_order_of=loss) for fn in (products, product, pullback))

    parts = Descent(loss, gradient, products, update, linearised, step, pullback)
    return InnerSolver(init, DescentStep(parts), Gradient(parts, () if carry is None else carry), parts)


def proximal(
    objective: Objective, optimizer: OptimizerLike, strength: float | Tensor | Callable[[Tree], Tensor], *, anchor: Callable[[Tree], Tree]
) -> InnerSolver:
    """Descent on ``objective + strength/2 |w - anchor(hparams)|^2``: iMAML's inner problem.

    The pull towards the anchor makes the solution depend on it, so that implicit adjoints can differentiate it. A strength that is
    learned is a function of the hparams.

    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), equation 3.
    """

    if isinstance(strength, Tensor):
        if strength.requires_grad:
            raise ValueError("`strength` requires grad, and no gradient would reach it. Give it as lambda hparams: hparams['strength'].")
    elif not callable(strength) and not strength >= 0:
        raise ValueError(f"`strength` should not be negative, which would push the params away from the anchor; got {strength}.")

    def tied(params: Tree, hparams: Tree, batch: Tree, /) -> Tensor:
        distance = tree.sub(params, anchor(hparams))
        pull = strength(hparams) if callable(strength) else strength
        return objective(params, hparams, batch) + 0.5 * pull * tree.vdot(distance, distance)

    return descent(tied, optimizer)._replace(anchor=anchor)


def fixed_point(fn: Callable[[Tree, Tree, Tree], Tree]) -> InnerSolver:
    """Iterates ``w <- fn(w, hparams, batch)``: any update rule, for instance a deep equilibrium layer.

    Gradients inside of ``fn`` are taken by ``torch.func.grad``, which every adjoint can look into.
    """

    def following(params: Tree, hparams: Tree, batch: Tree) -> Tree:
        try:
            return fn(params, hparams, batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"`fn` takes a gradient of what does not require one here ({str(error).rstrip('.')}): steps are also taken where nothing "
                "is recorded. Use torch.func.grad in it, and not torch.autograd.grad."
            ) from error

    def step(state: InnerState, hparams: Tree, batch: Tree) -> InnerState:
        params = following(state.params, hparams, batch)
        _checks.same_structure("fn", params, "params", state.params)
        return state._replace(params=params)

    def residual(params: Tree, hparams: Tree, batch: Tree) -> Tree:
        after = following(params, hparams, batch)
        _checks.same_structure("fn", after, "params", params)
        return tree.sub(params, after)

    return InnerSolver(lambda params, hparams: InnerState(params, ()), step, residual)


def stationary(objective: Objective) -> InnerSolver:
    """No steps: the params are a minimiser found elsewhere, and the batches only define the objective that they minimise.

    For ``adjoints.Implicit``: there are no steps that others could derive, and they are refused.

    >>> import torch, metacal
    >>> from metacal import linear
    >>> solver = metacal.stationary(lambda w, h, b: ((w - b) ** 2).sum() / 2 + h * (w**2).sum() / 2)
    >>> h, b = torch.tensor(1.0, requires_grad=True), torch.tensor([2.0])
    >>> w = metacal.solve(solver, b / 2, h, [b], metacal.adjoints.Implicit(linear.CG(1)))  # b / (1 + h) is the minimiser
    >>> torch.autograd.grad(w.sum(), h)  # - b / (1 + h)^2
    (tensor(-0.5000),)
    """
    return descent(objective, optim.sgd(0.0))._replace(step=rest)
