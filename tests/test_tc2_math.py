"""The mathematics of TC²: calibration, its losses, pairings and conflict, against closed forms and central differences."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.func import grad, jvp, vmap

from metacal import tc2, tree
from metacal.tc2 import conflict, factors, losses

LOSSES = {"literal": tc2.literal(lambda_s=0.3), "stable": tc2.stable(lambda_s=0.3, lambda_1=0.2)}
TERMS = ["orthogonality", "reconstruction", "weight_reconstruction", "sparsity"]
CALIBRATORS = {
    "qr": tc2.Networks(n_f=3, hidden=7),
    "penalty": tc2.Networks(n_f=3, hidden=7, orthogonal="penalty"),
    "soft": tc2.Networks(n_f=5, hidden=7, sparsity=tc2.SoftThreshold(0.2)),
    "top_k": tc2.Networks(n_f=4, hidden=7, sparsity=tc2.TopK(2)),
    "square": tc2.Networks(hidden=7),
    "pca": tc2.PCA(n_f=3, lambda_1=0.1),
    "identity": tc2.Identity(),
}
NETWORKS = [name for name in CALIBRATORS if name not in ("pca", "identity")]
D = 5

property_test = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def orthonormal(d: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, n, seed=seed)).Q


def anisotropic(rows: int, d: int, seed: int = 0) -> Tensor:
    """Data with well separated principal directions and a non-zero mean."""
    return (normal(rows, d, seed=seed) * torch.linspace(3.0, 0.5, d).square()) @ orthonormal(d, d, seed=seed + 1) + 0.5


def trained(calibrator: tc2.Networks, d: int = D) -> dict:
    """Parameters that are nowhere at their starting values."""
    phi = calibrator.init(d, seeded(1))
    return tree.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=seeded(leaf.numel())), phi)


def central_difference(fn, x, direction, step=1e-5):
    up, down = fn(tree.axpy(step, direction, x)), fn(tree.axpy(-step, direction, x))
    return tree.scale(0.5 / step, tree.sub(up, down))


def random_like(x, seed=0):
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=seeded(seed + leaf.numel())), x)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# -- fact 1: the literal L_w is degenerate, the stable one has a closed form ------------------------------------------


def per_sample(loss: tc2.CalibrationLoss, Z: Tensor, V: Tensor, w: Tensor) -> Tensor:
    """L_w: the two per-sample terms, without lambda_s."""
    _, values = loss(Z, V, w)
    ratio = loss.weights["sparsity"] / loss.weights["weight_reconstruction"]
    return values["weight_reconstruction"] + ratio * values["sparsity"]


def literal_w(lambda_1: float) -> tc2.CalibrationLoss:
    return tc2.literal(lambda_s=1.0).with_weight("sparsity", lambda_1)


@property_test
@given(d=st.integers(2, 6), seed=st.integers(0, 1000))
def test_literal_weights_vanish_exactly_from_the_threshold_on(d, seed):
    V, z = orthonormal(d, d, seed), normal(1, d, seed=seed + 1)
    u = z @ V
    threshold = (u.abs().max() / u.norm()).item()
    assert threshold <= 1

    above = literal_w(threshold * 1.001)
    at_zero = per_sample(above, z, V, torch.zeros(1, d))
    candidates = torch.cat([torch.eye(d), -torch.eye(d), normal(200, d, seed=seed + 2), u])
    for scale in (1e-6, 1e-3, 1e-1, 1.0, 10.0):  # the loss is convex: a better w anywhere would show near zero too
        assert (vmap(lambda w: per_sample(above, z, V, w[None]))(scale * candidates) >= at_zero).all()

    below = literal_w(threshold * 0.99)
    steepest = torch.zeros(1, d)
    steepest[0, u.abs().argmax()] = u[0, u.abs().argmax()].sign()
    assert per_sample(below, z, V, 1e-4 * steepest) < per_sample(below, z, V, torch.zeros(1, d))


@pytest.mark.parametrize(("lambda_1", "vanishes"), [(1.0, True), (0.3, False)])
def test_minimiser_of_the_literal_weights(lambda_1, vanishes):
    V, z = orthonormal(2, 2), normal(1, 2, seed=3)
    u = z @ V
    assert (lambda_1 >= u.abs().max() / u.norm()) == vanishes
    found = minimize(
        lambda w: per_sample(literal_w(lambda_1), z, V, torch.from_numpy(w)[None]).item(),
        0.5 * u[0].numpy(),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-14},
    )
    assert (np.abs(found.x).max() < 1e-6) == vanishes


@pytest.mark.parametrize("n_f", [2, 3, 5])
def test_stable_weights_are_soft_thresholded(n_f):
    lambda_1, rows = 0.4, 6
    V, Z = orthonormal(D, n_f), normal(rows, D, seed=3)
    loss = tc2.stable(lambda_s=1.0, lambda_1=lambda_1)
    smooth = grad(lambda w: loss.terms["weight_reconstruction"](Z, V, w))
    w, step = torch.zeros(rows, n_f), 0.2 * rows * D
    for _ in range(150):  # ISTA; the proximal operator is written out here
        x = w - step * smooth(w)
        w = x.sign() * (x.abs() - step * lambda_1 / (rows * n_f)).clamp(min=0)
    closed = tc2.PCA(n_f, lambda_1).weights({}, Z, V)
    torch.testing.assert_close(closed, w, rtol=0, atol=1e-12)
    assert (closed == 0).any()
    assert (closed != 0).any()
    for seed in range(20):
        other = closed + 0.1 * normal(rows, n_f, seed=seed)
        assert per_sample(loss, Z, V, other) > per_sample(loss, Z, V, closed)


# -- fact 2: n_f = d and n_f > d ---------------------------------------------------------------------------------------


@property_test
@given(d=st.integers(1, 8), seed=st.integers(0, 1000))
def test_square_orthonormal_factors_reconstruct_everything(d, seed):
    Z, V = normal(4, d, seed=seed), orthonormal(d, d, seed + 1)
    assert LOSSES["stable"].terms["reconstruction"](Z, V, Z @ V) < 1e-28
    assert LOSSES["literal"].terms["reconstruction"](Z, V, Z @ V) < 1e-12


@pytest.mark.parametrize(("d", "n_f"), [(3, 4), (4, 7)])
def test_more_factors_than_dimensions_cannot_be_orthonormal(d, n_f):
    term = LOSSES["literal"].terms["orthogonality"]
    value = minimize_tensor(lambda V: term(None, V, None).square(), normal(d, n_f))[1] ** 0.5
    assert value == pytest.approx((n_f - d) ** 0.5, rel=1e-6)


def test_num_factors_are_checked():
    for calibrator in (tc2.Networks(n_f=6, hidden=3), tc2.PCA(n_f=6)):
        with pytest.raises(ValueError, match=r"`n_f` should be at most d = 5.*n_f <= 5"):
            calibrator.init(5)
    with pytest.raises(ValueError, match="at most d = 2"):
        tc2.PCA(n_f=3).factors({}, normal(9, 2))
    with pytest.warns(tc2.VacuousReconstructionWarning, match="n_f = d = 5 and no sparsity"):
        tc2.check_num_factors(5, 5, sparse=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tc2.check_num_factors(5, 5, sparse=True)
        tc2.check_num_factors(4, 5, sparse=False)


# -- fact 3: L_v alone is PCA ------------------------------------------------------------------------------------------


def minimize_tensor(fn, start: Tensor) -> tuple[Tensor, float]:
    """BFGS on a flattened tensor; the minimiser is scipy's, the gradient torch's."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x).reshape(start.shape).requires_grad_()
        value = fn(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.reshape(-1).numpy()

    found = minimize(value_and_gradient, start.reshape(-1).numpy(), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 3000})
    return torch.from_numpy(found.x).reshape(start.shape), found.fun


