"""The objectives against formulas written out in loops, against lightly, and under every transform that they must bear."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vjp, vmap

import metacal
from metacal import linear, objectives, optim, tc2, tree
from metacal.adjoints import FirstOrder, Implicit, Unrolled
from metacal.evaluate import is_collapsed, uniformity
from metacal.nets import MaskedAutoencoder, ViT, random_order
from metacal.objectives import (
    BYOL,
    DCL,
    DINO,
    MAE,
    WMSE,
    AlignUniform,
    BarlowTwins,
    Lightly,
    MoCo,
    Outputs,
    SIGReg,
    SimCLR,
    SimSiam,
    SSLObjective,
    SwAV,
    VICReg,
    VICRegL,
)
from problems import close, derivative, leaf_grads

OBJECTIVES = [
    SimCLR(0.3),
    VICReg(3.0, 2.0, 1.5),
    BarlowTwins(0.3, 1.0),
    SimSiam(),
    BYOL(),
    MoCo(0.3, queue_size=7),
    SwAV(0.4, 0.3, 3),
    DINO(0.6, 0.4),
    WMSE(0.1),
    DCL(0.3),
    DCL(0.3, sigma=0.7),
    AlignUniform(1.5, 0.7, 1.3),
    SIGReg(0.3, num_directions=6, knots=9, t_max=2.5),
    VICRegL(3.0, 2.0, 1.5),
]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
any_views = pytest.mark.parametrize("m", [2, 3, 4])


def random_outputs(n: int = 5, m: int = 3, d: int = 4, *, seed: int = 0, lead: tuple[int, ...] = ()) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    # 0.6: some standard deviations above 1 and some below, so that both sides of VICReg's hinge are used.
    scale = torch.linspace(0.6, 1.8, d, dtype=torch.float64)
    return Outputs(*(scale * torch.randn(*lead, n, m, d, generator=generator, dtype=torch.float64) for _ in range(3)))


def field_of(objective: SSLObjective) -> str:
    """The field that is differentiated."""
    return "z" if objective.heads == ("projector",) else "p"


def live(objective: SSLObjective, fixed: Outputs):
    """The loss as a function of the one field that is differentiated, and that field's value."""
    name = field_of(objective)
    carry = carry_of(objective, fixed.z.shape[-1])
    return (lambda value: objective(fixed._replace(**{name: value}), carry)), getattr(fixed, name)


def carry_of(objective: SSLObjective, d: int = 4):
    """A state that is nowhere special, of the structure and shapes of the first one."""
    rng = np.random.default_rng(7)  # torch's generators refuse to draw under vmap

    def drawn(leaf: torch.Tensor) -> torch.Tensor:
        rows = rng.standard_normal(leaf.shape)
        return torch.tensor(rows / np.linalg.norm(rows, axis=-1, keepdims=True))

    return tree.map(drawn, objective.init_carry(d))


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


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits)
    return e / e.sum()


def cross_entropy(truth: np.ndarray, logits: np.ndarray) -> float:
    return -float(truth @ np.log(softmax(logits)))


def moco_one_way(q: np.ndarray, k: np.ndarray, queue: np.ndarray, temperature: float) -> float:
    total = 0.0
    for i in range(len(q)):
        s = [cosine(q[i], k[i]) / temperature, *(cosine(q[i], old) / temperature for old in queue)]
        total -= s[0] - math.log(sum(map(math.exp, s)))
    return total / len(q)


def balanced(scores: np.ndarray, epsilon: float, num_steps: int) -> np.ndarray:
    """SwAV's listing: prototypes are the rows."""
    Q = np.exp(scores.T / epsilon)
    Q /= Q.sum()
    for _ in range(num_steps):
        Q /= Q.sum(1, keepdims=True) * Q.shape[0]
        Q /= Q.sum(0, keepdims=True) * Q.shape[1]
    return (Q * Q.shape[1]).T


def whitened(x: np.ndarray, eps: float) -> np.ndarray:
    sigma = (1 - eps) * np.cov(x.T) + eps * np.eye(x.shape[1])
    return (np.linalg.inv(np.linalg.cholesky(sigma)) @ (x - x.mean(0)).T).T


def two_view_dcl(x: np.ndarray, y: np.ndarray, temperature: float, sigma: float | None) -> float:
    n, total = len(x), 0.0
    for own, other in ((x, y), (y, x)):
        w = 2 - n * softmax(np.array([cosine(own[i], other[i]) for i in range(n)]) / sigma) if sigma else np.ones(n)
        for i in range(n):
            negatives = [cosine(own[i], rows[j]) / temperature for rows in (own, other) for j in range(n) if j != i]
            total += math.log(sum(map(math.exp, negatives))) - w[i] * cosine(own[i], other[i]) / temperature
    return total / (2 * n)


def two_view_align_uniform(x: np.ndarray, y: np.ndarray, align: float, uniform: float, t: float) -> float:
    n = len(x)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    total = align * sum(((x[i] - y[i]) ** 2).sum() for i in range(n)) / n
    for z in (x, y):
        pairs = [math.exp(-t * ((z[i] - z[j]) ** 2).sum()) for i, j in itertools.combinations(range(n), 2)]
        total += uniform / 2 * math.log(sum(pairs) / len(pairs))
    return total


def lejepa(z: np.ndarray, directions: np.ndarray, lambd: float, knots: int, t_max: float) -> float:
    """The integral over both signs of t, with complex exponentials."""
    n, m, d = z.shape
    ts = np.linspace(-t_max, t_max, 2 * knots - 1)
    disagreement = sum(((z[i, a] - z[i].mean(0)) ** 2).sum() for i in range(n) for a in range(m)) / (n * m * d)
    statistics = []
    for a in range(m):
        for direction in directions:
            s = z[:, a] @ direction
            distance = [abs(np.mean(np.exp(1j * t * s)) - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2) for t in ts]
            statistics.append(n * (sum(distance) - (distance[0] + distance[-1]) / 2) * (ts[1] - ts[0]))
    return (1 - lambd) * disagreement + lambd * np.mean(statistics)


def global_vicregl(z: np.ndarray, num_global: int, inv: float, var: float, cov: float) -> float:
    _, m, d = z.shape
    total = inv * np.mean([((z[:, a] - z[:, b]) ** 2).mean() for a in range(num_global) for b in range(m) if a != b])
    for a in range(m):
        covariance = np.cov(z[:, a].T)
        total += var / m * np.mean([max(0.0, 1 - math.sqrt(covariance[c, c] + 1e-4)) for c in range(d)])
        total += cov / m * sum(covariance[c, e] ** 2 for c in range(d) for e in range(d) if c != e) / d
    return total


