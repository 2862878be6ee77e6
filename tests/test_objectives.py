"""The objectives against formulas written out in loops, against lightly, and under every transform that they must bear."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vjp, vmap

from metacal import objectives
from metacal.objectives import BYOL, BarlowTwins, Outputs, SimCLR, SimSiam, SSLObjective, VICReg

OBJECTIVES = [SimCLR(0.3), VICReg(3.0, 2.0, 1.5), BarlowTwins(0.3, 1.0), SimSiam(), BYOL()]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
any_views = pytest.mark.parametrize("m", [2, 3, 4])


def random_outputs(n: int = 5, m: int = 3, d: int = 4, *, seed: int = 0, lead: tuple[int, ...] = ()) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    # 0.6: some standard deviations above 1 and some below, so that both sides of VICReg's hinge are used.
    scale = torch.linspace(0.6, 1.8, d, dtype=torch.float64)
    return Outputs(*(scale * torch.randn(*lead, n, m, d, generator=generator, dtype=torch.float64) for _ in range(3)))


def live(objective: SSLObjective, fixed: Outputs):
    """The loss as a function of the one field that is differentiated, and that field's value."""
    name = "p" if "predictor" in objective.heads else "z"
    return (lambda value: objective(fixed._replace(**{name: value}))), getattr(fixed, name)


# --- what the papers say, one number at a time -------------------------------------------------------------------------


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))


def two_view_nt_xent(x: np.ndarray, y: np.ndarray, temperature: float) -> float:
    """SimCLR, algorithm 1: 2n rows, row k's positive is k + n modulo 2n."""
    rows, n = np.concatenate([x, y]), len(x)
    total = 0.0
    for i in range(2 * n):
        s = [cosine(rows[i], rows[k]) / temperature for k in range(2 * n)]
        total -= s[(i + n) % (2 * n)] - math.log(sum(math.exp(s[k]) for k in range(2 * n) if k != i))
    return total / (2 * n)


def two_view_vicreg(x: np.ndarray, y: np.ndarray, inv: float, var: float, cov: float) -> float:
    n, d = x.shape
    total = inv * sum((x[i, c] - y[i, c]) ** 2 for i in range(n) for c in range(d)) / (n * d)
    for z in (x, y):
        mean = [sum(z[:, c]) / n for c in range(d)]
        for c in range(d):
            for e in range(d):
                covariance = sum((z[i, c] - mean[c]) * (z[i, e] - mean[e]) for i in range(n)) / (n - 1)
                total += var * max(0.0, 1 - math.sqrt(covariance + 1e-4)) / d / 2 if c == e else cov * covariance**2 / d
    return total


def two_view_barlow_twins(x: np.ndarray, y: np.ndarray, lambd: float, scale: float) -> float:
    n, d = x.shape
    x, y = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (x, y))
    total = 0.0
    for c in range(d):
        for e in range(d):
            correlation = sum(x[i, c] * y[i, e] for i in range(n)) / n
            total += (1 - correlation) ** 2 if c == e else lambd * correlation**2
    return scale * total


def reference(objective: SSLObjective, outputs: Outputs) -> float:
    z, p, target = (field.numpy() for field in outputs)
    n, m, _ = z.shape
    unordered, ordered = list(itertools.combinations(range(m), 2)), list(itertools.permutations(range(m), 2))
    match objective:
        case SimCLR(temperature):
            return np.mean([two_view_nt_xent(z[:, a], z[:, b], temperature) for a, b in unordered])
        case VICReg(inv, var, cov):
            return np.mean([two_view_vicreg(z[:, a], z[:, b], inv, var, cov) for a, b in unordered])
        case BarlowTwins(lambd, scale):
            return np.mean([two_view_barlow_twins(z[:, a], z[:, b], lambd, scale) for a, b in unordered])
        case SimSiam():
            return np.mean([-cosine(p[i, a], z[i, b]) for a, b in ordered for i in range(n)])
        case BYOL():
            units = [(p[i, a] / np.linalg.norm(p[i, a]), target[i, b] / np.linalg.norm(target[i, b])) for a, b in ordered for i in range(n)]
            return np.mean([((u - v) ** 2).sum() for u, v in units])
    raise AssertionError(objective)


@pytest.mark.parametrize("objective", [*OBJECTIVES, SimCLR(), VICReg(), BarlowTwins()], ids=str)
@any_views
def test_equals_the_formula_written_out(objective, m):
    outputs = random_outputs(m=m)
    value = objective(outputs)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(objective, outputs), rel=1e-10)