@pytest.mark.parametrize("n_f", [1, 2, 4])
@pytest.mark.parametrize("form", ["literal_qr", "stable_qr", "stable_penalty"])
def test_factor_loss_alone_is_pca(form, n_f):
    Z = anisotropic(30, 6)
    terms = LOSSES[form.split("_")[0]].terms

    def to_factors(A: Tensor) -> Tensor:
        return A if form == "stable_penalty" else factors.orthonormalised(A)

    def loss(A: Tensor) -> Tensor:
        V = to_factors(A)
        return terms["reconstruction"](Z, V, Z @ V) + (terms["orthogonality"](Z, V, Z @ V) if form == "stable_penalty" else 0)

    V = to_factors(minimize_tensor(loss, normal(6, n_f, seed=4))[0])
    top = torch.linalg.svd(Z).Vh[:n_f].mT
    torch.testing.assert_close(V @ V.mT, top @ top.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(V.mT @ V, torch.eye(n_f), rtol=0, atol=1e-5)


@property_test
@given(d=st.integers(1, 7), rows=st.integers(1, 9), data=st.data())
def test_pca_factors_span_the_top_singular_vectors(d, rows, data):
    n_f = data.draw(st.integers(1, min(d, rows)))
    Z = anisotropic(rows, d, seed=data.draw(st.integers(0, 1000)))
    V = tc2.PCA(n_f).factors({}, Z)
    energy = torch.linalg.svdvals(Z)[:n_f].square().sum()
    torch.testing.assert_close(V.mT @ V, torch.eye(n_f), rtol=0, atol=1e-12)
    torch.testing.assert_close((Z @ V).square().sum(), energy, rtol=1e-10, atol=0)
    torch.testing.assert_close(tc2.PCA(n_f).factors({}, Z.reshape(1, rows, d)), V)


def test_pca_works_with_fewer_samples_than_factors_and_is_constant_to_differentiation():
    pca, Z = tc2.PCA(4), normal(2, D)
    V = pca.factors({}, Z)
    assert V.shape == (D, 4)
    torch.testing.assert_close(V.mT @ V, torch.eye(4), rtol=0, atol=1e-12)
    assert (grad(lambda z: pca.factors({}, z).sum())(Z) == 0).all()
    assert pca.init(D) == {}


@property_test
@given(d=st.integers(1, 7), rows=st.integers(1, 5), seed=st.integers(0, 1000), data=st.data())
def test_factor_terms_do_not_see_a_rotation(d, rows, seed, data):
    n_f = data.draw(st.integers(1, d))
    Z, V, R = normal(rows, d, seed=seed), normal(d, n_f, seed=seed + 1), orthonormal(n_f, n_f, seed + 2)
    for loss in LOSSES.values():
        for name in ("orthogonality", "reconstruction"):
            term = loss.terms[name]
            torch.testing.assert_close(term(Z, V @ R, Z @ V), term(Z, V, Z @ V), rtol=1e-10, atol=1e-12)


# -- the losses --------------------------------------------------------------------------------------------------------


def test_terms_are_the_formulas_of_the_documentation():
    Z, V, w, n_f = normal(6, D), normal(D, 3, seed=1), normal(6, 3, seed=2), 3
    z, v, x = Z.numpy(), V.numpy(), w.numpy()
    orth = np.sqrt(((v.T @ v - np.eye(n_f)) ** 2).sum())
    rec = np.sqrt(((z - z @ v @ v.T) ** 2).sum())
    rows = [np.sqrt(((z[j] - v @ x[j]) ** 2).sum()) for j in range(6)]
    total, values = tc2.literal(lambda_s=0.7)(Z, V, w)
    l1 = np.abs(x).sum(1).mean()
    assert [values[name].item() for name in TERMS] == pytest.approx([orth, rec, np.mean(rows), l1], rel=1e-13)
    assert total.item() == pytest.approx(orth + rec + 0.7 * (np.mean(rows) + l1), rel=1e-13)

    total, values = tc2.stable(lambda_s=0.7, lambda_1=0.3)(Z, V, w)
    per_sample_mean = np.mean([rows[j] ** 2 / D + 0.3 * np.abs(x[j]).sum() / n_f for j in range(6)])
    assert values["orthogonality"].item() == pytest.approx(orth**2 / n_f, rel=1e-13)
    assert values["reconstruction"].item() == pytest.approx(rec**2 / (z**2).sum(), rel=1e-13)
    assert total.item() == pytest.approx(orth**2 / n_f + rec**2 / (z**2).sum() + 0.7 * per_sample_mean, rel=1e-13)


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("argument", range(3))
def test_term_gradients_equal_central_differences(form, name, argument):
    arguments = [normal(6, D), normal(D, 3, seed=1), normal(6, 3, seed=2)]
    if form == "stable" and name == "reconstruction" and argument == 0:
        pytest.skip("Z is detached there, see test_stable_reconstruction_detaches_the_representations")
    term = LOSSES[form].terms[name]

    def of_one(x: Tensor) -> Tensor:
        return term(*(x if i == argument else other for i, other in enumerate(arguments)))

    x = arguments[argument]
    direction = random_like(x)
    expected = central_difference(of_one, x, direction)
    torch.testing.assert_close(tree.vdot(grad(of_one)(x), direction), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        jvp(grad(of_one), (x,), (direction,))[1], central_difference(grad(of_one), x, direction), rtol=1e-6, atol=1e-8
    )


def test_stable_reconstruction_detaches_the_representations():
    term, Z, V = LOSSES["stable"].terms["reconstruction"], normal(6, D), normal(D, 3, seed=1)
    assert (grad(lambda z: term(z, V, z @ V))(Z) == 0).all()
    assert jvp(lambda z: term(z, V, z @ V), (Z,), (Z,))[1] == 0
    leaf = Z.clone().requires_grad_()
    assert not term(leaf, V, Z @ V).requires_grad
    assert (grad(lambda z: LOSSES["literal"].terms["reconstruction"](z, V, z @ V))(Z) != 0).any()


@pytest.mark.parametrize("form", LOSSES)
def test_derivatives_are_finite_where_the_norms_are_zero(form):
    Z, V = normal(4, D), torch.eye(D)
    loss = LOSSES[form]

    def total(arguments):
        return loss(arguments["Z"], arguments["V"], arguments["w"])[0]

    for arguments in ({"Z": Z, "V": V, "w": Z.clone()}, {"Z": torch.zeros(4, D), "V": V, "w": torch.zeros(4, D)}):
        assert torch.equal(losses.gram_error(V), torch.zeros(D, D))
        first, second = jvp(grad(total), (arguments,), (random_like(arguments),))
        assert all(leaf.isfinite().all() for leaf in tree.leaves((first, second)))


def test_nan_is_not_hidden_by_the_safe_norm():
    Z = normal(4, D)
    Z[0, 0] = torch.nan
    for loss in LOSSES.values():
        assert loss(Z, torch.eye(D), Z)[0].isnan()


def hvp_norm(loss: tc2.CalibrationLoss, V: Tensor, direction: Tensor) -> float:
    return jvp(grad(lambda v: loss.terms["orthogonality"](None, v, None)), (V,), (direction,))[1].norm().item()


def test_second_order_products_near_orthonormal_factors():
    V, noise, direction = orthonormal(8, 4), normal(8, 4, seed=1), normal(8, 4, seed=2)
    distances = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    literal, stable = ([hvp_norm(LOSSES[form], V + eps * noise, direction) for eps in distances] for form in ("literal", "stable"))
    for near, far in zip(literal[2:], literal[1:-1], strict=True):  # like 1 / distance
        assert near / far == pytest.approx(10, rel=0.2)
    assert max(stable[1:]) / min(stable[1:]) < 1.1


def test_terms_can_be_dropped_replaced_added_and_reweighted():
    Z, V, w = normal(4, D), normal(D, 2, seed=1), normal(4, 2, seed=2)
    loss = tc2.stable(lambda_s=0.5, lambda_1=0.2)
    total, values = loss(Z, V, w)
    assert list(values) == TERMS

    dropped, rest = loss.without("sparsity")(Z, V, w)
    assert "sparsity" not in rest
    torch.testing.assert_close(dropped, total - 0.5 * 0.2 * values["sparsity"])

    added, _ = loss.with_term("decay", lambda Z, V, w: w.square().sum(), 3.0)(Z, V, w)
    torch.testing.assert_close(added, total + 3 * w.square().sum())
    replaced, _ = loss.with_term("sparsity", lambda Z, V, w: torch.ones(()), 2.0)(Z, V, w)
    torch.testing.assert_close(replaced, dropped + 2)
    torch.testing.assert_close(loss.with_weight("orthogonality", 0.0)(Z, V, w)[0], total - values["orthogonality"])
    assert tc2.CalibrationLoss({})(Z, V, w) == (0, {})
    assert list(loss.terms) == TERMS  # none of these changed the loss they started from

    learnable = grad(lambda weight: loss.with_weight("orthogonality", weight)(Z, V, w)[0])(torch.tensor(1.0))
    torch.testing.assert_close(learnable, values["orthogonality"])

    with pytest.raises(ValueError, match="`sparsty` should be one of the loss's terms"):
        loss.with_weight("sparsty", 1.0)
    with pytest.raises(ValueError, match="`sparsty` should be one of"):
        loss.without("sparsty")
    with pytest.raises(ValueError, match="`sparsty` should be one of"):
        tc2.CalibrationLoss(loss.terms, {"sparsty": 1.0})


# -- calibrators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orthogonal", ["qr", "penalty"])
@pytest.mark.parametrize("d", [1, 2, 16, 63])
def test_networks_start_at_the_identity(orthogonal, d):
    calibrator = tc2.Networks(n_f=None, hidden=9, orthogonal=orthogonal)
    phi, Z = calibrator.init(d, seeded(0)), 10 * normal(20, d)
    torch.testing.assert_close(calibrator.calibrate(phi, Z, calibrator.factors(phi, Z)), Z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("orthogonal", ["qr", "penalty"])
@pytest.mark.parametrize(("d", "n_f"), [(2, 1), (8, 3), (64, 32)])
def test_networks_start_at_a_projection_onto_fewer_factors(orthogonal, d, n_f):
    calibrator = tc2.Networks(n_f, hidden=9, orthogonal=orthogonal)
    phi, Z = calibrator.init(d, seeded(0)), normal(20, d)
    V = calibrator.factors(phi, Z)
    torch.testing.assert_close(V.mT @ V, torch.eye(n_f), rtol=0, atol=1e-13)
    torch.testing.assert_close(V, calibrator.factors(phi, 3 * Z + 1), rtol=0, atol=1e-13)  # whatever the batch
    torch.testing.assert_close(calibrator.calibrate(phi, Z, V), Z @ V @ V.mT, rtol=0, atol=1e-13)


def test_the_start_is_orthonormal_in_float32_too():
    calibrator = tc2.Networks(hidden=9, orthogonal="penalty")
    V = calibrator.factors(calibrator.init(512, seeded(0), dtype=torch.float32), torch.randn(4, 512, dtype=torch.float32))
    assert V.dtype == torch.float32
    assert losses.gram_error(V).abs().max() < 2e-6


def test_networks_leave_the_start_when_trained():
    calibrator, Z = tc2.Networks(n_f=3, hidden=7), anisotropic(40, D)
    phi = calibrator.init(D, seeded(0))
    loss = tc2.stable(lambda_1=0.0)

    def total(phi):
        V = calibrator.factors(phi, Z)
        return loss(Z, V, calibrator.weights(phi, Z, V))[0]

    start = total(phi).item()
    for _ in range(300):
        phi = tree.axpy(-0.05, grad(total)(phi), phi)
    best = tc2.PCA(3, 0.0)
    V = best.factors({}, Z)
    floor = loss(Z, V, best.weights({}, Z, V))[0].item()
    assert floor < total(phi).item() < floor + 0.5 * (start - floor)


def test_statistics_are_the_mean_and_the_biased_covariance():
    Z = normal(3, 4, D)
    rows = Z.reshape(12, D).numpy()
    expected = np.concatenate([rows.mean(0)[:, None], np.cov(rows.T, bias=True)], axis=1)
    np.testing.assert_allclose(factors.statistics(Z).numpy(), expected, rtol=1e-12, atol=1e-14)
    assert (factors.statistics(Z[0, :1])[:, 1:] == 0).all()  # one sample


def test_networks_are_the_formula_of_their_docstring():
    calibrator, Z = CALIBRATORS["penalty"], normal(9, D)
    phi = trained(calibrator)

    def mlp(params: dict, x: np.ndarray) -> np.ndarray:
        module = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
        values = [params[layer][name] for layer in ("hidden", "output") for name in ("weight", "bias")]
        module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
        return module(torch.from_numpy(x)).detach().numpy()

    z = Z.numpy()
    S = np.concatenate([z.mean(0)[:, None], np.cov(z.T, bias=True)], axis=1)
    V0 = np.cos(np.pi * (np.arange(D)[:, None] + 0.5) * np.arange(3) / D)
    V0 /= np.linalg.norm(V0, axis=0)
    V = V0 + mlp(phi["factor"], S)
    w = z @ V + mlp(phi["weight"], z)
    np.testing.assert_allclose(calibrator.factors(phi, Z).numpy(), V, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(calibrator.weights(phi, Z, torch.from_numpy(V)).numpy(), w, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(calibrator.calibrate(phi, Z, torch.from_numpy(V)).numpy(), w @ V.T, rtol=1e-12, atol=1e-13)


@property_test
@given(d=st.integers(1, 7), seed=st.integers(0, 1000), data=st.data())
def test_qr_is_orthonormal_and_continuous(d, seed, data):
    n_f = data.draw(st.integers(1, d))
    A = normal(d, n_f, seed=seed) + 2 * torch.eye(d, n_f)
    Q = factors.orthonormalised(A)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(n_f), rtol=0, atol=1e-12)
    R = Q.mT @ A
    torch.testing.assert_close(Q @ R, A, rtol=0, atol=1e-12)
    torch.testing.assert_close(R.tril(-1), torch.zeros(n_f, n_f), rtol=0, atol=1e-12)
    assert (R.diagonal() > 0).all()
    flip = torch.ones(n_f)
    flip[0] = -1
    torch.testing.assert_close(factors.orthonormalised(A * flip), Q * flip, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_f", [1, 3, D])
def test_qr_is_twice_differentiable(n_f):
    A, direction, target = normal(D, n_f), normal(D, n_f, seed=1), normal(D, n_f, seed=2)

    def fn(A: Tensor) -> Tensor:
        return (factors.orthonormalised(A) * target).sum().exp() + (factors.orthonormalised(A) ** 3 * target).sum()

    torch.testing.assert_close(tree.vdot(grad(fn)(A), direction), central_difference(fn, A, direction), rtol=1e-7, atol=1e-8)
    expected = central_difference(grad(fn), A, direction)
    torch.testing.assert_close(jvp(grad(fn), (A,), (direction,))[1], expected, rtol=1e-6, atol=1e-7)
    leaf = A.clone().requires_grad_()
    (first,) = torch.autograd.grad(fn(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, leaf, direction)[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_is_twice_differentiable_in_parameters_and_representations(name):
    calibrator, target = CALIBRATORS[name], normal(6, D, seed=5)
    point = {"phi": trained(calibrator), "Z": normal(6, D)}

    def fn(point):
        V = calibrator.factors(point["phi"], point["Z"])
        return (calibrator.calibrate(point["phi"], point["Z"], V) * target).sum().sin()

    direction = random_like(point)
    torch.testing.assert_close(tree.vdot(grad(fn)(point), direction), central_difference(fn, point, direction), rtol=1e-6, atol=1e-8)
    expected = central_difference(grad(fn), point, direction)
    assert_trees_close(jvp(grad(fn), (point,), (direction,))[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_vmap_over_tasks_equals_a_loop(name):
    calibrator, loss, K = CALIBRATORS[name], tc2.stable(), 3
    phi = trained(calibrator) if name in NETWORKS else calibrator.init(D)
    Z = normal(K, 8, D)

    def task(z: Tensor):
        V = calibrator.factors(phi, z)
        return V, calibrator.calibrate(phi, z, V), loss(z, V, calibrator.weights(phi, z, V))

    def gradient(z: Tensor):
        return grad(lambda phi, z: loss(z, calibrator.factors(phi, z), calibrator.weights(phi, z, calibrator.factors(phi, z)))[0], (0, 1))(
            phi, z
        )

    assert_trees_close(vmap(task)(Z), tree.stack([task(z) for z in Z]), rtol=1e-12, atol=1e-13)
    assert_trees_close(vmap(gradient)(Z), tree.stack([gradient(z) for z in Z]), rtol=1e-11, atol=1e-12)


def test_weights_follow_samples_and_factors_follow_the_batch():
    calibrator, Z = CALIBRATORS["qr"], normal(2, 4, D)
    phi = trained(calibrator)
    V = calibrator.factors(phi, Z)
    torch.testing.assert_close(V, calibrator.factors(phi, Z.reshape(8, D).flip(0)))  # no order, no shape
    assert not torch.allclose(V, calibrator.factors(phi, 2 * Z))
    torch.testing.assert_close(calibrator.calibrate(phi, Z, V)[1, 2], calibrator.calibrate(phi, Z[1, 2], V))
    with pytest.raises(ValueError, match=r"`Z` should have the last dimension d = 5.*got \(4, 6\)"):
        calibrator.factors(phi, normal(4, 6))


def test_identity_is_exact():
    z = normal(4, 3)
    identity = tc2.Identity()
    V = identity.factors({}, z)
    assert identity.init(3) == {}
    assert torch.equal(V, torch.eye(3))
    assert identity.calibrate({}, z, V) is z
    assert tc2.stable(lambda_1=0.0)(z, V, identity.weights({}, z, V))[0] == 0


def test_initialisation_is_reproducible_and_of_the_asked_type():
    calibrator = tc2.Networks(n_f=2, hidden=4)
    first, again, other = (calibrator.init(3, seeded(seed)) for seed in (0, 0, 1))
    assert_trees_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["factor"]["hidden"]["weight"], other["factor"]["hidden"]["weight"])
    assert tree.paths(first) == [
        f"{net}.{layer}.{name}" for net in ("factor", "weight") for layer in ("hidden", "output") for name in ("bias", "weight")
    ]
    assert {leaf.dtype for leaf in tree.leaves(calibrator.init(3, dtype=torch.float32))} == {torch.float32}
    assert {leaf.device.type for leaf in tree.leaves(calibrator.init(3, device="meta"))} == {"meta"}
    reference = torch.nn.Linear(400, 200)  # drawn from the same interval
    drawn = tc2.Networks(n_f=2, hidden=200).init(400, seeded(0))["weight"]["hidden"]["weight"]
    assert drawn.abs().max().item() == pytest.approx(reference.weight.abs().max().item(), rel=1e-2)
    assert drawn.std().item() == pytest.approx(reference.weight.std().item(), rel=1e-2)


@property_test
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 4))
def test_soft_threshold_is_the_formula(values, threshold):
    w = torch.tensor(values)
    expected = w.sign() * (w.abs() - threshold).clamp(min=0)
    torch.testing.assert_close(tc2.SoftThreshold(threshold)(w), expected, rtol=1e-12, atol=1e-12)
    assert ((w.abs() > threshold) | (tc2.SoftThreshold(threshold)(w) == 0)).all()


@property_test
@given(rows=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 1000), data=st.data())
def test_top_k_keeps_the_k_largest(rows, n, seed, data):
    k = data.draw(st.integers(1, n))
    w = normal(rows, n, seed=seed)
    kept = tc2.TopK(k)(w)
    assert ((kept != 0).sum(-1) == k).all()
    assert torch.equal(kept[kept != 0], w[kept != 0])
    expected = w.abs().sort(-1, descending=True).values[:, :k].sum(-1)
    torch.testing.assert_close(kept.abs().sum(-1), expected)
    assert torch.equal(grad(lambda w: tc2.TopK(k)(w).sum())(w), (kept != 0).to(w.dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tc2.Networks(n_f=0), "`n_f` should be an integer of at least 1, got 0"),
        (lambda: tc2.Networks(hidden=0), "`hidden` should be an integer of at least 1, got 0"),
        (lambda: tc2.Networks(orthogonal="svd"), "`orthogonal` should be 'qr' or 'penalty', got 'svd'"),
        (lambda: tc2.PCA(0), "`n_f` should be an integer of at least 1"),
        (lambda: tc2.PCA(1, -0.1), "`lambda_1` should be non-negative, got -0.1"),
        (lambda: tc2.SoftThreshold(float("nan")), "`threshold` should be non-negative, got nan"),
        (lambda: tc2.TopK(0), "`k` should be an integer of at least 1"),
        (lambda: tc2.TopK(4)(torch.ones(2, 3)), "`k` should be at most n_f = 3"),
    ],
)
def test_bad_calibrators_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- pairings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("name", ["own", "cross", "all", "cyclic"])
def test_pairings_are_row_stochastic_and_their_sparse_form_says_the_same(name, K):
    if name == "cross" and K == 1:
        with pytest.raises(ValueError, match="`K` should be at least 2 for the pairing `cross`"):
            tc2.cross(1)
        return
    P = tc2.pairing_matrix(name, K)
    torch.testing.assert_close(P.sum(1), torch.ones(K))
    assert torch.equal(tc2.pairing_matrix(P, K), P)
    indices, weights = tc2.judged(P)
    assert indices.shape == weights.shape == (K, {"own": 1, "cyclic": 1, "cross": K - 1, "all": K}[name])
    assert torch.equal(torch.zeros(K, K).scatter_add(1, indices, weights), P)


def test_named_pairings():
    assert torch.equal(tc2.own(3), torch.eye(3))
    assert torch.equal(tc2.cross(3).diagonal(), torch.zeros(3))
    assert tc2.cross(3)[0, 1] == 0.5
    assert torch.equal(tc2.all_tasks(4), torch.full((4, 4), 0.25))
    for shift in (-1, 0, 1, 5):
        indices, _ = tc2.judged(tc2.cyclic(3, shift))
        assert indices[:, 0].tolist() == [(k + shift) % 3 for k in range(3)]


@property_test
@given(K=st.integers(1, 6), density=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_sparse_form_of_any_pairing_says_the_same(K, density, seed):
    generator = seeded(seed)
    P = torch.rand(K, K, generator=generator) * (torch.rand(K, K, generator=generator) < density) + torch.eye(K).roll(seed, 1)
    P = tc2.pairing_matrix(P / P.sum(1, keepdim=True), K)
    indices, weights = tc2.judged(P)
    assert indices.shape[1] == (P != 0).sum(1).max()
    assert torch.equal(torch.zeros(K, K).scatter_add(1, indices, weights), P)
    losses_of_all = normal(K, K, seed=seed)  # [k, j]: l_j^q(theta'_k)
    torch.testing.assert_close((weights * losses_of_all.gather(1, indices)).sum(1).mean(), (P * losses_of_all).sum() / K)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("others", r"should be one of \['all', 'cross', 'cyclic', 'own'\] or a \[K, K\] matrix, got 'others'"),
        (torch.eye(3), r"K = 2 tasks, got shape \(3, 3\)"),
        (torch.eye(2, dtype=torch.int64), "floating point, got torch.int64"),
        (torch.tensor([[2.0, -1.0], [0.0, 1.0]]), "finite and non-negative"),
        (torch.tensor([[torch.nan, 1.0], [0.0, 1.0]]), "finite and non-negative"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), r"rows that sum to 1, got the sums \[2.0, 1.0\]"),
    ],
)
def test_bad_pairings_are_refused(which, message):
    with pytest.raises(ValueError, match=message):
        tc2.pairing_matrix(which, 2)


def test_no_tasks_are_refused():
    for make in (tc2.own, tc2.cross, tc2.all_tasks, tc2.cyclic):
        with pytest.raises(ValueError, match="`K` should be at least 1"):
            make(0)


# -- conflict ----------------------------------------------------------------------------------------------------------


def test_conflict_of_hand_made_gradients():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [-1.0, -1.0]])
    h = 0.5**0.5
    expected = torch.tensor([[1, 0, -1, -h], [0, 1, 0, -h], [-1, 0, 1, h], [-h, -h, h, 1]])
    cos = tc2.cosines(gradients)
    torch.testing.assert_close(cos, expected)
    rate, severity = tc2.measure_conflict(cos)
    assert rate.item() == pytest.approx(3 / 6)
    assert severity.item() == pytest.approx(-(1 + 2 * h) / 6)

    aligned = tc2.measure_conflict(tc2.cosines(torch.ones(3, 4)))
    assert aligned.rate == 0
    assert aligned.severity == 0
    assert tc2.measure_conflict(tc2.cosines(torch.ones(1, 4))) == (0, 0)