def reference(objective: SSLObjective, outputs: Outputs) -> float:
    z, p, target = (field.numpy() for field in outputs)
    n, m, d = z.shape
    carry = carry_of(objective, d)
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
        case MoCo(temperature):
            return np.mean([moco_one_way(z[:, a], target[:, b], carry["queue"].numpy(), temperature) for a, b in ordered])
        case SwAV(temperature, epsilon, num_steps):
            codes = [balanced(p[:, b], epsilon, num_steps) for b in range(m)]
            return np.mean([cross_entropy(codes[b][i], p[i, a] / temperature) for a, b in ordered for i in range(n)])
        case DINO(temperature, teacher):
            shares = [[softmax((target[i, b] - carry["centre"].numpy()) / teacher) for b in range(m)] for i in range(n)]
            return np.mean([cross_entropy(shares[i][b], z[i, a] / temperature) for a, b in ordered for i in range(n)])
        case WMSE(eps):
            white = [whitened(z[:, a], eps) for a in range(m)]
            return np.mean([2 - 2 * cosine(white[a][i], white[b][i]) for a, b in unordered for i in range(n)])
        case DCL(temperature, sigma):
            return np.mean([two_view_dcl(z[:, a], z[:, b], temperature, sigma) for a, b in unordered])
        case AlignUniform(align, uniform, t):
            return np.mean([two_view_align_uniform(z[:, a], z[:, b], align, uniform, t) for a, b in unordered])
        case SIGReg(lambd, _, knots, t_max):
            return lejepa(z, carry["directions"].numpy(), lambd, knots, t_max)
        case VICRegL(inv, var, cov, num_global):
            return global_vicregl(z, num_global or m, inv, var, cov)
    raise AssertionError(objective)


CONTRASTIVE_DEFAULTS = [SimCLR(), MoCo(queue_size=5), SwAV(), DINO(), DCL()]
DEFAULTS = [*CONTRASTIVE_DEFAULTS, VICReg(), BarlowTwins(), WMSE(), AlignUniform(), SIGReg(num_directions=16), VICRegL()]


@pytest.mark.parametrize("objective", [*OBJECTIVES, *DEFAULTS, VICRegL(num_global=1), VICRegL(num_global=2)], ids=str)
@any_views
def test_equals_the_formula_written_out(objective, m):
    outputs = random_outputs(n=9, m=m)
    value = objective(outputs, carry_of(objective))
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


@pytest.fixture
def _unwarned():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightly copies tensors by torch.tensor
        yield


@pytest.mark.usefixtures("_unwarned")
@pytest.mark.parametrize("m", [2, 3])
def test_the_later_ones_equal_lightly(lightly_loss, m):
    n, d = 14, 6
    z, p, target = outputs = random_outputs(n=n, m=m, d=d)
    x, y = z[:, 0], z[:, 1]
    equal = {"rtol": 1e-6, "atol": 1e-7}  # its buffers are float32
    exact = {"rtol": 1e-9, "atol": 1e-12}

    queue = carry_of(MoCo(queue_size=7), d)["queue"]
    bank = lightly_loss.NTXentLoss(0.2, memory_bank_size=(7, d))
    ways = []
    for a, b in itertools.permutations(range(m), 2):
        bank.memory_bank.bank = queue.clone()
        ways.append(bank(z[:, a], target[:, b]))
    torch.testing.assert_close(MoCo(0.2, 7)(outputs, {"queue": queue}), torch.stack(ways).mean(), **exact)

    swav = lightly_loss.SwaVLoss(0.3, 4, 0.2)
    torch.testing.assert_close(SwAV(0.3, 0.2, 4)(outputs), swav(list(p.unbind(1)), []).squeeze(), **exact)

    dino, ours = lightly_loss.DINOLoss(d, teacher_temp=0.4, student_temp=0.6, center_momentum=0.7), DINO(0.6, 0.4, 0.7)
    carry = ours.init_carry(d)
    for _ in range(3):  # the centre moves along
        torch.testing.assert_close(ours(outputs, carry), dino(list(target.unbind(1)), list(z.unbind(1)), teacher_temp=0.4), **equal)
        carry = ours.update(outputs, carry)
        torch.testing.assert_close(carry["centre"], dino.center.flatten().double(), **equal)
        z, _, target = outputs = outputs._replace(target=1.5 * outputs.target + 0.3)

    if m == 2:
        for eps in (0.0, 0.1):
            whiten = lightly_loss.WMSELoss(embedding_dim=d, eps=eps, w_size=n, track_running_stats=False)
            whiten.whitening.double()
            with default_dtype(torch.float64):
                torch.testing.assert_close(WMSE(eps)(outputs), whiten(torch.cat([x, y])), **exact)
        torch.testing.assert_close(DCL(0.3)(outputs), lightly_loss.DCLLoss(0.3)(x, y), **exact)
        torch.testing.assert_close(DCL(0.3, sigma=0.6)(outputs), lightly_loss.DCLWLoss(0.3, 0.6)(x, y), **exact)

    sketch = SIGReg(0.3, num_directions=5)
    directions = carry_of(sketch, d)["directions"]
    le = lightly_loss.LeJEPALoss(lambda_param=0.3, sigreg_num_vectors=5).double()
    le.sigreg._generate_unit_vectors = lambda *_: directions.T
    views = z.transpose(0, 1)
    # It wants a local view besides: with a global one twice only the statistic can be compared.
    torch.testing.assert_close(SIGReg(1.0, 5)(outputs, {"directions": directions}), le.sigreg(views), **equal)
    centre = lightly_loss.lejepa_loss.lejepa_invariance_loss(all_proj=views, global_proj=views)
    torch.testing.assert_close(SIGReg(0.0, 5)(outputs, {"directions": directions}), centre, **exact)

    local = torch.zeros(n, 2, 2, d, dtype=torch.float64)
    parts = [(view, local) for view in z.unbind(1)]
    vicregl = lightly_loss.VICRegLLoss(3.0, 2.0, 1.5)
    torch.testing.assert_close(VICRegL(3.0, 2.0, 1.5)(outputs), vicregl._global_loss(parts).squeeze(), **exact)
    torch.testing.assert_close(
        VICRegL(3.0, 2.0, 1.5, num_global=1)(random_outputs(n=n, m=2, d=d)),
        3.0 * random_outputs(n=n, m=2, d=d).z.diff(dim=1).square().mean() + VICRegL(0.0, 2.0, 1.5)(random_outputs(n=n, m=2, d=d)),
        **exact,
    )
    if m == 3:
        split = vicregl._global_loss(parts[:2], parts[2:]).squeeze()
        torch.testing.assert_close(VICRegL(3.0, 2.0, 1.5, num_global=2)(outputs), split, **exact)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- what is known in closed form --------------------------------------------------------------------------------------