@pytest.fixture(scope="module")
def lightly_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports use what torch deprecates
        return pytest.importorskip("lightly.loss", reason="lightly, the independent oracle, is not installed")


@pytest.mark.parametrize("n", [2, 7])
def test_equals_lightly(lightly_loss, n):
    z, p, target = outputs = random_outputs(n=n, m=2, d=6)
    x, y = z.unbind(1)
    negative_cosine = lightly_loss.NegativeCosineSimilarity()

    def both_directions(p, t):
        return (negative_cosine(p[:, 0], t[:, 1]) + negative_cosine(p[:, 1], t[:, 0])) / 2

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(SimCLR(0.2)(outputs), lightly_loss.NTXentLoss(0.2)(x, y), **close)
    torch.testing.assert_close(VICReg(25, 25, 1)(outputs), lightly_loss.VICRegLoss()(x, y), **close)
    torch.testing.assert_close(VICReg(2, 3, 4)(outputs), lightly_loss.VICRegLoss(2, 3, 4)(x, y), **close)
    torch.testing.assert_close(BarlowTwins(5e-3, 0.1)(outputs), 0.1 * lightly_loss.BarlowTwinsLoss(5e-3)(x, y), **close)
    torch.testing.assert_close(SimSiam()(outputs), both_directions(p, z), **close)
    torch.testing.assert_close(BYOL()(outputs), 2 + 2 * both_directions(p, target), **close)


# --- under transforms --------------------------------------------------------------------------------------------------


@every
def test_vmap_equals_a_loop(objective):
    many = random_outputs(lead=(3,))
    one_by_one = [Outputs(*fields) for fields in zip(*many, strict=True)]

    def loss(*fields):
        return objective(Outputs(*fields))

    torch.testing.assert_close(vmap(loss)(*many), torch.stack([objective(o) for o in one_by_one]), rtol=1e-13, atol=0)
    gradients = vmap(grad(loss, argnums=(0, 1, 2)))(*many)
    for i, outputs in enumerate(one_by_one):
        for got, expected in zip(gradients, grad(loss, argnums=(0, 1, 2))(*outputs), strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-11, atol=1e-14)


@every
def test_vmap_of_forward_over_reverse_equals_a_loop(objective):
    many, direction = random_outputs(lead=(2,)), random_outputs(lead=(2,), seed=1).z

    def product(z, p, target, v):
        fn, x = live(objective, Outputs(z, p, target))
        return jvp(grad(fn), (x,), (v,))[1]

    batched = vmap(product)(*many, direction)
    for i in range(2):
        torch.testing.assert_close(batched[i], product(*(field[i] for field in (*many, direction))), rtol=1e-10, atol=1e-13)


@every
def test_first_and_second_derivatives_equal_central_differences(objective):
    fn, x = live(objective, random_outputs(n=3, m=3, d=2))
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(fn, x, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, x, check_fwd_over_rev=True)


def networks_loss(objective: SSLObjective, stop: torch.Tensor | None = None):
    """The loss as a function of a network's weights; ``stop`` replaces what SimSiam does not differentiate."""
    x, target = random_outputs(n=4, m=2, d=3, seed=2).z, random_outputs(n=4, m=2, d=3, seed=3).z

    def loss(w):
        z = (x @ w).tanh()
        return objective(Outputs(z if stop is None else stop, p=z @ w, target=target))

    w = random_outputs(n=1, m=3, d=3, seed=4).z[0]
    return loss, w, (x @ w).tanh()


@every
def test_the_hessian_is_symmetric_through_stop_gradients(objective):
    loss, w, _ = networks_loss(objective)
    direction = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
    forward_over_reverse = jvp(grad(loss), (w,), (direction,))[1]
    reverse_over_reverse = vjp(grad(loss), w)[1](direction)[0]
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse, rtol=1e-11, atol=1e-13)
    matrix = hessian(loss)(w).reshape(9, 9)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-11, atol=1e-13)
    assert matrix.abs().max() > 1e-3