def test_conflict_of_zero_and_of_broken_gradients():
    cos = tc2.cosines(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]))
    assert (cos[0] == 0).all()
    assert tc2.measure_conflict(cos).rate.item() == pytest.approx(1 / 3)
    broken = tc2.measure_conflict(tc2.cosines(torch.tensor([[torch.nan, 0.0], [1.0, 1.0]])))
    assert broken.rate.isnan()
    assert broken.severity.isnan()


def test_cosines_read_trees_like_flat_gradients():
    stacked = {"b": normal(3, 4), "a": {"c": normal(3, 2, 5, seed=1), "d": normal(3, seed=2)}}
    flat = torch.cat([leaf.reshape(3, -1) for leaf in tree.leaves(stacked)], dim=1)
    expected = flat @ flat.mT / (flat.norm(dim=1)[:, None] * flat.norm(dim=1))
    torch.testing.assert_close(tc2.cosines(stacked), expected)
    torch.testing.assert_close(tc2.cosines([tree.index(stacked, k) for k in range(3)]), expected)

    order = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
    surgery = tc2.pcgrad(stacked, order=order)
    assert [leaf.shape for leaf in tree.leaves(surgery)] == [leaf.shape[1:] for leaf in tree.leaves(stacked)]
    torch.testing.assert_close(torch.cat([leaf.reshape(-1) for leaf in tree.leaves(surgery)]), tc2.pcgrad(flat, order=order))
    assert_trees_close(tc2.pcgrad([tree.index(stacked, k) for k in range(3)], order=order), surgery)