def test_the_epps_pulley_statistic_has_a_closed_form():
    """int |phi_n - phi|^2 exp(-t^2/2) dt over the line, by the Gaussian integrals of its three terms."""
    z = 1.3 * random_outputs(n=12, m=2, d=3).z - 0.2
    directions = carry_of(SIGReg(num_directions=4), 3)["directions"]
    expected = []
    for s in (z @ directions.T).reshape(12, -1).T.numpy():
        pairs = math.sqrt(2 * math.pi) * np.exp(-((s[:, None] - s) ** 2) / 2).mean()
        cross = 2 * math.sqrt(math.pi) * np.exp(-(s**2) / 4).mean()
        expected.append(12 * (pairs - cross + math.sqrt(2 * math.pi / 3)))
    value = SIGReg(1.0, 4, knots=200, t_max=12.0)(Outputs(z), {"directions": directions})
    assert value.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_normal_samples_have_the_known_mean_statistic():
    draws = [
        SIGReg(1.0, 8, knots=65, t_max=8.0)(Outputs(torch.randn(16, 2, 3, dtype=torch.float64)), carry_of(SIGReg(num_directions=8), 3))
        for _ in range(400)
    ]
    mean, error = torch.stack(draws).mean().item(), torch.stack(draws).std().item() / 20
    known = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    assert abs(mean - known) < 4 * error < 0.15 * known


def test_sinkhorn_balances_and_keeps_rows_exact():
    scores = random_outputs(n=12, m=2, d=4).z[:, 0]
    codes = objectives.sinkhorn(scores, 0.5, 300)
    torch.testing.assert_close(codes.sum(-1), torch.ones(12, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-8, atol=0)
    # Scaling of rows and columns leaves the cross ratios.
    logs = codes.log() * 0.5 - scores
    torch.testing.assert_close(logs - logs[:1] - logs[:, :1] + logs[0, 0], torch.zeros_like(logs), rtol=0, atol=1e-12)
    assert torch.equal(objectives.sinkhorn(scores.float(), 1e-4, 3).isfinite(), torch.ones(12, 4, dtype=torch.bool))


def test_whitening_hides_what_a_linear_map_does_to_every_view():
    # Cholesky factors differ by a rotation, so the same map leaves cosines, and another one for the other view does not.
    outputs = random_outputs(n=20, m=2, d=3)
    mixed = Outputs(outputs.z @ (torch.eye(3, dtype=torch.float64) + 0.3).triu() + 5.0)
    torch.testing.assert_close(WMSE(0.0)(outputs), WMSE(0.0)(Outputs(outputs.z @ torch.diag(torch.tensor([2.0, 0.5, 3.0]).double()) + 1)))
    assert WMSE(0.0)(mixed).isfinite()


def test_uniformity_is_what_the_monitor_reports():
    outputs = random_outputs(n=20, m=2)
    by_view = torch.stack([uniformity(outputs.z[:, a]) for a in range(2)]).mean()
    torch.testing.assert_close(AlignUniform(0.0, 1.0, 2.0)(outputs), by_view, rtol=1e-9, atol=0)


# --- under transforms --------------------------------------------------------------------------------------------------


@every
def test_vmap_equals_a_loop(objective):
    many = random_outputs(lead=(3,))
    one_by_one = [Outputs(*fields) for fields in zip(*many, strict=True)]

    carry = carry_of(objective)

    def loss(*fields):
        return objective(Outputs(*fields), carry)

    torch.testing.assert_close(vmap(loss)(*many), torch.stack([objective(o, carry) for o in one_by_one]), rtol=1e-12, atol=1e-14)
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
    if isinstance(objective, SwAV) or (isinstance(objective, DCL) and objective.sigma is not None):
        pytest.skip("holds constant what it computes from its own input: test_nothing_flows_into_assignments_targets_and_keys")
    fn, x = live(objective, random_outputs(n=3, m=3, d=2))
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(fn, x, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, x, check_fwd_over_rev=True)


def networks_loss(objective: SSLObjective, stop: torch.Tensor | None = None):
    """The loss as a function of a network's weights; ``stop`` replaces what SimSiam does not differentiate."""
    x, target = random_outputs(n=4, m=2, d=3, seed=2).z, random_outputs(n=4, m=2, d=3, seed=3).z

    def loss(w):
        z = (x @ w).tanh()
        return objective(Outputs(z if stop is None else stop, p=z @ w, target=target), carry_of(objective, 3))

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
        (lambda w: MoCo(w, 7), 0.4),
        (SwAV, 0.4),
        (DINO, 0.4),
        (lambda w: DINO(teacher_temperature=w), 0.4),
        (DCL, 0.4),
        (lambda w: AlignUniform(alignment=w), 0.4),
        (lambda w: AlignUniform(uniformity=w), 0.4),
        (lambda w: AlignUniform(t=w), 1.4),
        (lambda w: SIGReg(w, 6), 0.3),
        (lambda w: VICRegL(invariance=w), 3.0),
        (lambda w: VICRegL(variance=w), 3.0),
        (lambda w: VICRegL(covariance=w), 3.0),
    ],
)
def test_weights_can_be_hyperparameters(make, at):
    outputs, h = random_outputs(), 1e-6
    carry = carry_of(make(at))
    learned = grad(lambda w: make(w)(outputs, carry))(torch.tensor(at, dtype=torch.float64))
    difference = (make(at + h)(outputs, carry) - make(at - h)(outputs, carry)) / (2 * h)
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


@pytest.mark.parametrize("objective", [SimCLR(), VICReg(), BarlowTwins(), DCL(), AlignUniform(), VICRegL()], ids=str)
def test_a_gradient_step_from_near_collapse_spreads(objective):
    z = 1 + 0.01 * random_outputs(n=6, m=1, d=4).z.expand(6, 2, 4)
    step = -grad(lambda z: objective(Outputs(z)))(z)

    def spread_of(z):  # of directions for SimCLR, of values for the others
        z = z / z.norm(dim=-1, keepdim=True) if isinstance(objective, (SimCLR, DCL, AlignUniform)) else z
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


# What a constant representation costs, for n = 6 samples of d = 4 entries.
COLLAPSED = [
    (SimCLR(0.3), math.log(2 * 6 - 1)),
    (DCL(0.3), math.log(2 * 6 - 2)),
    (DCL(0.3, sigma=0.5), math.log(2 * 6 - 2)),
    (MoCo(0.3, queue_size=12), math.log(12 + 1)),
    (SwAV(), math.log(4)),
    (DINO(), math.log(4)),
    (WMSE(), 2.0),
    (AlignUniform(), 0.0),
    (VICReg(25, 25, 1), 25 * (1 - math.sqrt(1e-4))),
    (VICRegL(25, 25, 1), 25 * (1 - math.sqrt(1e-4))),
    (BarlowTwins(5e-3, 0.1), 0.1 * 4),
    (SimSiam(), -1.0),
    (BYOL(), 0.0),
]


