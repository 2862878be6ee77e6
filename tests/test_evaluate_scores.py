"""Few-shot episodes, label-based scores, CKA, curves and maps against scikit-learn, scipy, dense matrices and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from metacal.data import load
from metacal.evaluate import (
    cka,
    class_probabilities,
    few_shot,
    flat_map,
    h_score,
    held_out_probabilities,
    label_curve,
    leep,
    linear_probe,
    logme,
    nce,
    transrate,
)


def blobs(n: int, d: int = 6, classes: int = 4, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = torch.arange(n) % classes
    return centres[y] + spread * torch.randn(n, d, generator=g, dtype=torch.float64), y


# --------------------------------------------------------------------------------------------------------------- LogME


def dense_evidence(F: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log N(y; 0, I / beta + F F^T / alpha): the definition, with no algebra done to it."""
    return float(stats.multivariate_normal(np.zeros(len(y)), np.eye(len(y)) / beta + F @ F.T / alpha).logpdf(y))


@pytest.mark.parametrize(("n", "d", "scale"), [(40, 6, 1.0), (40, 6, 1e-3), (25, 40, 1.0)])
def test_logme_is_the_maximum_of_the_dense_evidence(n: int, d: int, scale: float) -> None:
    F, y = blobs(n, d, classes=3)
    F = F * scale
    wanted = []
    for c in range(3):
        target = (y == c).double().numpy()

        def negative(log: np.ndarray, target: np.ndarray = target) -> float:
            return -dense_evidence(F.numpy(), target, math.exp(log[0]) * scale**2, math.exp(log[1]))

        found = [
            optimize.minimize(negative, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-11})
            for start in ((0.0, 0.0), (3.0, 2.0))
        ]
        best = min(found, key=lambda one: one.fun)
        wanted.append(-best.fun / n)
    assert logme(F, y) == pytest.approx(np.mean(wanted), abs=1e-8)


def test_logme_is_a_fixed_point_of_mackays_update() -> None:
    """The papers' algorithm, from alpha = beta = 1, on a problem where it converges."""
    F, y = blobs(80, 6, spread=0.8)
    wanted = 0.0
    for c in range(4):
        target = (y == c).double()
        alpha = beta = 1.0
        for _ in range(500):
            A = alpha * torch.eye(6, dtype=torch.float64) + beta * F.T @ F
            m = beta * torch.linalg.solve(A, F.T @ target)
            gamma = (beta * torch.linalg.eigvalsh(F.T @ F) / (alpha + beta * torch.linalg.eigvalsh(F.T @ F))).sum()
            alpha, beta = float(gamma / (m @ m)), float((80 - gamma) / (F @ m - target).square().sum())
        wanted += dense_evidence(F.numpy(), target.numpy(), alpha, beta) / 80 / 4
    assert logme(F, y) == pytest.approx(wanted, abs=1e-10)