def pcgrad_by_loops(gradients: np.ndarray, order: list[list[int]]) -> np.ndarray:
    """Algorithm 1 of Yu et al. 2020, with the mean for the sum."""
    projected = gradients.copy()
    for i in range(len(gradients)):
        for j in order[i]:
            inner = projected[i] @ gradients[j]
            if j != i and inner < 0:
                projected[i] -= inner / (gradients[j] @ gradients[j]) * gradients[j]
    return projected.mean(0)


@property_test
@given(K=st.integers(1, 6), P=st.integers(1, 8), seed=st.integers(0, 1000))
def test_pcgrad_is_the_algorithm(K, P, seed):
    gradients = normal(K, P, seed=seed)
    order = torch.stack([torch.randperm(K, generator=seeded(seed + i)) for i in range(K)])
    expected = pcgrad_by_loops(gradients.numpy(), order.tolist())
    np.testing.assert_allclose(tc2.pcgrad(gradients, order=order).numpy(), expected, rtol=1e-9, atol=1e-10)


def test_pcgrad_orders_are_random_permutations_of_the_generator():
    orders = {str(conflict._projection_order(3, seeded(seed), None).tolist()) for seed in range(20)}
    assert len(orders) > 10
    for seed in range(5):
        drawn = conflict._projection_order(6, seeded(seed), None)
        assert torch.equal(drawn.sort(1).values, torch.arange(6).expand(6, 6))
    gradients = torch.tensor([[1.0, 0.1], [-1.0, 0.5], [-0.2, -1.0]])
    assert torch.equal(tc2.pcgrad(gradients, seeded(3)), tc2.pcgrad(gradients, seeded(3)))
    assert len({str(tc2.pcgrad(gradients, seeded(seed))) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match=r"`order` should be \[2, 2\] with a permutation"):
        tc2.pcgrad(normal(2, 3), order=torch.tensor([[0, 0], [0, 1]]))


@property_test
@given(P=st.integers(1, 8), seed=st.integers(0, 1000))
def test_pcgrad_of_two_tasks_hurts_neither(P, seed):
    gradients = normal(2, P, seed=seed)
    merged = tc2.pcgrad(gradients)
    assert (gradients @ merged >= -1e-12).all()
    if gradients[0] @ gradients[1] >= 0:
        torch.testing.assert_close(merged, gradients.mean(0))


def test_pcgrad_leaves_agreeing_gradients_and_zero_ones_alone():
    g = normal(5)
    torch.testing.assert_close(tc2.pcgrad(g.expand(4, 5)), g)
    torch.testing.assert_close(tc2.pcgrad(torch.stack([g, torch.zeros(5)])), g / 2)
    torch.testing.assert_close(tc2.pcgrad(g[None]), g)


def test_pcgrad_equals_torchjd():
    torchjd = pytest.importorskip("torchjd.aggregation", reason="torchjd, the peer that has PCGrad too, is not installed")
    first, second = normal(2, 6, seed=5)
    gradients = torch.stack([first, second - 2 * first])  # two tasks: no order to agree on
    assert gradients[0] @ gradients[1] < 0
    torch.testing.assert_close(2 * tc2.pcgrad(gradients), torchjd.PCGrad()(gradients))


def test_transfer_is_the_inner_product_of_gradients_to_first_order():
    K, P = 3, 4
    A, B, theta = normal(K, P, P), normal(K, P, P, seed=1), normal(P, seed=2)

    def support(theta):
        return (A @ theta).sin().sum(1)  # [K]

    def query(theta):
        return (B @ theta).cos().sum(1)

    g_support, g_query = torch.func.jacrev(support)(theta), torch.func.jacrev(query)(theta)

    def error(step: float) -> float:
        after = torch.stack([query(theta - step * g) for g in g_support])  # [i, j]
        return (tc2.transfer_matrix(query(theta), after) - step * g_support @ g_query.mT).norm().item()

    assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.05)
    with pytest.raises(ValueError, match=r"`losses_after` \[K, K\].*\(2,\) and \(2, 3\)"):
        tc2.transfer_matrix(torch.ones(2), torch.ones(2, 3))


