"""Broken input raises, and the message names the argument, what was expected, what came and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metacal
from metacal import adjoints, linear, optim
from problems import PROBLEMS, Tree, f64

P = PROBLEMS["ridge_scalar"]
ADJOINTS = {
    "mixed": adjoints.Unrolled(),
    "reverse": adjoints.Unrolled(mode="reverse"),
    "graph": adjoints.Unrolled(mode="graph"),
    "implicit": adjoints.Implicit(linear.CG(2)),
    "first order": adjoints.FirstOrder(),
}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
both_doors = pytest.mark.parametrize("door", ["hypergradient", "solve"])


def call(door: str = "hypergradient", adjoint: Any = ADJOINTS["mixed"], **over: Any) -> Any:
    """One hypergradient of ridge_scalar by one of the two doors, with some of its ingredients replaced."""
    given = {
        "inner": P.inner,
        "outer": P.outer,
        "optimizer": optim.sgd(0.1),
        "params": P.params,
        "hparams": P.hparams,
        "batches": P.steps(3),
        "outer_batch": P.outer_batch,
        **over,
    }
    solver = metacal.descent(given["inner"], given["optimizer"])
    if door == "solve":
        w = metacal.solve(solver, given["params"], given["hparams"], given["batches"], adjoint)
        return given["outer"](w, given["hparams"], given["outer_batch"])
    state = given.get("state") or solver.init(given["params"], given["hparams"])
    return metacal.hypergradient(given["outer"], solver, adjoint)(state, given["hparams"], given["batches"], given["outer_batch"])


def test_the_call_itself_is_sound() -> None:
    for adjoint in ADJOINTS.values():
        for door in ("hypergradient", "solve"):
            call(door, adjoint)


# Trees


def test_mismatched_trees_name_the_first_path() -> None:
    from metacal import _checks

    like = {"a": torch.zeros(2), "b": {"c": torch.zeros(3), "d": torch.zeros(1)}}
    _checks.same_structure("got", like, "like", like)
    for got, path in (
        ({"a": torch.zeros(2), "b": {"c": torch.zeros(3)}}, "b.d"),
        ({"a": torch.zeros(2), "b": {"c": torch.zeros(3), "e": torch.zeros(1)}}, "b.e"),
        ({"b": like["b"]}, "b.c"),
        ({"a": torch.zeros(2), "b": {"c": torch.zeros(4), "d": torch.zeros(1)}}, "b.c"),
    ):
        with pytest.raises(ValueError, match=f"(?s)`got`.*`like`.*'{path}'"):
            _checks.same_structure("got", got, "like", like)


@every_adjoint
def test_a_state_of_other_params_than_the_optimizer_state_names_the_path(adjoint: Any) -> None:
    """A checkpoint of another model: its momentum does not fit."""
    solver = metacal.descent(P.inner, optim.sgd(0.1, momentum=0.9))
    other = metacal.run(solver, solver.init(P.params, P.hparams), P.hparams, P.steps(1))
    state = other._replace(params={**P.params, "x": f64(1.0, 2.0)})
    with pytest.raises(ValueError, match=r"'x'"):
        metacal.hypergradient(P.outer, solver, adjoint)(state, P.hparams, P.steps(2), P.outer_batch)


@pytest.mark.parametrize("adjoint", [ADJOINTS["reverse"], ADJOINTS["implicit"]], ids=["reverse", "implicit"])
@pytest.mark.parametrize("wrong", [lambda w: {"w": w, "x": w}, lambda w: {"w": w[:2]}], ids=["structure", "shape"])
def test_a_fixed_point_map_of_another_structure_names_the_path(wrong: Any, adjoint: Any) -> None:
    solver = metacal.fixed_point(lambda p, h, b: wrong(0.5 * p["w"]))
    estimate = metacal.hypergradient(lambda p, h, b: p["w"].sum(), solver, adjoint)
    with pytest.raises(ValueError, match=r"`fn`.*'[wx]'"):
        estimate(solver.init(P.params, P.hparams), P.hparams, P.steps(1), P.outer_batch)


@both_doors
@pytest.mark.parametrize("where", ["params", "hparams"])
def test_integer_leaves_are_refused(where: str, door: str) -> None:
    good = getattr(P, where)
    with pytest.raises(TypeError, match=rf"`{where}` at 'count'.*floating.*int64.*float"):
        call(door, **{where: {**good, "count": torch.tensor(3)}})


@both_doors
@pytest.mark.parametrize("where", ["params", "hparams"])
def test_leaves_that_are_no_tensors_are_refused(where: str, door: str) -> None:
    with pytest.raises(TypeError, match=rf"`{where}` at 'rate'.*tensor.*float.*torch.tensor"):
        call(door, **{where: {**getattr(P, where), "rate": 0.5}})


@both_doors
def test_a_module_for_params_is_refused_with_the_way_to_make_one(door: str) -> None:
    with pytest.raises(TypeError, match=r"`params`.*functional"):
        call(door, params=torch.nn.Linear(3, 1))


def test_a_bare_params_dict_for_a_state_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`state`.*InnerState.*dict.*solver\.init"):
        call(state=dict(P.params))


@both_doors
def test_mixed_devices_name_both(door: str) -> None:
    hparams = {"lam": f64(0.3), "weights": torch.ones(3, device="meta")}
    with pytest.raises(ValueError, match=r"`params` at 'w' is on cpu.*`hparams` at 'weights' is on meta.*tree\.to"):
        call(door, hparams=hparams)


@both_doors
def test_a_batch_on_another_device_is_an_error(door: str) -> None:
    x, y = P.batches[0]
    with pytest.raises((ValueError, RuntimeError), match=r"device.*meta|meta.*device"):
        call(door, batches=[(x.to("meta"), y.to("meta"))])


# Batches


@both_doors
@every_adjoint
def test_a_generator_of_batches_is_refused(adjoint: Any, door: str) -> None:
    with pytest.raises(TypeError, match=r"`batches`.*sequence.*generator.*list\(batches\)"):
        call(door, adjoint, batches=(b for b in P.steps(3)))


@both_doors
def test_a_data_loader_is_refused_with_the_helper(door: str) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*P.batches[0]), batch_size=4)
    with pytest.raises(TypeError, match=r"`batches`.*sequence.*metacal\.take"):
        call(door, batches=loader)


@both_doors
@pytest.mark.parametrize("one", [P.batches[0][0], {"x": P.batches[0][0]}], ids=["a tensor", "a dict"])
def test_one_batch_for_the_sequence_is_refused(one: Any, door: str) -> None:
    with pytest.raises(TypeError, match=r"`batches`.*one batch per step.*\[batch\].*repeat"):
        call(door, batches=one)


def test_run_checks_its_batches_too() -> None:
    solver = metacal.descent(P.inner, optim.sgd(0.1))
    with pytest.raises(TypeError, match=r"`batches`.*sequence"):
        metacal.run(solver, solver.init(P.params, P.hparams), P.hparams, iter(P.steps(2)))


@both_doors
@every_adjoint
def test_a_batch_leaf_that_requires_grad_is_an_error(adjoint: Any, door: str) -> None:
    x, y = P.batches[0]
    with pytest.raises(ValueError, match=r"batches.*requires grad.*hparams"):
        call(door, adjoint, batches=[(x.clone().requires_grad_(), y)])


def test_a_batch_leaf_under_a_transform_is_an_error_not_a_zero() -> None:
    """Where the batch itself is differentiated by ``torch.func``, the answer is the truth or an exception."""
    x, y = P.batches[0]

    def value(x: Tensor, adjoint: Any) -> Tensor:
        return call("solve", adjoint, batches=[(x, y)])

    from problems import OPTIMIZERS, loop

    leaf = x.clone().requires_grad_()
    end = loop(P.inner, OPTIMIZERS["sgd"], {"w": P.params["w"].clone()}, P.hparams, [(leaf, y)])
    (truth,) = torch.autograd.grad(P.outer(end, P.hparams, P.outer_batch), leaf)
    refusals: list[tuple[Any, str]] = []
    for adjoint in (ADJOINTS["mixed"], ADJOINTS["reverse"], ADJOINTS["implicit"]):
        for transform in (torch.func.grad, torch.func.jacfwd):
            try:
                got = transform(lambda x, adjoint=adjoint: value(x, adjoint))(x)
            except (ValueError, RuntimeError) as error:
                refusals.append((transform, str(error)))
            else:
                assert torch.allclose(got, truth), (adjoint, transform)
    assert all("batch" in message for transform, message in refusals if transform is torch.func.grad), refusals


def test_lazy_sequences_are_welcome() -> None:
    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Tree:
            if not 0 <= i < 3:
                raise IndexError(i)
            return P.batches[0]

    for door in ("hypergradient", "solve"):
        for adjoint in (*ADJOINTS.values(), adjoints.Unrolled(window=2)):
            got, expected = call(door, adjoint, batches=Lazy()), call(door, adjoint)
            assert torch.equal(got.value if door == "hypergradient" else got, expected.value if door == "hypergradient" else expected)


# Objectives


NOT_SCALAR: dict[str, Callable[..., Any]] = {
    "a vector": lambda p, h, b: p["w"] ** 2 * h["lam"],
    "a float": lambda p, h, b: 1.0,
    "None": lambda p, h, b: None,
    "a tuple": lambda p, h, b: ((p["w"] ** 2).sum() * h["lam"], {}),
}


@pytest.mark.parametrize("which", ["inner", "outer"])
@pytest.mark.parametrize("what", NOT_SCALAR)
@every_adjoint
def test_an_objective_returns_a_scalar(adjoint: Any, what: str, which: str) -> None:
    name = "outer" if which == "outer" else "objective"
    expected = "shape.*sum" if what == "a vector" else {"a float": "float", "None": "NoneType", "a tuple": "tuple.*with_aux"}[what]
    with pytest.raises((ValueError, TypeError), match=rf"`{name}`.*scalar.*{expected}"):
        call(adjoint=adjoint, **{which: NOT_SCALAR[what]})


CAPTURED = f64(1.0, 2.0, 3.0).requires_grad_()
INDEPENDENT: dict[str, Callable[..., Tensor]] = {
    "constant": lambda p, h, b: f64(1.0),
    "of the hparams alone": lambda p, h, b: h["lam"] ** 2,
    "detached": lambda p, h, b: (p["w"].detach() ** 2).sum() * h["lam"],
    "of a captured parameter": lambda p, h, b: (CAPTURED**2).sum(),
}


@pytest.mark.parametrize("what", INDEPENDENT)
@every_adjoint
def test_an_inner_objective_depends_on_the_params(adjoint: Any, what: str) -> None:
    with pytest.raises(ValueError, match=r"`objective`.*depend.*params.*functional"):
        call(adjoint=adjoint, inner=INDEPENDENT[what])


@pytest.mark.parametrize("what", INDEPENDENT)
@every_adjoint
def test_an_outer_objective_depends_on_the_params(adjoint: Any, what: str) -> None:
    with pytest.raises(ValueError, match=r"`outer`.*depend.*params.*functional"):
        call(adjoint=adjoint, outer=INDEPENDENT[what])


# Adjoints and optimizers


def test_graph_mode_under_a_transform_names_mixed() -> None:
    def value(lam: Tensor, door: str) -> Tensor:
        got = call(door, ADJOINTS["graph"], hparams={"lam": lam})
        return got.value if door == "hypergradient" else got

    for door in ("hypergradient", "solve"):
        for transform, at in ((torch.func.grad, f64(0.3)), (torch.func.jacfwd, f64(0.3)), (torch.func.vmap, f64(0.3, 0.4))):
            with pytest.raises((RuntimeError, ValueError), match=r"graph.*mixed"):
                transform(lambda lam, door=door: value(lam, door))(at)


def test_implicit_needs_a_batch() -> None:
    with pytest.raises(ValueError, match=r"`batches`.*at least one"):
        call(adjoint=ADJOINTS["implicit"], batches=[])


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, weight_decay=0.1),
        optim.adamw(0.1),
        optim.adam(0.1, weight_decay=0.1),
        lambda h: optim.sgd(h["lam"], weight_decay=0.1),
    ],
    ids=["sgd", "adamw", "adam", "learnable"],
)
@both_doors
def test_weight_decay_in_the_optimizer_is_refused_by_implicit(optimizer: Any, door: str) -> None:
    with pytest.raises(ValueError, match=r"weight decay.*objective.*Unrolled"):
        call(door, ADJOINTS["implicit"], optimizer=optimizer, hparams={"lam": f64(0.3).requires_grad_()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adjoints.Unrolled(mode="mixd"), "`mode`.*mixed.*reverse.*graph.*'mixd'"),  # type: ignore[arg-type]
        (lambda: adjoints.Unrolled(window=0), "`window`.*integer of at least 1.*0"),
        (lambda: adjoints.Unrolled(segment=-1), "`segment`.*integer of at least 1.*-1"),
        (lambda: adjoints.Unrolled(segment=2.5), "`segment`.*integer.*2.5"),  # type: ignore[arg-type]
        (lambda: adjoints.Implicit("cg"), "`solver`.*linear solver.*str"),  # type: ignore[arg-type]
        (lambda: linear.CG(0), "`num_steps`.*at least 1.*0"),
        (lambda: linear.Neumann(num_steps=-1, step_size=0.1), "`num_steps`.*at least 0.*-1"),
        (lambda: linear.Neumann(num_steps=3, step_size=0.0), "`step_size`.*positive.*0"),
        (lambda: metacal.microbatched(P.inner, 0), "`n`.*at least 1.*0"),
    ],
)
def test_options_are_validated_where_they_are_stored(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_microbatches_divide_the_batch() -> None:
    with pytest.raises(ValueError, match=r"`batch` at '0'.*8.*divisible by the 3"):
        call(inner=metacal.microbatched(P.inner, 3))


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`loader`.*at least one"):
        metacal.take([], 3)


# What goes wrong inside a loop is reported, not raised


@every_adjoint
@pytest.mark.parametrize("bad", [0, 2, None])
def test_an_inner_loop_that_turns_nan_is_reported(adjoint: Any, bad: int | None) -> None:
    def inner(p: Tree, h: Tree, b: Any) -> Tensor:
        batch, factor = b
        return P.inner(p, h, batch) * factor

    batches = [(P.batches[0], f64(float("nan") if t == bad else 1.0)) for t in range(4)]
    hg = call(adjoint=adjoint, inner=inner, batches=batches)
    first = hg.stats["first_bad_step"]
    assert first.ndim == 0
    assert int(first) == (-1 if bad is None else bad)


def test_params_whose_sum_overflows_are_not_bad() -> None:
    """In float16 the sum of 200,000 ones is infinite."""
    solver = metacal.descent(lambda w, h, b: h * (w * w).mean(), optim.sgd(0.1))
    w, h = torch.ones(200_000, dtype=torch.float16), torch.ones((), dtype=torch.float16)
    assert w.sum().isinf()
    estimate = metacal.hypergradient(lambda w, h, b: (w * w).mean(), solver, metacal.adjoints.Unrolled())
    assert int(estimate(solver.init(w, h), h, metacal.repeat(None, 2), None).stats["first_bad_step"]) == -1


def test_every_statistic_is_a_0_dim_tensor() -> None:
    for adjoint in ADJOINTS.values():
        for name, number in call(adjoint=adjoint).stats.items():
            assert isinstance(number, Tensor), name
            assert number.ndim == 0, name
            assert not number.requires_grad, name


def test_solve_reports_through_its_stats_argument() -> None:
    for name, adjoint in ADJOINTS.items():
        hparams, stats = {"lam": f64(0.3).requires_grad_()}, {}
        w = metacal.solve(metacal.descent(P.inner, optim.sgd(0.1)), P.params, hparams, P.steps(3), adjoint, stats=stats)
        P.outer(w, hparams, P.outer_batch).backward()
        assert int(stats["first_bad_step"]) == -1, name