def test_logme_where_features_say_nothing_and_where_they_say_all() -> None:
    y = torch.arange(40) % 2
    wanted = stats.norm(0, math.sqrt(0.5)).logpdf(y.numpy()).mean()  # beta = N / |y|^2, alpha = inf
    F = torch.ones(40, 1, dtype=torch.float64) * (1 - 2 * (torch.arange(40) // 2 % 2))[:, None]  # orthogonal to both indicators
    assert logme(F, y) == pytest.approx(wanted, abs=1e-10)
    assert logme(torch.eye(2, dtype=torch.float64)[y], y) == math.inf


# ------------------------------------------------------------------------------------------------------------- H-score


def test_h_score_is_the_sum_of_squared_canonical_correlations() -> None:
    F, y = blobs(100, 6)
    centred = [M - M.mean(0) for M in (F, torch.eye(4, dtype=torch.float64)[y])]
    bases = [torch.linalg.qr(centred[0]).Q, torch.linalg.qr(centred[1][:, :3]).Q]  # indicators sum to 1: three of four span
    wanted = torch.linalg.svdvals(bases[0].T @ bases[1]).square().sum().item()
    assert h_score(F, y) == pytest.approx(wanted, rel=1e-10)
    A = torch.randn(6, 6, dtype=torch.float64)
    assert h_score(F @ A + 5, y * 7 + 2) == pytest.approx(wanted, rel=1e-8)  # linear maps and names of classes do not matter
    repeated = torch.cat([F, F[:, :2]], 1)
    assert h_score(repeated, y) == pytest.approx(wanted, rel=1e-8)  # nor do directions without variation


def test_h_score_with_shrinkage() -> None:
    from sklearn.covariance import LedoitWolf

    F, y = blobs(20, 30)
    fitted = LedoitWolf().fit(F.numpy())
    means = torch.stack([F[y == c].mean(0) for c in y])
    wanted = np.trace(np.linalg.inv(fitted.covariance_) @ np.cov(means.numpy().T, bias=True)) * (1 - fitted.shrinkage_)
    assert h_score(F, y, shrinkage=True) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(ValueError, match=r"more rows than their 30 dimensions, got 20.*shrinkage=True"):
        h_score(F, y)


# --------------------------------------------------------------------------------------------------------- LEEP, NCE


def test_leep_is_the_double_loop() -> None:
    p = torch.rand(30, 5, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    y = torch.randint(0, 3, (30,))
    total = 0.0
    for i in range(30):
        likelihood = 0.0
        for z in range(5):
            joint = sum(float(p[j, z]) for j in range(30) if y[j] == y[i]) / 30
            likelihood += joint / (float(p[:, z].sum()) / 30) * float(p[i, z])
        total += math.log(likelihood)
    assert leep(p, y) == pytest.approx(total / 30, rel=1e-12)


def test_leep_lies_between_no_information_and_all() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    entropy = stats.entropy([3, 2, 1])
    assert leep(torch.full((6, 4), 0.25, dtype=torch.float64), y) == pytest.approx(-entropy)
    assert leep(torch.eye(3, dtype=torch.float64)[(y + 1) % 3], y) == pytest.approx(0)
    for bad in (torch.zeros(6, 2), torch.tensor([[1.5, -0.5]]).expand(6, 2)):
        with pytest.raises(ValueError, match=r"`probabilities` should be at least 0 and sum to 1 .*softmax"):
            leep(bad, y)


def test_nce_is_mutual_information_less_entropy_and_leeps_hard_case() -> None:
    from sklearn.metrics import mutual_info_score

    z, y = torch.randint(0, 5, (200,)), torch.randint(0, 3, (200,))
    wanted = mutual_info_score(z, y) - stats.entropy(y.bincount())
    assert nce(z, y) == pytest.approx(wanted, rel=1e-10)
    assert nce(3 * z + 1, y.numpy()) == pytest.approx(wanted, rel=1e-10)
    assert leep(torch.eye(5, dtype=torch.float64)[z], y) == pytest.approx(wanted, rel=1e-10)
    with pytest.raises(ValueError, match="`source_labels` should be 200 integers, one per row of `labels`"):
        nce(z[:-1], y)


def test_class_probabilities_are_the_probes() -> None:
    (x, y), (t, ty) = blobs(200), blobs(100, seed=1)
    p = class_probabilities(x, y + 3, t)
    assert p.shape == (100, 4)
    assert torch.allclose(p.sum(1), p.new_ones(()))
    accuracy = (p.argmax(1) == ty).double().mean().item()
    assert accuracy == linear_probe(x, y, t, ty, strengths=(1e-2,)).accuracy  # which refits on all rows too
    with pytest.raises(ValueError, match=r"`other` should have features of width 6 .* got 5"):
        class_probabilities(x, y, t[:, :5])


def test_a_set_by_itself_is_named_by_probes_that_have_not_seen_the_row() -> None:
    """Five fits by hand; and on labels that say nothing, which a probe fitted on all rows repeats, nothing is found."""
    x, y = blobs(103)
    p = held_out_probabilities(x, y)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for fitted, held in folds.split(x, y):
        scaler = StandardScaler().fit(x[fitted].numpy())
        C = 1 / (1e-2 * (len(x) - len(x) // 5))
        probe = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(x[fitted].numpy()), y[fitted].numpy())
        np.testing.assert_allclose(p[held].numpy(), probe.predict_proba(scaler.transform(x[held].numpy())), rtol=1e-9)

    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(200, 100, generator=generator), torch.randint(4, (200,), generator=generator)
    seen, held_out = class_probabilities(noise, labels, noise), held_out_probabilities(noise, labels)
    assert nce(seen.argmax(1), labels) > -0.2
    assert nce(held_out.argmax(1), labels) < -1.3  # log 4 = 1.39
    with pytest.raises(ValueError, match="at least two rows of every class"):
        held_out_probabilities(x[:5], torch.tensor([0, 0, 1, 1, 2]))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        class_probabilities(torch.ones(40, 3), y[:40], x[:2, :3])


# ----------------------------------------------------------------------------------------------------------- TransRate


@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_transrate_is_its_log_determinants(eps: float) -> None:
    F, y = blobs(70, 6, classes=3)
    Z = (F - F.mean(0)).numpy()

    def rate(rows: np.ndarray) -> float:
        return 0.5 * float(np.linalg.slogdet(np.eye(6) + rows.T @ rows / (len(rows) * eps))[1])

    wanted = rate(Z) - sum(rate(Z[y.numpy() == c]) for c in range(3)) / 3
    assert transrate(F + 4, 5 * y, eps=eps) == pytest.approx(wanted, rel=1e-10)
    with pytest.raises(ValueError, match="`eps` should be positive, got 0"):
        transrate(F, y, eps=0)


@pytest.mark.parametrize("score", [logme, h_score, transrate])
def test_scores_order_encoders_as_their_class_separation(score: Callable[..., float]) -> None:
    values = [score(*blobs(200, spread=spread)) for spread in (0.3, 1.0, 3.0)]
    assert values == sorted(values, reverse=True)
    assert values[2] > score(blobs(200)[0], torch.randperm(200) % 4)


# ----------------------------------------------------------------------------------------------------------------- CKA


def test_cka_is_the_alignment_of_centred_kernels() -> None:
    A, B = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    B[:, :3] += A[:, :3]
    H = torch.eye(40, dtype=torch.float64) - 1 / 40
    K, L = H @ A @ A.T @ H, H @ B @ B.T @ H
    wanted = ((K * L).sum() / (K.norm() * L.norm())).item()
    assert cka(A, B) == pytest.approx(wanted, rel=1e-12)
    assert cka(B, A) == pytest.approx(wanted, rel=1e-12)
    Q = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    assert cka(A + 3, 0.1 * B @ Q) == pytest.approx(wanted, rel=1e-12)
    assert cka(A, A) == pytest.approx(1, rel=1e-12)
    x = torch.randn(20_000, 4)
    assert cka(x, torch.randn(20_000, 4)) < 1e-3
    with pytest.raises(ValueError, match=r"the same images; got 40 and 39 rows"):
        cka(A, B[1:])
    with pytest.warns(RuntimeWarning, match="`b` has collapsed.*rank_me"):
        assert math.isnan(cka(A, torch.ones(40, 2)))


# ------------------------------------------------------------------------------------------------------------ few-shot


def test_few_shot_is_scikit_learns_nearest_centroid() -> None:
    from sklearn.neighbors import NearestCentroid

    x, y = blobs(150, classes=7)
    found = few_shot(x, y, ways=4, shots=3, queries=5, episodes=40, seed=3)
    rng = np.random.default_rng(3)
    members = [np.flatnonzero(y.numpy() == c) for c in range(7)]
    accuracies = []
    for _ in range(40):
        drawn = [rng.choice(members[c], 8, replace=False) for c in rng.choice(7, 4, replace=False)]
        support, query = (np.concatenate([rows[part] for rows in drawn]) for part in (slice(3), slice(3, None)))
        accuracies.append(NearestCentroid().fit(x[support], y[support]).score(x[query], y[query]))
    assert found.mean == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 39) * stats.sem(accuracies), rel=1e-10)


def test_few_shot_of_two_gaussians_has_the_textbook_accuracy() -> None:
    """With many shots the prototypes are the class means, and the accuracy is Phi(distance / 2)."""
    x = torch.randn(4000, 1, dtype=torch.float64)
    y = torch.arange(4000) % 2
    found = few_shot(x + 2.0 * y[:, None], y, ways=2, shots=500, queries=15, episodes=600)
    assert abs(found.mean - stats.norm.cdf(1.0)) < 3 * found.half_width
    one = few_shot(x + 2.0 * y[:, None], y, ways=2, shots=1, queries=15, episodes=600)
    assert one.mean < found.mean - one.half_width
    # one shot: the nearer of two draws, P(|q - a| < |q - b|) for q, a ~ N(0, 1), b ~ N(2, 1); by quadrature
    g = np.linspace(-6, 6, 401)
    closer = sum(stats.norm.pdf(q) * _nearer(q, g) for q in g) * (g[1] - g[0])
    assert abs(one.mean - closer) < 3 * one.half_width


def _nearer(q: float, g: np.ndarray) -> float:
    radius = np.abs(g - q)
    outside = 1 - (stats.norm.cdf(q + radius - 2) - stats.norm.cdf(q - radius - 2))
    return float((stats.norm.pdf(g) * outside).sum() * (g[1] - g[0]))


def test_few_shot_on_real_digits_and_too_few_of_them() -> None:
    digits = load("digits", "test")
    one, five = (few_shot(digits.images.flatten(1), digits.labels, shots=shots) for shots in (1, 5))
    assert 0.6 < one.mean < five.mean < 0.99
    assert 0 < five.half_width < one.half_width < 0.02
    x, y = blobs(60)
    with pytest.raises(ValueError, match=r"at least 5 classes of 16 rows .*0 of its 4 classes are so large, the largest has 15"):
        few_shot(x, y)
    with pytest.raises(ValueError, match="`ways` and `episodes` should be at least 2"):
        few_shot(x, y, ways=1)


def test_episodes_of_half_precision_and_of_any_scale() -> None:
    x, y = blobs(150, classes=7)
    wanted = few_shot(x, y, ways=4, shots=3, queries=5, episodes=40)
    for half in (torch.bfloat16, torch.float16):
        assert few_shot(x.to(half), y, ways=4, shots=3, queries=5, episodes=40).mean == pytest.approx(wanted.mean, abs=0.03)
    x = x.float()
    for power in (2.0**-120, 2.0**-70, 2.0**70, 2.0**120):
        assert few_shot(power * x, y, episodes=40) == few_shot(x, y, episodes=40)


# ----------------------------------------------------------------------------------------------------- curves and maps


def test_a_large_constant_hides_no_other_dimension() -> None:
    """It was taken for a collapse: CKA was NaN, and the map one point."""
    x, other = blobs(60)[0].float(), torch.randn(60, 3)
    beside = torch.cat([x, torch.full((60, 1), 1e6)], 1)
    assert cka(beside, other) == pytest.approx(cka(x, other), rel=1e-9)
    assert cka(other, x.double() + 1e6) == pytest.approx(cka(other, x), rel=1e-6)
    assert torch.allclose(flat_map(beside), flat_map(x), atol=1e-6)
    assert cka(1e-30 * x, 1e30 * other) == pytest.approx(cka(x, other), rel=1e-5)
    same = torch.tensor([1.0, 1e-3, 1e6]) * (1 + 2.0**-23 * (torch.arange(60)[:, None] % 2))  # in float32, though float64 computes
    with pytest.warns(RuntimeWarning, match="`b` has collapsed"):
        assert math.isnan(cka(other, same))
    with pytest.warns(RuntimeWarning, match="`features` has collapsed"):
        assert not flat_map(same).any()


def test_label_curve_probes_nested_subsets() -> None:
    (x, y), (t, ty) = blobs(240), blobs(400, seed=1)
    curve = label_curve(x, y, t, ty, per_class=(50, 2, 10, 100), strengths=(1e-2,))
    assert curve.labels == [8, 40, 200]  # 100 per class are not there
    assert curve.accuracy[0] < curve.accuracy[2]
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:10] for c in range(4)]))
    assert curve.accuracy[1] == linear_probe(x[rows], y[rows], t, ty, strengths=(1e-2,)).accuracy
    with pytest.raises(ValueError, match=r"from 2 to the 60 rows of the smallest class, got \(1,\)"):
        label_curve(x, y, t, ty, per_class=(1,))