@pytest.mark.parametrize(("objective", "value"), COLLAPSED, ids=str)
def test_collapse_has_its_known_value_and_the_monitors_see_it(objective, value):
    same = torch.full((6, 2, 4), 0.7, dtype=torch.float64)
    outputs = Outputs(same, p=same, target=same)
    carry = objective.init_carry(4)
    if isinstance(objective, MoCo):
        carry = objective.update(outputs, carry)  # all its keys the same
    assert objective(outputs, carry).item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert is_collapsed(same.flatten(0, 1))
    spread_out = random_outputs(n=6, m=2)
    assert not is_collapsed(spread_out.z.flatten(0, 1))


def test_sigreg_at_collapse():
    zero = Outputs(torch.zeros(6, 2, 4, dtype=torch.float64))
    known = 6 * (math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3))
    assert SIGReg(1.0, 5, knots=200, t_max=12.0)(zero).item() == pytest.approx(known, rel=1e-9)
    assert SIGReg(0.0, 5)(zero) == 0
    # Spreading collapsed points lowers it.
    z = 0.01 * random_outputs(n=6, m=1).z.expand(6, 2, 4)
    step = -grad(lambda z: SIGReg(1.0)(Outputs(z)))(z)
    assert jvp(lambda z: z.var(0).sum(), (z,), (step,))[1] > 0


@pytest.mark.parametrize("objective", [SimCLR(), SimSiam(), BYOL(), DCL(), AlignUniform()], ids=str)
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
@settings(max_examples=8, deadline=None)
@given(data=st.data(), n=st.integers(2, 6), m=st.integers(2, 4), d=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_samples_and_views_have_no_order(objective, data, n, m, d, seed):
    outputs = random_outputs(n, m, d, seed=seed)
    samples, views = data.draw(st.permutations(range(n))), data.draw(st.permutations(range(m)))
    moved, carry = Outputs(*(field[samples][:, views] for field in outputs)), carry_of(objective, d)
    torch.testing.assert_close(objective(moved, carry), objective(outputs, carry), rtol=1e-9, atol=1e-10)
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
        MoCo: (("projector",), True),
        SwAV: (("projector", "prototypes"), False),
        DINO: (("projector",), True),
        WMSE: (("projector",), False),
        DCL: (("projector",), False),
        AlignUniform: (("projector",), False),
        SIGReg: (("projector",), False),
        VICRegL: (("projector",), False),
    }
    assert (MAE.heads, MAE.ema_target) == (("decoder",), False)
    with pytest.raises(TypeError, match="abstract"):
        SSLObjective()


@every
def test_is_a_value_that_changes_nothing(objective):
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.temperature = 1.0
    assert objective == dataclasses.replace(objective)
    outputs, carry = random_outputs(), carry_of(objective)
    before = [field.clone() for field in (*outputs, *tree.leaves(carry))]
    assert objective(outputs, carry) == objective(outputs, carry)
    moved = objective.update(outputs, carry)
    if isinstance(objective, STATEFUL):
        assert tree.structure(moved) == tree.structure(objective.init_carry(4)) == tree.structure(carry)
    else:
        assert objective.init_carry(4) == moved == carry == ()
        assert objective(outputs) == objective(outputs, ())
    for field, old in zip((*outputs, *tree.leaves(carry)), before, strict=True):
        assert torch.equal(field, old)


@every
def test_bad_shapes_are_named(objective):
    field = field_of(objective)
    with pytest.raises(ValueError, match=rf"`outputs.{field}`.*m >= 2 views.*m = 1.*\(5, 1, 4\)"):
        objective(random_outputs(m=1))
    with pytest.raises(ValueError, match=rf"`outputs.{field}` should have shape \[n, m, d\].*\(5, 4\).*axis 1"):
        objective(Outputs(*(f[:, 0] for f in random_outputs())))
    if isinstance(objective, (SimSiam, BYOL, MoCo, DINO)):
        assert objective(random_outputs(n=1), carry_of(objective)).isfinite()
    else:
        with pytest.raises(ValueError, match=rf"`outputs.{field}` should hold n >= 2 samples.*n = 1"):
            objective(random_outputs(n=1))


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
        (MoCo, "temperature"),
        (SwAV, "temperature"),
        (SwAV, "epsilon"),
        (DINO, "temperature"),
        (DINO, "teacher_temperature"),
        (DCL, "temperature"),
        (DCL, "sigma"),
        (AlignUniform, "alignment"),
        (AlignUniform, "uniformity"),
        (AlignUniform, "t"),
        (SIGReg, "t_max"),
        (VICRegL, "invariance"),
        (VICRegL, "eps"),
        (MAE, "eps"),
    ],
)
def test_bad_weights_are_named(cls, name, bad):
    with pytest.raises(ValueError, match=f"`{name}` should be a finite number"):
        cls(**{name: bad})


