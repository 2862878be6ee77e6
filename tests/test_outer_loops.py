"""The loops around a hypergradient: what they keep from step to step, how they read tasks, and what they refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metacal
from metacal import adjoints, derivatives, linear, optim, tree
from problems import F64, PROBLEMS, Tree, close, f64

WAYS = ("loop", "vmap", "auto")
every_way = pytest.mark.parametrize("tasks", WAYS)


def towards(w: Tensor, h: Tree, b: Tensor) -> Tensor:
    return ((w - b) ** 2).sum()


def maml(outer: Any = towards, **options: Any) -> metacal.BilevelOptimizer:
    return metacal.meta_initialisation(outer, metacal.descent(towards, optim.sgd(0.25)), adjoints.Unrolled(), optim.sgd(0.5), **options)


# What is kept


def test_no_graph_grows_over_outer_steps() -> None:
    """Parameters for a start, and an outer rate that requires grad."""
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.25))
    rate = f64(0.1).requires_grad_()
    outer = lambda w, h, b: ((w - 3) ** 2).sum()  # noqa: E731
    start, h = nn.Parameter(torch.zeros(2, dtype=F64)), nn.Parameter(torch.zeros(2, dtype=F64))
    for opt, hparams in (
        (metacal.nested(outer, solver, adjoints.Unrolled(), optim.sgd(rate)), h),
        (metacal.meta_initialisation(outer, solver, adjoints.Unrolled(), optim.sgd(rate), hparams_optimizer=optim.adam(rate)), h),
    ):
        data = [(metacal.repeat(None, 2), None)] * 3
        for state, hg in metacal.iterate(opt, opt.init(start, hparams), data):
            assert not list(derivatives.graph_nodes((state, hg)))
        assert not any(x.requires_grad for x in tree.leaves(state))
        # A state that somebody put into a graph is cut from it.
        state, _ = opt.step(tree.map(lambda x: x * rate if x.is_floating_point() else x, state), metacal.repeat(None, 2), None)
        assert not list(derivatives.graph_nodes(state))
    assert not start.any()
    assert not h.any()


def test_a_transform_sees_through_outer_steps() -> None:
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum(), optim.sgd(0.25))

    def after(h: Tensor, rate: Tensor) -> Tensor:
        opt = metacal.nested(lambda w, h, b: ((w - 3) ** 2).sum(), solver, adjoints.Unrolled(), optim.sgd(rate))
        return opt.step(opt.init(torch.zeros_like(h), h), metacal.repeat(None, 1), None)[0].hparams

    # w = h / 2, the hypergradient is w - 3, and h' = h - rate (h / 2 - 3).
    close(torch.func.grad(after, argnums=(0, 1))(f64(1.0), f64(0.1)), (f64(0.95), f64(2.5)))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_first_state_can_hold_what_a_later_one_saved(stochastic: bool) -> None:
    p, linear_solver = PROBLEMS["logistic_exp_reg"], linear.Neumann(3, 0.5, warm_start=True)
    solver, adjoint = metacal.descent(p.inner, optim.sgd(0.1)), adjoints.Implicit(linear_solver, stochastic=stochastic, select=linear.every)
    opt = metacal.nested(p.outer, solver, adjoint, optim.adam(0.1))
    data = [([(x + i, y) for i, (x, y) in enumerate(p.steps(3))], p.outer_batch)] * 3
    first = opt.init(p.params, p.hparams)
    states, hgs = zip(*metacal.iterate(opt, first, data), strict=True)
    found = tree.load_state_dict(first, tree.state_dict(states[0]))
    assert tree.structure(found) == tree.structure(states[0])
    resumed = list(metacal.iterate(opt, found, data[1:]))
    close(resumed[-1][0].hparams, states[-1].hparams, 0.0)
    # Zeros are no start: the first step is the one without a memory, product by product.
    hg = metacal.hypergradient(p.outer, solver, adjoint)(first.inner, first.hparams, *data[0])
    close(hgs[0].hparams, hg.hparams, 0.0)
    assert int(hgs[0].stats["num_products"]) == int(hg.stats["num_products"]) == int(hgs[1].stats["num_products"]) - 1
    without = metacal.nested(p.outer, solver, adjoints.Unrolled(), optim.sgd(0.1))
    assert without.init(p.params, p.hparams).adjoint == ()


# Tasks


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_the_lowest_curvature_over_tasks_is_the_worst(tasks: Any) -> None:
    """Two of three tasks are convex, one is not; a fourth has an outer gradient of zero, and its solver meets no curvature."""
    curvatures = f64(3.0, -5.0, 1.0, 2.0)
    inner = lambda w, h, b: 0.5 * (b[0] * w**2).sum()  # noqa: E731
    solver = metacal.proximal(inner, optim.sgd(0.0), 0.5, anchor=lambda start: start)
    opt = metacal.meta_initialisation(
        lambda w, h, b: (b[1] * w).sum(), solver, adjoints.Implicit(linear.CG(3)), optim.sgd(0.1), tasks=tasks
    )
    batch = (curvatures, f64(1.0, 1.0, 1.0, 0.0))
    with pytest.warns(linear.UnreliableHypergradient) if tasks == "loop" else nullcontext():
        _, hg = opt.step(opt.init(f64(1.0), {}), [batch], batch)
    assert float(hg.stats["curvature_min"]) == pytest.approx(-4.5)
    assert float(hg.stats["curvature_max"]) == pytest.approx(3.5)
    assert int(hg.stats["first_bad_step"]) == -1


@every_way
def test_tasks_are_those_of_every_leaf(tasks: Any) -> None:
    opt = maml(tasks=tasks)
    state = opt.init(torch.zeros(2, dtype=F64), {})
    four, two = torch.ones(4, 2, dtype=F64), torch.ones(2, 2, dtype=F64)
    for inner, outer, where in (
        ([four], two, r"4 at `inner_batches` at '0' and 2 at `outer_batch`"),
        ([two], four, r"2 at `inner_batches` at '0' and 4 at `outer_batch`"),
        ([two, four], two, r"2 at `inner_batches` at '0' and 4 at `inner_batches` at '1'"),
    ):
        with pytest.raises(ValueError, match=f"one task axis, the first of every leaf.*{where}"):
            opt.step(state, inner, outer)
    for bad, got in ((0.5, "float"), (f64(0.5), "0-dim tensor")):
        with pytest.raises(TypeError, match=rf"`inner_batches` at '0.scale'.*leading task axis, got.*{got}.*torch\.full"):
            opt.step(state, [{"x": two, "scale": bad}], two)
    for none in ([None], [torch.ones(0, 2, dtype=F64)]):
        with pytest.raises(ValueError, match=r"at least one task.*tasks='one'"):
            opt.step(state, none, None)
    with pytest.raises(TypeError, match=r"`batches`.*sequence.*generator.*list\(batches\)"):
        opt.step(state, (b for b in [two]), two)  # type: ignore[arg-type]


@every_way
def test_an_outer_objective_may_do_without_a_batch(tasks: Any) -> None:
    opt = maml(lambda w, h, b: (w**2).sum(), tasks=tasks)
    targets = f64(1.0, 3.0)[:, None]
    state, hg = opt.step(opt.init(torch.zeros(1, dtype=F64), {}), [targets, targets], None)
    close(hg.params, 2 * (0.75 * targets).mean(0) * 0.25)  # w_2 = w_0 / 4 + 3/4 target
    close(state.inner.params, -0.5 * hg.params)


@every_way
def test_what_counts_is_averaged_as_a_number(tasks: Any) -> None:
    def outer(w: Tensor, h: Tree, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return towards(w, h, b), {"count": (b > 1).sum(), "all": (b > 1).all(), "mean": b.mean()}

    opt, batch = maml(metacal.with_aux(outer), tasks=tasks), f64(0.0, 2.0, 3.0, 2.0).reshape(2, 2)
    _, hg = opt.step(opt.init(torch.zeros(2, dtype=F64), {}), [batch], batch)
    assert {name: float(x) for name, x in hg.aux.items()} == {"count": 1.5, "all": 0.5, "mean": 1.75}


# What is refused


def test_states_that_do_not_fit_are_named() -> None:
    p = PROBLEMS["ridge_scalar"]
    solver = metacal.descent(p.inner, optim.sgd(0.1))
    nested = metacal.nested(p.outer, solver, adjoints.Unrolled(), optim.adam(0.1))
    state = nested.init(p.params, p.hparams)
    for opt in (nested, maml()):
        with pytest.raises(TypeError, match=r"`state`.*BilevelState, got InnerState.*init\(params, hparams\)"):
            next(iter(metacal.iterate(opt, state.inner, [(p.steps(1), p.outer_batch)])))  # type: ignore[arg-type]
    broadcasts = state.opt_state._replace(mean={"lam": f64(0.0, 0.0)})
    for other, path in (
        (state._replace(hparams={**p.hparams, "more": f64(1.0)}), "mean.more"),
        (state._replace(opt_state=broadcasts), "mean.lam"),
    ):
        with pytest.raises(ValueError, match=rf"`state`.*`opt_state` made for its `hparams`.*'{path}'.*init\(params, hparams\)"):
            nested.step(other, p.steps(1), p.outer_batch)
    moved = maml(hparams_optimizer=optim.adam(0.1))
    state = moved.init(torch.zeros(2, dtype=F64), {"a": f64(1.0)})
    with pytest.raises(ValueError, match=r"`opt_state` made for its `hparams`.*'mean.b'"):
        moved.step(state._replace(hparams={"b": f64(1.0)}), [f64(1.0, 1.0)], f64(1.0, 1.0))


def test_meta_initialisation_looks_at_its_parts() -> None:
    with pytest.raises(TypeError, match=r"`solver`.*InnerSolver, got function"):
        metacal.meta_initialisation(towards, towards, adjoints.Unrolled(), optim.sgd(0.1))  # type: ignore[arg-type]


# Sizes


@pytest.mark.parametrize("size", [1e4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_are_finite(dtype: torch.dtype, size: float) -> None:
    """|outer_h| = |direct| = size sqrt(9), of squares that float16 does not have."""
    solver = metacal.descent(lambda w, h, b: ((w - h) ** 2).sum() / 4, optim.sgd(1.0))
    estimate = metacal.hypergradient(lambda w, h, b: size * (w + h).sum(), solver, adjoints.Unrolled())
    w, h = torch.zeros(9, dtype=dtype), torch.ones(9, dtype=dtype)
    hg = estimate(solver.init(w, h), h, metacal.repeat(None, 1), None)
    assert float(hg.stats["direct_share"]) == pytest.approx(2 / 3, rel=0.02)  # w_1 = (w_0 + h) / 2
    assert hg.hparams.dtype == dtype


def test_inner_products() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = ({"a": torch.full((1000,), size, dtype=dtype), "b": torch.ones((), dtype=dtype)} for size in (1e2, 1e-4))
        exact = [sum(float((leaf.double() ** 2).sum()) for leaf in t.values()) for t in (x, y)]
        assert [float(tree.vdot(t, t)) for t in (x, y)] == pytest.approx(exact, rel=1e-6)
        assert [float(tree.norm(t["a"])) for t in (x, y)] == pytest.approx([float(t["a"].double().norm()) for t in (x, y)], rel=1e-6)
        assert tree.norm(x).dtype == torch.float32
    z, r = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128), f64(2.0, -1.0)
    assert float(tree.norm({"z": z, "r": r})) == pytest.approx(20**0.5)
    for a, b in ((z, z.flip(0)), (z, r), (r, z)):
        assert not tree.vdot(a, b).is_complex()
        assert float(tree.vdot(a, b)) == pytest.approx(float((a.conj() * b).real.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_inner_product_is_one_pass_and_a_sum(dtype: torch.dtype) -> None:
    called: list[str] = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, dtype=dtype)
    with Called():
        tree.vdot(x, x)
    assert called == ["aten.mul.Tensor", "aten.sum.default"]


def test_complex_hparams_have_a_real_share_and_a_cast_keeps_them_complex() -> None:
    h = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)
    solver = metacal.descent(lambda w, h, b: (w - h.real).square().sum() / 2, optim.sgd(0.5))
    estimate = metacal.hypergradient(lambda w, h, b: w.sum() + h.imag.sum(), solver, adjoints.Unrolled())
    hg = estimate(solver.init(torch.zeros(2, dtype=F64), h), h, metacal.repeat(None, 1), None)
    close(torch.view_as_real(hg.hparams), f64(0.5, 1.0, 0.5, 1.0).reshape(2, 2))
    assert not hg.stats["direct_share"].is_complex()
    assert float(hg.stats["direct_share"]) == pytest.approx(2 / 3)
    assert tree.to(h, torch.float32).dtype == torch.complex64