def test_simsiam_holds_the_other_view_constant_in_every_order():
    loss, w, z = networks_loss(SimSiam())
    constant, _, _ = networks_loss(SimSiam(), stop=z)
    torch.testing.assert_close(grad(loss)(w), grad(constant)(w), rtol=1e-13, atol=0)
    torch.testing.assert_close(hessian(loss)(w), hessian(constant)(w), rtol=1e-12, atol=1e-14)

    def third(f):
        return grad(lambda w: hessian(f)(w).square().sum())(w)

    torch.testing.assert_close(third(loss), third(constant), rtol=1e-11, atol=1e-13)

    # What the docstring warns of: the gradient *field* also moves with z, which no derivative of the loss shows.
    direction, h = torch.ones_like(w), 1e-6
    field = (grad(loss)(w + h * direction) - grad(loss)(w - h * direction)) / (2 * h)
    assert (field - jvp(grad(loss), (w,), (direction,))[1]).abs().max() > 1e-2


def test_nothing_flows_into_stopped_fields():
    outputs = random_outputs()
    d_z, d_p = grad(lambda z, p: SimSiam()(Outputs(z, p)), argnums=(0, 1))(outputs.z, outputs.p)
    assert d_z.abs().max() == 0 < d_p.abs().max()
    d_p, d_target = grad(lambda p, t: BYOL()(Outputs(outputs.z, p, t)), argnums=(0, 1))(outputs.p, outputs.target)
    assert d_target.abs().max() == 0 < d_p.abs().max()
    assert jvp(lambda z: SimSiam()(Outputs(z, outputs.p)), (outputs.z,), (outputs.z.sin(),))[1] == 0


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "equal", "one zero sample", "one constant entry", "huge", "tiny"])
def test_derivatives_are_finite_where_norms_and_variances_vanish(objective, dtype, kind):
    base = random_outputs()
    degenerate = {
        "zero": torch.zeros_like(base.z),
        "equal": torch.ones_like(base.z),
        "one zero sample": torch.cat([torch.zeros_like(base.z[:1]), base.z[1:]]),
        "one constant entry": torch.cat([torch.ones_like(base.z[..., :1]), base.z[..., 1:]], -1),
        "huge": 1e4 * base.z,
        "tiny": 1e-7 * base.z,
    }[kind].to(dtype)
    fn, x = live(objective, Outputs(degenerate, p=degenerate, target=degenerate))
    gradient, product = jvp(grad(fn), (x,), (x.cos(),))
    assert fn(x).isfinite()
    assert gradient.isfinite().all()
    assert product.isfinite().all()
    assert vjp(grad(fn), x)[1](x.cos())[0].isfinite().all()


def test_second_derivatives_are_finite_at_a_low_temperature_in_float32():
    # Similarities then differ by more than 89, where exp overflows.
    z = random_outputs(n=4, m=2).z.float()
    fn, x = live(SimCLR(temperature=0.005), Outputs(z))
    assert jvp(grad(fn), (x,), (torch.ones_like(x),))[1].isfinite().all()
    assert vjp(grad(fn), x)[1](torch.ones_like(x))[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (SimCLR, 0.4),
        (lambda w: VICReg(invariance=w), 3.0),
        (lambda w: VICReg(variance=w), 3.0),
        (lambda w: VICReg(covariance=w), 3.0),
        (lambda w: BarlowTwins(lambd=w), 0.1),
        (lambda w: BarlowTwins(scale=w), 0.1),
    ],
)
def test_weights_can_be_hyperparameters(make, at):
    outputs, h = random_outputs(), 1e-6
    learned = grad(lambda w: make(w)(outputs))(torch.tensor(at, dtype=torch.float64))
    difference = (make(at + h)(outputs) - make(at - h)(outputs)) / (2 * h)
    assert difference.abs() > 1e-3
    torch.testing.assert_close(learned, difference, rtol=1e-6, atol=1e-8)


# --- what the theory says about collapse and invariance ----------------------------------------------------------------


def spread(n: int = 4, m: int = 3) -> torch.Tensor:
    """Aligned views; standardised, uncorrelated entries: the rows of a Hadamard matrix without its constant column."""
    h = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    rows = torch.kron(h, h)[:, 1:]  # [4, 3]: zero mean, orthogonal columns
    return rows[:, None].expand(n, m, 3)


