"""Forward mode: tangents of the state carried along the run, so that nothing of the path is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metacal import _checks, _random, derivatives, tree
from metacal._typing import Tree
from metacal.adjoints import lanes
from metacal.adjoints.base import Adjoint, Cotangents, Pullback
from metacal.batches import read
from metacal.inner import FirstBad, InnerSolver, InnerState, advance


@dataclass(frozen=True)
class Forward(Adjoint):
    """The derivative of the run by every hyperparameter, one tangent each: exact, with memory independent of the number of steps.

    ``Z_{t+1} = U_w Z_t + U_h`` for the step ``w' = U(w, h)``, with Z ``[m, *shape]`` for every leaf of params and floating
    optimizer state, m hyperparameter scalars. Then ``d_hparams = Z_T ct``.

    Work: T (1 + 2m) plain steps at most, T (m / chunk_size + 2m) in chunks. Memory: two times m tangents of the state, the
    activations of one step for ``chunk_size`` tangents. No bias. Not estimated: the cotangent of the initial params (``()``).
    Every solver with forward-mode derivatives will do, with or without ``descent``; all directions of a step see one
    realisation of noise.

    Args:
        chunk_size: directions pushed forward together under vmap; None: all. One at a time needs no vmap.
        max_hparams: refuse more hyperparameter scalars than that.

    Errors:
        ValueError: there are more scalars than ``max_hparams``.
        RuntimeError: an operation of the step has no forward-mode derivative.

    Source: Franceschi et al. 2017 (arXiv 1703.01785), section 3.2.

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> estimate = metacal.hypergradient(lambda w, h, b: (w ** 2).sum() / 2, solver, Forward())
    >>> h = torch.tensor([1.0])
    >>> estimate(solver.init(torch.zeros(1), h), h, metacal.repeat(None, 2), None).hparams  # w = h (1 - 1/4)
    tensor([0.5625])
    """

    chunk_size: int | None = None
    max_hparams: int = 4096
    derives_steps = True

    def __post_init__(self) -> None:
        lanes.check_chunk_size(self.chunk_size)
        _checks.whole("max_hparams", self.max_hparams)

    @property
    def is_of_the_run(self) -> bool:
        return True

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        num = tree.num_elements(hparams)
        if num > self.max_hparams:
            raise ValueError(
                f"`hparams` hold {num} scalars, more than max_hparams={self.max_hparams}: Forward would carry a tangent of the params "
                f"and the optimizer state for each, {num} x {tree.num_bytes((state.params, state.opt_state)):,} bytes. Use "
                f"ForwardSketch(num_directions=...) or Unrolled(); to insist, Forward(max_hparams={num})."
            )
        if not num:
            bad = FirstBad()
            final = advance(solver, state, hparams, batches, 0, len(batches), bad)
            return final, lambda ct: Cotangents((), hparams, {"first_bad_step": bad.step()})
        lanes.real("Forward", hparams)
        start = lanes.zeros(num, state.params), lanes.basis(hparams)
        final, Z, bad = push_forward(solver, state, hparams, batches, *start, self.chunk_size)
        unravel = tree.ravel(hparams)[1]
        return final, lambda ct: Cotangents((), unravel(lanes.vdot(Z, ct)), {"first_bad_step": bad.step()})

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        return _tangent(solver, state, hparams, batches, d_params, d_hparams)


@dataclass(frozen=True)
class ForwardSketch(Adjoint):
    """(FG)²U: the derivative of the run along k random directions of the hyperparameters, put together to an unbiased estimate.

    ``d_hparams = mean_i <ct, Z_T u_i> u_i`` with ``Z_T u_i`` by forward mode as in :class:`Forward`. Since E[u u^T] = I its
    expectation is the exact ``Z_T^T ct = g``; its variance, summed over the m coordinates, is ``(m - 1) |g|^2 / k`` for signs and
    ``(m + 1) |g|^2 / k`` for Gaussian directions. The direct part of a hypergradient has none.

    Work: T (1 + 2k) plain steps at most. Memory: two times k tangents of params and floating optimizer state, the activations of
    one step: independent of T and of m. Not estimated: the cotangent of the initial params (``()``). ``stats``:
    ``standard_error`` of the estimate, relative to its norm (NaN for one direction).

    The directions come from a random stream beside that of torch's default generator, so that the run draws what it would have; the
    pullback draws one number, so that the next estimate has other directions. Under a transform that maps (``vmap``, ``jacfwd``) pass
    its ``randomness``: "different" draws other directions for every task.

    Args:
        num_directions: k, averaged over.
        distribution: "rademacher" (signs, the smaller variance) or "gaussian".
        chunk_size: directions pushed forward together under vmap; None: all. One at a time needs no vmap.

    Errors: RuntimeError: an operation of the step has no forward-mode derivative.

    Source: Shen et al. 2024 (arXiv 2406.14095).

    >>> import metacal
    >>> solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), metacal.optim.sgd(0.25))
    >>> estimate = metacal.hypergradient(lambda w, h, b: (w ** 2).sum() / 2, solver, ForwardSketch(num_directions=2))
    >>> h = torch.tensor([1.0])  # one scalar: every sign gives the exact number
    >>> estimate(solver.init(torch.zeros(1), h), h, metacal.repeat(None, 2), None).hparams
    tensor([0.5625])
    """

    num_directions: int
    distribution: lanes.Distribution = "rademacher"
    chunk_size: int | None = None
    derives_steps = True

    def __post_init__(self) -> None:
        _checks.whole("num_directions", self.num_directions)
        lanes.check_distribution(self.distribution)
        lanes.check_chunk_size(self.chunk_size)

    @property
    def is_of_the_run(self) -> bool:
        return True

    def vjp(
        self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], *, memory: Tree | None = None
    ) -> tuple[InnerState, Pullback]:
        if not tree.num_elements(hparams):
            return Forward().vjp(solver, state, hparams, batches)
        lanes.real("ForwardSketch", hparams)
        with _random.apart(state.params, hparams):
            u = lanes.directions(hparams, self.num_directions, self.distribution)
        start = lanes.zeros(self.num_directions, state.params)
        final, Z, bad = push_forward(solver, state, hparams, batches, start, u, self.chunk_size)

        def pullback(ct: Tree) -> Cotangents:
            d_hparams, stats = lanes.average(lanes.vdot(Z, ct), u)
            torch.rand(())  # the stream beside this one is another next time
            return Cotangents((), d_hparams, {"first_bad_step": bad.step(), **stats})

        return final, pullback

    def jvp(self, solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
        return _tangent(solver, state, hparams, batches, d_params, d_hparams)  # one direction: there is nothing to sketch


def push_forward(
    solver: InnerSolver,
    state: InnerState,
    hparams: Tree,
    batches: Sequence[Tree],
    d_params: Tree,
    d_hparams: Tree,
    chunk_size: int | None,
    with_batch: bool = False,
) -> tuple[InnerState, Tree, FirstBad]:
    """Runs the solver with one tangent per lane of ``d_params`` and ``d_hparams``: final state, lanes of ``d final params``."""
    start, noise = state, _random.noise(state.params)
    Z: tuple[Tree, list[Tensor]] = d_params, lanes.zeros(lanes.count((d_params, d_hparams)), tree.partition(state.opt_state)[0])
    bad = FirstBad()
    try:
        for t, batch in enumerate(read(batches, 0, len(batches))):
            state, Z = _push(solver, state, hparams, batch, Z, d_hparams, chunk_size, with_batch)
            bad.look(t, state.params)
        return state, Z[0], bad
    except (RuntimeError, NotImplementedError) as error:
        if with_batch or "ZeroTensors are immutable" not in str(error):
            _explain(error)
            raise
    # F.mse_loss cannot stand a target without a tangent (torch issue 123996): give the batches one of zeros.
    _random.restore(noise)
    return push_forward(solver, start, hparams, batches, d_params, d_hparams, chunk_size, with_batch=True)


def _push(
    solver: InnerSolver,
    state: InnerState,
    hparams: Tree,
    batch: Tree,
    Z: tuple[Tree, list[Tensor]],
    d_hparams: Tree,
    chunk_size: int | None,
    with_batch: bool,
) -> tuple[InnerState, tuple[Tree, list[Tensor]]]:
    """One step and its tangents: ``state' = U(state, h)``, ``Z' = U_w Z + U_h d_hparams``."""
    s, with_s = tree.partition(state.opt_state)
    # The floating part of the carry is a primal of its own, with a zero tangent: BatchNorm writes the dual batch mean into it.
    c, with_c = tree.partition(state.carry)
    x, with_x = tree.partition(batch) if with_batch else ([], lambda _: batch)
    primals, treedef = tree.flatten((state.params, s, hparams, c, x))
    structure: Any = None
    combine: Callable[[Sequence[Tensor]], InnerState] = InnerState._make

    def step(*leaves: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        nonlocal structure, combine
        w, s, h, c, x = tree.unflatten(treedef, leaves)
        after = solver.step(InnerState(w, with_s(s), with_c(c)), h, with_x(x))
        moved, structure = tree.flatten((after.params, tree.partition(after.opt_state)[0]))
        values, combine = tree.partition(after, tree.is_tensor)
        return tuple(moved), values

    def along(lane: Tree) -> tuple[Tree, list[Tensor]]:
        (d_w, d_s), d_h, d_c = lane
        tangents = tree.leaves((d_w, d_s, d_h, d_c, tree.zeros_like(x)))
        after, moved, values = torch.func.jvp(step, tuple(primals), tuple(tangents), has_aux=True)  # type: ignore[misc]
        return tree.unflatten(structure, derivatives.in_dtype_of(after, moved)), values

    d_c = lanes.zeros(lanes.count((Z, d_hparams)), c)
    Z, values = lanes.over(along, (Z, d_hparams, d_c), chunk_size, state.params)
    return combine(values), Z


def _tangent(solver: InnerSolver, state: InnerState, hparams: Tree, batches: Sequence[Tree], d_params: Tree, d_hparams: Tree) -> Tree:
    d_params, d_hparams = tree.map(lambda x: x.unsqueeze(0), (d_params, d_hparams))
    return tree.index(push_forward(solver, state, hparams, batches, d_params, d_hparams, 1)[1], 0)


def _explain(error: Exception) -> None:
    message = str(error)
    if any(sign in message for sign in ("forward AD", "forward mode AD", "setup_context", "ZeroTensors are immutable")):
        raise RuntimeError(
            "`solver`'s step cannot be differentiated in forward mode, because one of its operations has no forward-mode derivative "
            f"({message.split('. ')[0]}). Use Unrolled(mode='reverse'), or write the operation out of others (an LSTM on a CPU, an "
            "autograd.Function without jvp, F.mse_loss against what is not in the batch)."
        ) from error