# -- monitors ----------------------------------------------------------------------------------------------------------


def test_sparsity_monitors():
    hoyer = conflict.hoyer_sparsity
    assert hoyer(torch.tensor([[0.0, 3.0, 0.0]])).item() == pytest.approx(1)
    assert hoyer(torch.tensor([[1.0, -1.0, 1.0]])).item() == pytest.approx(0)
    assert hoyer(torch.zeros(2, 4)) == 1
    assert hoyer(torch.ones(2, 1)) == 1
    w = normal(7, 5).numpy()
    ratio = np.abs(w).sum(1) / np.sqrt((w**2).sum(1))
    assert hoyer(torch.from_numpy(w)).item() == pytest.approx(((5**0.5 - ratio) / (5**0.5 - 1)).mean())
    assert hoyer(torch.tensor([[torch.nan, 1.0]])).isnan()

    near_zero = conflict.near_zero_share
    assert near_zero(torch.tensor([[100.0, -0.9], [1.1, 0.0]])) == 0.5
    assert near_zero(torch.zeros(2, 3)) == 1
    assert near_zero(torch.tensor([[torch.nan, 1.0]])).isnan()


def test_monitors_are_relative_errors():
    Z, V, w = normal(6, D).requires_grad_(), normal(D, 3, seed=1), normal(6, 3, seed=2)
    values = tc2.monitors(Z, V, w)
    assert not any(value.requires_grad or value.ndim for value in values.values())
    z, v, x = Z.detach().numpy(), V.numpy(), w.numpy()
    assert values["orthogonality_error"].item() == pytest.approx(np.linalg.norm(v.T @ v - np.eye(3)))
    assert values["reconstruction_error"].item() == pytest.approx(np.linalg.norm(z - z @ v @ v.T) / np.linalg.norm(z))
    assert values["calibration_error"].item() == pytest.approx(np.linalg.norm(z - x @ v.T) / np.linalg.norm(z))
    assert tc2.monitors(Z, orthonormal(D, D), Z @ orthonormal(D, D))["calibration_error"] < 1e-14
    nothing = tc2.monitors(torch.zeros(4, D), torch.eye(D), torch.zeros(4, D))  # a collapsed encoder's: no NaN stops its run
    assert nothing["reconstruction_error"] == nothing["calibration_error"] == 0
    assert tc2.monitors(Z * torch.nan, V, w)["calibration_error"].isnan()