@pytest.mark.parametrize(("cls", "name"), [(SimCLR, "temperature"), (VICReg, "eps"), (BarlowTwins, "eps")])
def test_divisors_are_not_zero(cls, name):
    with pytest.raises(ValueError, match=f"`{name}` should be a finite number > 0, got 0"):
        cls(**{name: 0.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoCo(queue_size=0), r"`queue_size` should be an integer of at least 1, got 0"),
        (lambda: MoCo(queue_size=2.5), r"`queue_size` should be an integer of at least 1, got 2.5"),
        (lambda: SwAV(num_steps=0), r"`num_steps` should be an integer of at least 1, got 0"),
        (lambda: SwAV(num_prototypes=-1), r"`num_prototypes` should be an integer of at least 1"),
        (lambda: SIGReg(knots=1), r"`knots` should be an integer of at least 2, got 1"),
        (lambda: SIGReg(num_directions=0), r"`num_directions` should be an integer of at least 1"),
        (lambda: SIGReg(lambd=1.5), r"`lambd` should be in \[0, 1\], got 1.5"),
        (lambda: DINO(momentum=math.nan), r"`momentum` should be in \[0, 1\], got nan"),
        (lambda: WMSE(eps=-0.1), r"`eps` should be in \[0, 1\], got -0.1"),
        (lambda: VICRegL(num_global=0), r"`num_global` should be an integer of at least 1"),
        (lambda: VICRegL(num_global=4)(random_outputs(m=3)), r"num_global = 4 global views.*m = 3"),
        (lambda: WMSE(eps=0.0)(random_outputs(n=4, d=4)), r"more samples than entries.*n = 4 and d = 4.*eps > 0"),
        (lambda: MoCo()(random_outputs()), r"`carry` should hold 'queue'.*got \(\).*init_carry\(d\).*update"),
        (lambda: DINO()(random_outputs()), r"`carry` should hold 'centre'.*got \(\)"),
        (lambda: DINO()(random_outputs(), DINO().init_carry(5)), r"`carry\['centre'\]` should end in the d = 4.*\(5,\)"),
        (lambda: MoCo()(Outputs(random_outputs().z), MoCo().init_carry(4)), r"`outputs.target` should be a tensor.*got None"),
        (lambda: MAE(visible=1.0), r"`visible` should be a share of the patches, in \(0, 1\), got 1.0"),
        (lambda: MAE()(Outputs(torch.zeros(2, 1, 3))), r"`outputs.p` should have shape \[n, m, masked patches, P\].*got None"),
        (lambda: MAE()(random_outputs()), r"`outputs.p` should have shape .*got \(5, 3, 4\).*MaskedAutoencoder"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_singular_covariance_is_reported_and_not_hidden():
    z = random_outputs(n=9, d=4).z
    assert WMSE(0.0)(Outputs(torch.cat([z[..., :3], z[..., :1]], -1))).isnan()


# --- state -------------------------------------------------------------------------------------------------------------

STATEFUL = (MoCo, DINO, SIGReg)
stateful = pytest.mark.parametrize("objective", [o for o in OBJECTIVES if isinstance(o, STATEFUL)], ids=lambda o: type(o).__name__)


def test_the_queue_is_first_in_first_out():
    moco = MoCo(queue_size=7)
    carry = moco.init_carry(4)
    assert torch.equal(carry["queue"], torch.zeros(7, 4))
    seen = []
    for seed in range(3):
        outputs = random_outputs(n=2, m=2, seed=seed)
        carry = moco.update(outputs, carry)
        keys = [t / np.linalg.norm(t) for sample in outputs.target.numpy() for t in sample]
        seen = keys + seen
        expected = np.array((seen + [np.zeros(4)] * 7)[:7])
        np.testing.assert_allclose(carry["queue"].numpy(), expected, rtol=1e-10, atol=1e-12)
    assert moco.update(random_outputs(n=5, m=3), carry)["queue"].shape == (7, 4)  # more keys than places


def test_an_empty_slot_is_an_orthogonal_negative():
    z = random_outputs(n=3, m=2).z
    outputs = Outputs(z[:, :1].expand(3, 2, 4), target=z[:, :1].expand(3, 2, 4))
    expected = math.log(1 + 7 * math.exp(-1 / 0.3))
    assert MoCo(0.3, 7)(outputs, MoCo(0.3, 7).init_carry(4)).item() == pytest.approx(expected, rel=1e-9)


def test_the_centre_is_a_moving_mean():
    dino, carry, expected = DINO(momentum=0.8), DINO().init_carry(4), np.zeros(4)
    for seed in range(4):
        outputs = random_outputs(seed=seed)
        carry = dino.update(outputs, carry)
        expected = 0.8 * expected + 0.2 * outputs.target.numpy().reshape(-1, 4).mean(0)
    np.testing.assert_allclose(carry["centre"].numpy(), expected, rtol=1e-6)  # the first centre is float32


def test_directions_are_drawn_anew_and_are_unit():
    sigreg, outputs = SIGReg(num_directions=50), random_outputs()
    first = sigreg.init_carry(4)["directions"]
    assert torch.equal(first, sigreg.init_carry(4)["directions"])
    torch.manual_seed(3)
    one = sigreg.update(outputs, sigreg.init_carry(4))["directions"]
    two = sigreg.update(outputs, {"directions": one})["directions"]
    torch.manual_seed(3)
    assert torch.equal(one, sigreg.update(outputs, {"directions": two})["directions"])
    for directions in (first, one, two):
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(50).to(directions), rtol=1e-6, atol=0)
    assert not torch.equal(one, two)
    assert sigreg(outputs) == sigreg(outputs, sigreg.init_carry(4)) != sigreg(outputs, {"directions": one})


@stateful
def test_a_carry_is_never_differentiated(objective):
    outputs, carry = random_outputs(), leaf_grads(carry_of(objective))
    fn, x = (lambda z: objective(outputs._replace(z=z), carry)), outputs.z.clone().requires_grad_()
    _, *none = torch.autograd.grad(fn(x), [x, *tree.leaves(carry)], allow_unused=True)
    assert none == [None] * len(tree.leaves(carry))
    (leaf,), structure = tree.flatten(carry_of(objective))
    assert grad(lambda leaf: objective(outputs, tree.unflatten(structure, [leaf])))(leaf).abs().max() == 0
    assert jvp(lambda leaf: objective(outputs, tree.unflatten(structure, [leaf])), (leaf,), (leaf.cos(),))[1] == 0
    moved = objective.update(tree.map(lambda f: f.clone().requires_grad_(), outputs), carry)
    assert not any(leaf.requires_grad for leaf in tree.leaves(moved))


def test_nothing_flows_into_assignments_targets_and_keys():
    outputs = random_outputs()
    for objective in (MoCo(0.3, 7), DINO()):
        carry = carry_of(objective)
        d_z, d_target = grad(lambda z, t: objective(Outputs(z, target=t), carry), argnums=(0, 1))(outputs.z, outputs.target)  # noqa: B023
        assert d_target.abs().max() == 0 < d_z.abs().max()
    # SwAV's codes are constants: its gradient is that of the cross entropy to them.
    codes = objectives.sinkhorn(outputs.p.transpose(0, 1), 0.3, 3)

    def to_codes(p):
        return -sum((codes[b] * (p[:, a] / 0.4).log_softmax(-1)).sum() for a, b in itertools.permutations(range(3), 2)) / (6 * 5)

    swav = SwAV(0.4, 0.3, 3)
    torch.testing.assert_close(grad(lambda p: swav(Outputs(outputs.z, p)))(outputs.p), grad(to_codes)(outputs.p), rtol=1e-10, atol=1e-13)
    hessians = [hessian(f)(outputs.p) for f in (lambda p: swav(Outputs(outputs.z, p)), to_codes)]
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-12)
    # The weights of hard positives too: they add (1 - w) s, where s alone is differentiated.
    n, weighted, plain = 5, DCL(0.3, sigma=0.7), DCL(0.3)

    def cosines(z):
        u = torch.nn.functional.normalize(z, dim=-1)
        return torch.stack([(u[:, a] * u[:, b]).sum(-1) for a, b in itertools.permutations(range(3), 2)])  # [pairs, n]

    excess = n * (cosines(outputs.z) / 0.7).softmax(1) - 1  # 1 - w

    def by_constants(z):
        return plain(Outputs(z)) + (excess * cosines(z) / 0.3).mean()

    for derivatives, close_by in ((grad, 1e-10), (hessian, 1e-9)):
        expected = derivatives(by_constants)(outputs.z)
        torch.testing.assert_close(derivatives(lambda z: weighted(Outputs(z)))(outputs.z), expected, rtol=close_by, atol=1e-11)


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