def test_the_pca_map_is_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    x, _ = blobs(50)
    assert torch.allclose(flat_map(x).abs(), torch.from_numpy(PCA(2).fit_transform(x.numpy())).abs(), rtol=1e-9, atol=1e-9)
    assert torch.equal(flat_map(x), flat_map(x))


def test_the_tsne_map_keeps_neighbours() -> None:
    x, y = blobs(60, spread=0.1)
    points = flat_map(x, "tsne")
    assert torch.equal(points, flat_map(x, "tsne"))
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(1)
    assert (y[nearest] == y).double().mean() > 0.95
    with pytest.raises(ValueError, match="`method` should be 'pca' or 'tsne'"):
        flat_map(x, "umap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 4 rows and 2 dimensions"):
        flat_map(x[:3])


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("score", [logme, h_score, transrate])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y - 1), "`labels` should not be negative, got -1. Drop the unlabelled rows: keep = labels >= 0"),
        (lambda x, y: (x, 0 * y), "`labels` should hold at least 2 classes, got only class 0"),
        (lambda x, y: (x, y[:-1]), r"`labels` should be 80 integers, one per row of `features`; got \(79,\)"),
        (lambda x, y: (x * math.nan, y), "`features` should be finite; 80 of 80"),
        (lambda x, y: (x[:, :, None], y), r"`features` should be features \[N, d\]"),
    ],
)
def test_bad_features_and_labels(score: Callable[..., float], change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(*change(*blobs(80)))


@pytest.mark.parametrize("score", [logme, h_score, transrate])
def test_a_collapsed_encoder_is_named(score: Callable[..., float]) -> None:
    x, y = blobs(80)
    with pytest.warns(RuntimeWarning, match=r"`features` has collapsed.*says nothing about.*dimension_std and rank_me") as caught:
        value = score(5 + 0 * x, y)
    assert caught[0].filename == __file__
    assert math.isfinite(value)


def test_unlabelled_and_collapsed_features_in_episodes() -> None:
    x, y = blobs(200, classes=5)
    with pytest.raises(ValueError, match="`labels` should not be negative"):
        few_shot(x, y - 1)
    with pytest.warns(RuntimeWarning, match="`features` has collapsed.*guessing one class"):
        assert few_shot(0 * x + 1, y, episodes=20).mean == pytest.approx(0.2)