def test_values_at_collapse_and_at_the_ideal():
    ideal, collapsed = Outputs(spread()), Outputs(torch.full((4, 3, 3), 0.7, dtype=torch.float64))
    close = {"rel": 1e-9}
    assert SimCLR(0.5)(collapsed).item() == pytest.approx(math.log(2 * 4 - 1), **close)
    # Cosine 1 with the positive, -1/3 with the six negatives.
    assert SimCLR(0.5)(ideal).item() == pytest.approx(math.log(1 + 6 * math.exp((-1 / 3 - 1) / 0.5)), **close)
    assert VICReg(25, 25, 1)(collapsed).item() == pytest.approx(25 * (1 - math.sqrt(1e-4)), **close)
    assert VICReg(25, 25, 1)(ideal).item() == 0
    assert BarlowTwins(5e-3, 0.1)(collapsed).item() == pytest.approx(0.1 * 3, **close)
    assert BarlowTwins(5e-3, 0.1)(ideal).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("objective", [SimCLR(), VICReg(), BarlowTwins()], ids=str)
def test_a_gradient_step_from_near_collapse_spreads(objective):
    z = 1 + 0.01 * random_outputs(n=6, m=1, d=4).z.expand(6, 2, 4)
    step = -grad(lambda z: objective(Outputs(z)))(z)

    def spread_of(z):  # of directions for SimCLR, of values for the others
        z = z / z.norm(dim=-1, keepdim=True) if isinstance(objective, SimCLR) else z
        return z.var(0).sum()

    if isinstance(objective, BarlowTwins):  # it does not see the scale: what it sees is the correlation between entries

        def correlated(z):
            return (torch.corrcoef(z[:, 0].T) - torch.eye(4, dtype=z.dtype)).square().sum()

        assert jvp(correlated, (z,), (step,))[1] < 0
    else:
        assert jvp(spread_of, (z,), (step,))[1] > 0


def test_nothing_in_simsiam_and_byol_prefers_spread():
    # Their lowest value is reached at collapse too: it is the stop and the predictor that keep training away from it.
    for z in (spread(), torch.ones(4, 3, 3, dtype=torch.float64)):
        outputs = Outputs(z, p=2 * z, target=3 * z)
        assert SimSiam()(outputs).item() == pytest.approx(-1, rel=1e-9)
        assert BYOL()(outputs).item() == pytest.approx(0, abs=1e-9)
        assert grad(live(BYOL(), outputs)[0])(outputs.p).abs().max() < 1e-9