# --- through training --------------------------------------------------------------------------------------------------
# Weights of the input's features are the hyperparameters; a small network learns on one batch and is judged on another.

SUPPORT, QUERY = (random_outputs(n=7, m=2, d=4, seed=seed).z for seed in (20, 21))
LR, MOMENTUM, STEPS, DAMPING = 0.1, 0.5, 3, 40.0


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HPARAMS = 0.3 * drawn(4, seed=22)


def params_of(objective: SSLObjective):
    W = {"W": 0.7 * drawn(4, 3, seed=23)}
    return W if objective.heads == ("projector",) else {**W, "H": 0.7 * drawn(3, 3, seed=24)}


def forward(objective: SSLObjective, params, x: torch.Tensor) -> Outputs:
    """The network's outputs, the target's by fixed weights of its own."""
    z = (x @ params["W"]).tanh()
    p = None
    if "predictor" in objective.heads:
        p = z @ params["H"]
    elif "prototypes" in objective.heads:
        p = torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(params["H"], dim=0)
    target = (x @ (params_of(objective)["W"] + 0.2 * drawn(4, 3, seed=25))).tanh().detach() if objective.ema_target else None
    return Outputs(z, p, target)


def losses(objective: SSLObjective):
    carry = carry_of(objective, 3)

    def inner(params, hparams, x):
        return objective(forward(objective, params, x * hparams.exp()), carry)

    def outer(params, hparams, x):
        return objective(forward(objective, params, x * hparams.exp()), carry) + 0.1 * hparams.square().sum()

    return inner, outer


def by_hand(inner, params, hparams, steps: int = STEPS):
    """Momentum SGD in plain autograd."""
    velocity = tree.zeros_like(params)
    for _ in range(steps):
        g = derivative(inner(params, hparams, SUPPORT), params, create_graph=True)
        velocity = {name: MOMENTUM * velocity[name] + g[name] for name in g}
        params = {name: params[name] - LR * velocity[name] for name in g}
    return params


SGD = optim.sgd(LR, momentum=MOMENTUM)
PARTS = [*OBJECTIVES, Lightly(torch.nn.MSELoss())]
every_one = pytest.mark.parametrize("objective", PARTS, ids=lambda objective: type(objective).__name__)


@every_one
def test_unrolled_hypergradients_are_those_of_plain_autograd(objective):
    inner, outer = losses(objective)
    start, hparams = leaf_grads(params_of(objective)), leaf_grads(HPARAMS)
    value = outer(by_hand(inner, start, hparams), hparams, QUERY)
    d_hparams, d_start = derivative(value, (hparams, start))
    solver = metacal.descent(inner, SGD)
    for mode in ("mixed", "reverse", "graph"):
        estimate = metacal.hypergradient(outer, solver, Unrolled(mode=mode))
        hg = estimate(solver.init(params_of(objective), HPARAMS), HPARAMS, metacal.repeat(SUPPORT, STEPS), QUERY)
        close(hg.value, value)
        close(hg.hparams, d_hparams)
        close(hg.params, d_start)
        assert hg.stats["first_bad_step"] == -1


@every_one
def test_implicit_and_first_order_hypergradients_are_their_formulas(objective):
    inner, outer = losses(objective)
    solver = metacal.descent(inner, SGD)
    state = solver.init(params_of(objective), HPARAMS)
    final = leaf_grads(tree.detach(by_hand(inner, leaf_grads(params_of(objective)), HPARAMS)))
    hparams = leaf_grads(HPARAMS)
    value = outer(final, hparams, QUERY)
    direct, ct = derivative(value, (hparams, final))
    gradient = derivative(inner(final, hparams, SUPPORT), final, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient.values()])
    rows = [derivative(g, {"w": final, "h": hparams}, create_graph=True) for g in flat]
    H = torch.stack([torch.cat([leaf.flatten() for leaf in row["w"].values()]) for row in rows]).detach()
    H = H + DAMPING * torch.eye(len(H), dtype=H.dtype)  # a self-supervised loss is not convex
    J = torch.stack([row["h"] for row in rows]).detach()
    b = torch.cat([leaf.flatten() for leaf in ct.values()])
    assert torch.linalg.eigvalsh(H).min() > 1

    def series(num_steps: int, step_size: float) -> torch.Tensor:
        term, total = b, b
        for _ in range(num_steps):
            term = term - step_size * H @ term
            total = total + term
        return step_size * total

    cases = {
        "CG": (Implicit(linear.CG(len(b)), damping=DAMPING), torch.linalg.solve(H, b), 1e-8),
        "Neumann": (Implicit(linear.Neumann(num_steps=6, step_size=0.01), damping=DAMPING), series(6, 0.01), 1e-10),
        "T1-T2": (Implicit(linear.Identity()), b, 1e-10),
        "first order": (FirstOrder(), None, 1e-10),
    }
    for name, (adjoint, v, tolerance) in cases.items():
        hg = metacal.hypergradient(outer, solver, adjoint)(state, HPARAMS, metacal.repeat(SUPPORT, STEPS), QUERY)
        close(hg.hparams, direct if v is None else direct - J.T @ v, tolerance)
        if name == "first order":
            close(hg.params, ct)


@stateful
def test_a_carry_moves_along_the_inner_run_and_is_replayed(objective):
    def inner(params, hparams, x, carry):
        outputs = forward(objective, params, x * hparams.exp())
        return objective(outputs, carry), objective.update(tree.detach(outputs), carry)

    def outer(params, hparams, x):
        return forward(objective, params, x * hparams.exp()).z.square().sum()

    first = carry_of(objective, 3)
    solver = metacal.descent(inner, SGD, carry=first)

    torch.manual_seed(5)
    start, hparams, carry = leaf_grads(params_of(objective)), leaf_grads(HPARAMS), first
    params, velocity = start, tree.zeros_like(start)
    for _ in range(STEPS):
        loss, carry = inner(params, hparams, SUPPORT, carry)
        g = derivative(loss, params, create_graph=True)
        velocity = {name: MOMENTUM * velocity[name] + g[name] for name in g}
        params = {name: params[name] - LR * velocity[name] for name in g}
    expected = derivative(outer(params, hparams, QUERY), hparams)
    for adjoint in (Unrolled(), Unrolled(mode="reverse", segment=1)):
        torch.manual_seed(5)
        estimate = metacal.hypergradient(outer, solver, adjoint)
        hg = estimate(solver.init(params_of(objective), HPARAMS), HPARAMS, metacal.repeat(SUPPORT, STEPS), QUERY)
        close(hg.hparams, expected)
        close(hg.state.carry, carry)
        assert not any(leaf.requires_grad for leaf in tree.leaves(hg.state.carry))


@every_one
def test_training_lowers_the_loss(objective):
    """Forty steps of Adam, with target and carry moving as in a real run; judged with those of the end."""
    x, optimizer = random_outputs(n=12, m=2, d=4, seed=30).z, optim.adam(0.03)
    start = params_of(objective)

    def outputs_of(params, target) -> Outputs:
        outputs = forward(objective, params, x)
        return outputs._replace(target=forward(objective, target, x).z.detach()) if objective.ema_target else outputs

    params = target = start
    carry, state = carry_of(objective, 3), optimizer.init(start)
    for _ in range(40):
        gradient = grad(lambda params: objective(outputs_of(params, target), carry))(params)  # noqa: B023
        updates, state = optimizer.update(gradient, state, params=params, inplace=False)
        carry = objective.update(outputs_of(params, target), carry)
        params = tree.add(params, updates)
        target = objectives.ema(target, params, 0.9)
    before, after = (objective(outputs_of(each, target), carry) for each in (start, params))
    assert after < before - 0.01 * before.abs()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-4])
def test_half_precision_is_read_in_float32(objective: SSLObjective, dtype: torch.dtype, scale: float) -> None:
    """The loss of the rounded numbers: float16 squares neither 300 nor 1e-4, and a queue or centre in it would stop moving."""
    half = Outputs(*(scale * x.float() for x in random_outputs(n=12, d=4)))
    half = Outputs(*(x.to(dtype) for x in half))
    single = Outputs(*(x.float() for x in half))
    carry = tree.map(lambda leaf: leaf.float(), carry_of(objective))
    close(objective(half, carry), objective(single, carry), 1e-6)
    moved = []
    for outputs in (half, single):
        torch.manual_seed(0)
        moved.append(tree.leaves(objective.update(outputs, carry)))
    close(*moved, 1e-6)
    fn, value = live(objective, half)
    zeros = torch.zeros_like(value).requires_grad_()
    loss = fn(zeros)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    if dtype == torch.bfloat16:  # in float16 a slope of 1e6 at zero is beyond what there is
        assert torch.autograd.grad(loss, zeros)[0].isfinite().all()


@pytest.mark.parametrize("objective", [WMSE(0.1), DCL(), AlignUniform(), SIGReg(num_directions=8), VICRegL()], ids=str)
def test_tc2_runs_on_it_with_every_adjoint(objective):
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6), torch.nn.Tanh())
        net = tc2.network(encoder, objective, dim=6, d=3, hidden=5)
        problem = tc2.Problem(net, objective, tc2.Networks(n_f=2, hidden=5), num_tasks=2)
        x, step = torch.randn(12, 4, 1, 4, 4), optim.sgd(0.1)
        moved = {}
        adjoints = {
            "mixed": Unrolled(),
            "reverse": Unrolled(mode="reverse"),
            "graph": Unrolled(mode="graph"),
            "first order": FirstOrder(),
            "CG": Implicit(linear.CG(5), damping=1000.0),  # far from a minimum the Hessian is indefinite
            "Neumann": Implicit(linear.Neumann(3, 5e-4), damping=1000.0),
        }
        for name, adjoint in adjoints.items():
            method = tc2.lookahead(problem, step, step, encoder_stage=tc2.Stage(0.05, 2, adjoint))
            torch.manual_seed(1)
            start = method.init()
            state, metrics = method.step(start, x)
            moved[name] = tree.sub(state.phi, start.phi)
            assert metrics["first_bad_step"] == -1
            assert all(leaf.isfinite().all() for leaf in tree.leaves(state))
        close(moved["mixed"], moved["reverse"])
        close(moved["mixed"], moved["graph"])
        for name in ("first order", "CG", "Neumann"):
            assert tree.norm(tree.sub(moved[name], moved["mixed"])) > 1e-9  # other estimates, not the same one under another name


# --- masked autoencoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_mae_equals_the_formula_written_out(normalise):
    p, target = (drawn(2, 3, 4, 5, seed=seed) for seed in (40, 41))
    total = 0.0
    for predicted, pixels in zip(p.reshape(-1, 5).numpy(), target.reshape(-1, 5).numpy(), strict=True):
        truth = (pixels - pixels.mean()) / math.sqrt(pixels.var(ddof=1) + 1e-6) if normalise else pixels
        total += ((predicted - truth) ** 2).sum() / 5
    mae = MAE(normalise)
    outputs = Outputs(p, p, target)
    assert mae(outputs).item() == pytest.approx(total / 24, rel=1e-12)
    tasks = [(drawn(2, 3, 4, 5, seed=seed), drawn(2, 3, 4, 5, seed=seed + 5)) for seed in (50, 51)]
    looped = torch.stack([mae(Outputs(p, p, t)) for p, t in tasks])
    batched = vmap(lambda p, t: mae(Outputs(p, p, t)))(*(torch.stack(each) for each in zip(*tasks, strict=True)))
    torch.testing.assert_close(batched, looped, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda p: mae(outputs._replace(p=p)), p.clone().requires_grad_(), check_forward_ad=True)
    assert grad(lambda t: mae(outputs._replace(target=t)))(target).abs().max() == 0
    flat = torch.full((2, 1, 4, 5), 0.3, dtype=torch.float64)
    assert mae(Outputs(flat, 0 * flat, flat)).item() == pytest.approx(0 if normalise else 0.09, abs=1e-9)


def masked_autoencoder():
    torch.manual_seed(0)
    net = MaskedAutoencoder(ViT(1, patch=2, dim=8, depth=1, heads=2), in_channels=1, visible=0.5, dim=8, depth=1, heads=2).double()
    f = metacal.functional(net)

    def loss(params, calibrate, batch):
        x, order = batch
        p, target, tokens = f.apply(params, x, order, calibrate=calibrate)
        return MAE()(Outputs(tokens, p, target))

    batches = [(drawn(3, 1, 1, 6, 6, seed=seed).sigmoid(), random_order(3, 1, patches=9)) for seed in (60, 61)]
    return f, loss, batches