@pytest.mark.parametrize("objective", [SimCLR(), SimSiam(), BYOL()], ids=str)
def test_cosine_losses_see_neither_a_common_rotation_nor_lengths(objective):
    outputs = random_outputs()
    rotation = torch.linalg.qr(random_outputs(n=1, m=4, seed=5).z[0])[0]
    lengths = random_outputs(d=1, seed=6).z.exp()
    moved = Outputs(*(lengths * (field @ rotation) for field in outputs))
    torch.testing.assert_close(objective(moved), objective(outputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("objective", [VICReg(), BarlowTwins()], ids=str)
def test_statistical_losses_see_neither_a_shift_nor_the_order_of_entries(objective):
    outputs = random_outputs()
    moved = Outputs((outputs.z + 3.0)[..., [2, 0, 3, 1]])
    torch.testing.assert_close(objective(moved), objective(outputs), rtol=1e-10, atol=1e-12)


@every
@settings(max_examples=15, deadline=None)
@given(data=st.data(), n=st.integers(2, 6), m=st.integers(2, 4), d=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_samples_and_views_have_no_order(objective, data, n, m, d, seed):
    outputs = random_outputs(n, m, d, seed=seed)
    samples, views = data.draw(st.permutations(range(n))), data.draw(st.permutations(range(m)))
    moved = Outputs(*(field[samples][:, views] for field in outputs))
    torch.testing.assert_close(objective(moved), objective(outputs), rtol=1e-9, atol=1e-10)
    fn, x = live(objective, outputs)
    moved_fn, moved_x = live(objective, moved)
    torch.testing.assert_close(grad(moved_fn)(moved_x), grad(fn)(x)[samples][:, views], rtol=1e-7, atol=1e-8)


# --- the interface -----------------------------------------------------------------------------------------------------


def test_what_each_method_needs():
    assert {type(o): (o.heads, o.ema_target) for o in OBJECTIVES} == {
        SimCLR: (("projector",), False),
        VICReg: (("projector",), False),
        BarlowTwins: (("projector",), False),
        SimSiam: (("projector", "predictor"), False),
        BYOL: (("projector", "predictor"), True),
    }
    with pytest.raises(TypeError, match="abstract"):
        SSLObjective()


@every
def test_is_a_value_that_changes_nothing(objective):
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.temperature = 1.0
    assert objective == dataclasses.replace(objective)
    outputs = random_outputs()
    before = [field.clone() for field in outputs]
    assert objective(outputs) == objective(outputs, ())
    assert objective.init_carry(4) == ()
    assert objective.update(outputs, ()) == ()
    for field, old in zip(outputs, before, strict=True):
        assert torch.equal(field, old)


@every
def test_bad_shapes_are_named(objective):
    field = "p" if "predictor" in objective.heads else "z"
    with pytest.raises(ValueError, match=rf"`outputs.{field}`.*m >= 2 views.*m = 1.*\(5, 1, 4\)"):
        objective(random_outputs(m=1))
    with pytest.raises(ValueError, match=rf"`outputs.{field}` should have shape \[n, m, d\].*\(5, 4\).*axis 1"):
        objective(Outputs(*(f[:, 0] for f in random_outputs())))
    if field == "z":
        with pytest.raises(ValueError, match=r"`outputs.z` should hold n >= 2 samples.*n = 1"):
            objective(random_outputs(n=1))
    else:
        assert objective(random_outputs(n=1)).isfinite()


def test_missing_and_mismatched_fields_are_named():
    z, p, target = random_outputs()
    for objective in (SimSiam(), BYOL()):
        with pytest.raises(ValueError, match=r"`outputs.p` should be a tensor.*got None"):
            objective(Outputs(z, target=target))
        with pytest.raises(ValueError, match=r"should have the shape of `outputs.p`, \(5, 3, 3\), got \(5, 3, 4\)"):
            objective(Outputs(z, p[..., :3], target))
    with pytest.raises(ValueError, match=r"`outputs.target` should be a tensor.*got None"):
        BYOL()(Outputs(z, p))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (SimCLR, "temperature"),
        (VICReg, "invariance"),
        (VICReg, "variance"),
        (VICReg, "covariance"),
        (VICReg, "eps"),
        (BarlowTwins, "lambd"),
        (BarlowTwins, "scale"),
        (BarlowTwins, "eps"),
    ],
)
def test_bad_weights_are_named(cls, name, bad):
    with pytest.raises(ValueError, match=f"`{name}` should be a finite number"):
        cls(**{name: bad})


@pytest.mark.parametrize(("cls", "name"), [(SimCLR, "temperature"), (VICReg, "eps"), (BarlowTwins, "eps")])
def test_divisors_are_not_zero(cls, name):
    with pytest.raises(ValueError, match=f"`{name}` should be a finite number > 0, got 0"):
        cls(**{name: 0.0})


# --- the target network ------------------------------------------------------------------------------------------------


def test_ema_is_the_weighted_mean_and_leaves_its_arguments():
    target = {"b": (torch.tensor([1.0, 2.0]),), "a": torch.tensor(4.0)}
    params = {"a": torch.tensor(8.0, requires_grad=True), "b": (torch.tensor([3.0, 6.0]),)}
    moved = objectives.ema(target, params, tau=0.25)
    torch.testing.assert_close(moved, {"a": torch.tensor(7.0), "b": (torch.tensor([2.5, 5.0]),)})
    assert not moved["a"].requires_grad
    assert target["a"] == 4.0
    assert params["a"] == 8.0


def test_ema_after_many_steps_is_the_geometric_sum():
    tau, values = 0.9, [float(v) for v in range(1, 8)]
    target = {"w": torch.tensor(0.0, dtype=torch.float64)}
    for v in values:
        target = objectives.ema(target, {"w": torch.tensor(v, dtype=torch.float64)}, tau)
    expected = sum((1 - tau) * tau ** (len(values) - 1 - i) * v for i, v in enumerate(values))
    assert target["w"].item() == pytest.approx(expected, rel=1e-14)


def test_ema_copies_integer_leaves():
    moved = objectives.ema({"w": torch.zeros(1), "n": torch.tensor(3)}, {"w": torch.ones(1), "n": torch.tensor(7)}, tau=0.5)
    assert moved["n"] == 7
    assert moved["n"].dtype == torch.int64


def test_ema_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"`tau` should be in \[0, 1\].*got 1.5"):
        objectives.ema({"w": torch.zeros(1)}, {"w": torch.zeros(1)}, tau=1.5)
    with pytest.raises(ValueError, match=r"`target_params`.*'w'.*\(2,\).*\(1,\)"):
        objectives.ema({"w": torch.zeros(2)}, {"w": torch.zeros(1)}, tau=0.5)