def test_mae_trains_and_its_tokens_are_calibrated_through_it():
    f, loss, (support, query) = masked_autoencoder()
    networks = tc2.Networks(n_f=3, hidden=4)
    with default_dtype(torch.float64):
        phi = networks.init(8, torch.Generator().manual_seed(0))
        phi = tree.map(lambda leaf: leaf + 0.1 * torch.randn_like(leaf), phi)
    Z = drawn(40, 8, seed=62)

    def calibrated(params, phi, batch):
        V = networks.factors(phi, Z)
        return loss(params, lambda tokens: networks.calibrate(phi, tokens, V), batch)

    solver = metacal.descent(calibrated, optim.sgd(0.05))
    found = {}
    for name, adjoint in {
        "mixed": Unrolled(),
        "reverse": Unrolled(mode="reverse"),
        "first order": FirstOrder(),
        "CG": Implicit(linear.CG(3), damping=1000.0),  # far from a minimum the Hessian is indefinite
        "Neumann": Implicit(linear.Neumann(2, 5e-4), damping=1000.0),
    }.items():
        estimate = metacal.hypergradient(calibrated, solver, adjoint)
        found[name] = estimate(solver.init(f.params, phi), phi, metacal.repeat(support, 2), query).hparams
    params, start = f.params, leaf_grads(phi)
    params = leaf_grads(params)
    for _ in range(2):
        params = tree.axpy(-0.05, derivative(calibrated(params, start, support), params, create_graph=True), params)
    expected = derivative(calibrated(params, start, query), start)
    close(found["mixed"], expected, 1e-9)
    close(found["reverse"], expected, 1e-9)
    for name in ("first order", "CG", "Neumann"):
        assert 1e-9 < tree.norm(tree.sub(found[name], expected)) < 10 * tree.norm(expected)

    before = loss(f.params, None, query)
    trained = metacal.run(metacal.descent(lambda w, _, b: loss(w, None, b), optim.adam(1e-2)), *_started(f), metacal.repeat(query, 25))
    assert loss(trained.params, None, query) < 0.9 * before


def _started(f):
    return metacal.descent(lambda w, _, b: (w, b), optim.adam(1e-2)).init(f.params, {}), {}


# --- the adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_unwarned")
def test_the_adapter_is_the_module(lightly_loss):
    z, p, target = outputs = random_outputs(n=6, m=3, d=4)
    exact = {"rtol": 1e-12, "atol": 1e-13}
    pairs = itertools.combinations(range(3), 2)
    for name, ours in (("NTXentLoss", SimCLR(0.3)), ("DCLLoss", DCL(0.3))):
        torch.testing.assert_close(Lightly(name, {"temperature": 0.3})(outputs), ours(outputs), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Lightly("VICRegLoss")(outputs), VICReg()(outputs), rtol=1e-9, atol=1e-12)
    direct = lightly_loss.BarlowTwinsLoss()
    mean = torch.stack([direct(z[:, a], z[:, b]) for a, b in pairs]).mean()
    torch.testing.assert_close(Lightly(lightly_loss.BarlowTwinsLoss())(outputs), mean, **exact)
    simsiam, byol = (Lightly("NegativeCosineSimilarity", reads=reads) for reads in ("prediction", "target"))
    torch.testing.assert_close(simsiam(outputs), SimSiam()(outputs), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(2 + 2 * byol(outputs), BYOL()(outputs), rtol=1e-9, atol=1e-12)
    assert (simsiam.heads, simsiam.ema_target) == (SimSiam.heads, SimSiam.ema_target)
    assert (byol.heads, byol.ema_target) == (BYOL.heads, BYOL.ema_target)
    assert (Lightly.heads, Lightly.ema_target) == (("projector",), False)
    for objective in (simsiam, byol):
        d_z, d_target = grad(lambda z, t: objective(Outputs(z, p, t)), argnums=(0, 1))(z, target)  # noqa: B023
        assert d_z.abs().max() == d_target.abs().max() == 0
    emp = Lightly("EMPSSLLoss", reads="list")
    torch.testing.assert_close(emp(outputs), lightly_loss.EMPSSLLoss()(list(z.unbind(1))), **exact)
    swav = Lightly("SwaVLoss", reads=lambda loss, outputs: loss(list(outputs.p.unbind(1)), []))
    torch.testing.assert_close(swav(outputs), SwAV(0.1, 0.05)(outputs), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_unwarned")
def test_the_adapter_carries_buffers_and_leaves_the_module_alone(lightly_loss):
    def reads(loss, outputs):
        return loss(list(outputs.target.unbind(1)), list(outputs.z.unbind(1)))

    module = lightly_loss.DINOLoss(4).double()
    adapted, ours = Lightly(module, reads=reads), DINO(0.1, 0.04, 0.9)
    carry, own = adapted.init_carry(4), {"centre": torch.zeros(4, dtype=torch.float64)}
    for seed in range(3):
        outputs = random_outputs(seed=seed)
        for _ in range(2):  # a loss moves nothing
            torch.testing.assert_close(adapted(outputs, carry), ours(outputs, own), rtol=1e-6, atol=1e-8)
        carry, own = adapted.update(outputs, carry), ours.update(outputs, own)
        torch.testing.assert_close(carry["center"].flatten(), own["centre"], rtol=1e-12, atol=1e-14)
        assert not carry["center"].requires_grad
    assert module.center.abs().max() == 0

    bank = Lightly("NTXentLoss", {"memory_bank_size": (8, 4)})
    before = bank.init_carry(4)
    outputs = tree.map(torch.Tensor.float, random_outputs(n=3, m=2))
    after = bank.update(outputs, before)
    assert (after["memory_bank.bank"] != before["memory_bank.bank"]).any(1).sum() == 3  # three new keys
    assert bank(outputs, before) != bank(outputs, after)
    assert Lightly("VICRegLoss").init_carry(4) == ()
    assert Lightly("VICRegLoss").update(outputs, ()) == ()


@pytest.mark.usefixtures("_unwarned")
@pytest.mark.parametrize(("name", "settings"), [("NTXentLoss", {}), ("BarlowTwinsLoss", {}), ("VICRegLoss", {}), ("DCLLoss", {})])
def test_the_adapter_under_transforms(lightly_loss, name, settings):
    objective, many = Lightly(name, settings), random_outputs(n=3, m=2, d=2, lead=(3,)).z
    looped = torch.stack([objective(Outputs(z)) for z in many])
    torch.testing.assert_close(vmap(lambda z: objective(Outputs(z)))(many), looped, rtol=1e-12, atol=1e-13)
    # lightly's VICReg writes in place where forward mode cannot: it raises, and mode="reverse" does without.
    z, forward_mode = many[0].clone().requires_grad_(), name != "VICRegLoss"
    assert torch.autograd.gradgradcheck(lambda z: objective(Outputs(z)), z, check_fwd_over_rev=forward_mode)


def test_the_adapter_refuses_what_it_cannot_use(lightly_loss):
    with pytest.raises(ValueError, match=r"`loss` should name a class of lightly.loss, got 'NTXent'. There are:.*NTXentLoss"):
        Lightly("NTXent")
    with pytest.raises(ValueError, match=r"`reads` should be one of pair, list, prediction, target, or a function, got 'both'"):
        Lightly("NTXentLoss", reads="both")
    with pytest.raises(ValueError, match=r"`loss` should be without parameters.*Linear"):
        Lightly(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`settings` are for a loss given by its name"):
        Lightly(torch.nn.MSELoss(), {"reduction": "sum"})
    with pytest.raises(ValueError, match=r"`outputs.p` should be a tensor.*got None"):
        Lightly("NegativeCosineSimilarity", reads="prediction")(Outputs(random_outputs().z))
