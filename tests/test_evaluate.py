"""Probes, neighbours, monitors and intervals against scikit-learn, scipy, closed forms and plain loops."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metacal
from metacal import nets
from metacal.data import load
from metacal.evaluate import (
    dimension_std,
    features,
    frozen,
    is_collapsed,
    knn,
    linear_probe,
    mean_interval,
    paired_interval,
    rank_me,
    uniformity,
)


def blobs(n: int, d: int = 6, classes: int = 4, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = torch.arange(n) % classes
    return centres[y] + spread * torch.randn(n, d, generator=g, dtype=torch.float64), y


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = load("digits", "train"), load("digits", "test")
    return train.images.flatten(1), train.labels, test.images.flatten(1), test.labels


# --------------------------------------------------------------------------------------------------------------- probe


def test_probe_on_the_pixels_of_real_digits(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    result = linear_probe(*digits)
    assert 0.95 < result.accuracy < 0.995
    assert 0.94 < result.validation_accuracy < 0.995
    assert result.strength in (1e-2, 1e-3, 1e-4)
    assert result.converged
    assert linear_probe(*digits) == result
    x, y, x_test, _ = digits
    chance = linear_probe(x, y, x_test, digits[3][torch.randperm(len(x_test))], strengths=(1e-2,))
    assert chance.accuracy < 0.2


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_probe_is_sklearns_logistic_regression(strength: float) -> None:
    """One strength: standardised by the training rows, C = 1 / (strength N), refitted on training and validation rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (v, vy), (t, ty) = blobs(120), blobs(60, seed=1), blobs(400, seed=2)
    scale = torch.logspace(-3, 3, 6).double()  # matters unless standardised
    x, v, t = x * scale + 5, v * scale + 5, t * scale + 5

    def direct(x: Tensor, y: Tensor, t: Tensor, ty: Tensor) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * len(x)), max_iter=1000))
        return float(model.fit(x.numpy(), y.numpy()).score(t.numpy(), ty.numpy()))

    result = linear_probe(x, y, t, ty, validation=(v, vy), strengths=(strength,))
    assert result.validation_accuracy == pytest.approx(direct(x, y, v, vy), abs=1e-12)
    assert result.accuracy == pytest.approx(direct(torch.cat([x, v]), torch.cat([y, vy]), t, ty), abs=1e-12)
    assert result.strength == strength


def test_probe_chooses_on_validation_rows_only() -> None:
    """Features beside which noise outnumbers the rows: the validation rows want a strong penalty, and the test rows are not asked."""
    x, y = blobs(60, d=40, spread=4)
    v, vy = blobs(400, d=40, spread=4, seed=1)
    t, ty = blobs(400, d=40, spread=4, seed=2)
    grid = (1e-6, 1e-1, 1.0)
    single = {s: linear_probe(x, y, t, ty, validation=(v, vy), strengths=(s,)) for s in grid}
    best = max(r.validation_accuracy for r in single.values())
    result = linear_probe(x, y, t, ty, validation=(v, vy), strengths=grid)
    assert result.validation_accuracy == best
    assert result.strength > 1e-6
    assert result.strength == max(s for s, r in single.items() if r.validation_accuracy == best)
    assert result.strength == linear_probe(x, y, t, ty.roll(1), validation=(v, vy), strengths=grid).strength
    assert abs(result.accuracy - single[result.strength].accuracy) <= 1 / 400


def test_probe_depends_on_the_seed_only_through_the_split() -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    state = torch.get_rng_state()
    results = {linear_probe(x, y, t, ty, seed=seed, strengths=(0.1,)) for seed in range(6)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len({r.validation_accuracy for r in results}) > 1
    assert len({r.accuracy for r in results}) == 1  # the refit reads every row


def test_probe_takes_numpy_half_precision_and_tensors_with_gradients() -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    wanted = linear_probe(x, y, t, ty)
    assert linear_probe(x.numpy(), y.numpy(), t.numpy(), ty.int().numpy()) == wanted
    assert linear_probe(x.requires_grad_(), y, t, ty) == wanted
    half = linear_probe(x.bfloat16(), y, t.bfloat16(), ty)
    assert abs(half.accuracy - wanted.accuracy) < 0.1


def test_an_unfinished_fit_is_reported() -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_probe(x, y, t, ty, max_iterations=2).converged
        assert linear_probe(x, y, t, ty).converged


def test_other_warnings_of_a_fit_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression.fit

    def warning_fit(self: Any, *args: Any) -> Any:
        warnings.warn("something else", FutureWarning, stacklevel=2)
        return fit(self, *args)

    monkeypatch.setattr(LogisticRegression, "fit", warning_fit)
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    with pytest.warns(FutureWarning, match="something else"):
        linear_probe(x, y, t, ty)


def test_the_probe_uses_no_more_threads_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import threadpoolctl

    asked = []
    limits = threadpoolctl.threadpool_limits
    monkeypatch.setattr(threadpoolctl, "threadpool_limits", lambda n, user_api: asked.append(n) or limits(n, user_api))
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    linear_probe(x, y, t, ty)
    assert set(asked) == {min(4, torch.get_num_threads())}


# ----------------------------------------------------------------------------------------------------------------- knn


def naive_knn(x: Tensor, y: Tensor, t: Tensor, ty: Tensor, k: int, temperature: float) -> float:
    right = 0
    for query, label in zip(t, ty, strict=True):
        similarity = [float(query @ key / (query.norm() * key.norm())) for key in x]
        votes: dict[int, float] = {}
        for i in sorted(range(len(x)), key=lambda i: -similarity[i])[:k]:
            votes[int(y[i])] = votes.get(int(y[i]), 0.0) + math.exp(similarity[i] / temperature)
        right += max(votes, key=lambda c: votes[c]) == int(label)
    return right / len(t)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (60, 0.07), (60, 10.0)])
def test_knn_is_the_loop_over_neighbours(k: int, temperature: float) -> None:
    (x, y), (t, ty) = blobs(60), blobs(150, seed=1)
    assert knn(x, y, t, ty, k=k, temperature=temperature) == naive_knn(x, y, t, ty, k, temperature)


def test_knn_settings_matter_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    (x, y), (t, ty) = blobs(60), blobs(150, seed=1)
    assert len({knn(x, y, t, ty, k=k) for k in (1, 5, 60)}) == 3
    assert knn(x, y, t, ty, k=60, temperature=0.07) != knn(x, y, t, ty, k=60, temperature=10.0)
    assert math.isfinite(knn(x, y, t, ty, temperature=1e-6))
    whole = knn(x, y, t, ty)
    monkeypatch.setattr(importlib.import_module("metacal.evaluate.knn"), "_CHUNK", 7)
    assert knn(x, y, t, ty) == whole
    assert knn(3 * x.numpy(), y.numpy(), 0.1 * t.numpy(), ty.numpy()) == whole  # cosine: lengths do not matter


def test_knn_on_the_pixels_of_real_digits(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    assert 0.96 < knn(*digits) < 0.99
    assert 0.93 < knn(*digits, k=200) < knn(*digits)


# ----------------------------------------------------------------------------------------------------------- bad input

BOTH = pytest.mark.parametrize("judge", [linear_probe, knn])


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"train": a["train"].index_fill(0, torch.tensor([3, 5]), math.nan)},
            "`train` .* 2 of 80 rows .* first is row 3.*checkpoint",
        ),
        (lambda a: a | {"test": a["test"] / 0}, "`test` should be finite; 200 of 200"),
        (lambda a: a | {"train_labels": a["train_labels"] - 1}, "`train_labels` should not be negative, got -1.*unlabelled"),
        (lambda a: a | {"test_labels": a["test_labels"] - 1}, "`test_labels` should not be negative"),
        (
            lambda a: a | {"test_labels": a["test_labels"] + 1},
            "every class of `test_labels`; missing: 4. Split by class: .*split_validation",
        ),
        (
            lambda a: a | {"train_labels": a["train_labels"] * 0, "test_labels": a["test_labels"] * 0},
            "at least 2 classes, got only class 0",
        ),
        (lambda a: a | {"train_labels": a["train_labels"][:-1]}, r"`train_labels` should be 80 integers.*got \(79,\)"),
        (lambda a: a | {"train_labels": a["train_labels"].double()}, "`train_labels` should be 80 integers.*float64"),
        (lambda a: a | {"test": a["test"][:, :3]}, "`test` should have features of width 6 as `train` has, got 3"),
        (lambda a: a | {"train": a["train"].view(80, 2, 3)}, r"`train` should be features \[N, d\].*got \(80, 2, 3\).*flatten"),
        (lambda a: a | {"train": a["train"][:0], "train_labels": a["train_labels"][:0]}, r"`train` should be features .*got \(0, 6\)"),
        (lambda a: a | {"train": a["train"].long()}, "`train` should be floating point, got torch.int64"),
    ],
)
def test_bad_features_and_labels(
    judge: Callable[..., object], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    with pytest.raises(ValueError, match=message):
        judge(**change({"train": x, "train_labels": y, "test": t, "test_labels": ty}))


@BOTH
def test_collapsed_features_warn_and_give_the_accuracy_of_guessing(judge: Callable[..., Any]) -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    with pytest.warns(RuntimeWarning, match="`train` has collapsed.*guessing one class.*dimension_std"):
        result = judge(3 + 1e-15 * x, y, 3 + 0 * t, ty)
    assert (result if isinstance(result, float) else result.accuracy) == 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(3 + 1e-2 * x, y, 3 + 1e-2 * t, ty)


def test_bad_settings() -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    for k in (0, 81):
        with pytest.raises(ValueError, match=f"`k` should be between 1 and the 80 training rows, got {k}"):
            knn(x, y, t, ty, k=k)
    with pytest.raises(ValueError, match="`temperature` should be positive, got 0"):
        knn(x, y, t, ty, temperature=0)
    for strengths in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="`strengths` should hold positive numbers"):
            linear_probe(x, y, t, ty, strengths=strengths)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="`validation` should be a share between 0 and 1"):
            linear_probe(x, y, t, ty, validation=share)
    rare = torch.cat([y[:-1], torch.tensor([4])])
    with pytest.raises(ValueError, match=r"each class at least twice .*class 4 is there once.*validation="):
        linear_probe(x, rare, t, ty)
    with pytest.raises(ValueError, match="every class of `validation_labels`; missing: 7"):
        linear_probe(x, y, t, ty, validation=(x[:2], torch.tensor([0, 7])))


@BOTH
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 2.0**-52), (torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)])
def test_features_have_collapsed_where_every_column_is_constant(judge: Callable[..., Any], dtype: torch.dtype, unit: float) -> None:
    """A column by its own magnitude, in units of the last place of its type: a large constant hides no other column."""
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    constant = torch.tensor([1e6, 0, 0, 0, 0, 0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(torch.where(constant > 0, constant, x).to(dtype), y, torch.where(constant > 0, constant, t).to(dtype), ty)
    steps = torch.arange(80, dtype=torch.float64)[:, None] % 3 * unit
    for columns in (constant, torch.ones(6, dtype=torch.float64)):
        same = (columns * (1 + steps)).to(dtype)
        assert not (same == same[0]).all()
        with pytest.warns(RuntimeWarning, match="`train` has collapsed"):
            judge(same, y, t.to(dtype), ty)


@BOTH
def test_labels_may_be_unsigned(judge: Callable[..., Any]) -> None:
    (x, y), (t, ty) = blobs(80), blobs(200, seed=1)
    assert judge(x, y.numpy().astype(np.uint16), t, ty.numpy().astype(np.uint32)) == judge(x, y, t, ty)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-13, 1e20, 1e36])
def test_neighbours_and_monitors_are_the_same_at_any_scale(scale: float) -> None:
    """In float32, where squares of such features vanish or overflow."""
    (x, y), (t, ty) = blobs(60), blobs(150, seed=1)
    x, t, power = x.float(), t.float(), 2.0 ** round(math.log2(scale))
    assert knn(power * x, y, power * t, ty) == knn(x, y, t, ty) == knn(power * x, y, t, ty) > 0.5
    for monitor in (rank_me, dimension_std, uniformity):
        assert torch.equal(monitor(power * x), monitor(x))
    assert not is_collapsed(power * x)
    assert knn(scale * x.double(), y, scale * t.double(), ty) == knn(x.double(), y, t.double(), ty)


# ------------------------------------------------------------------------------------------------------------ features


def test_features_encode_in_batches_without_gradients() -> None:
    linear = nn.Linear(4, 3)
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    sizes = []

    def encode(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return linear(x.flatten(1))

    z = features(encode, images, batch_size=4)
    assert sizes == [4, 4, 2]
    assert not z.requires_grad
    torch.testing.assert_close(z, linear(images.flatten(1) / 255).detach())
    torch.testing.assert_close(features(encode, images.double().float() / 255, device="cpu"), z)


def test_features_restore_each_submodules_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[2].eval()
    before = net.state_dict()["1.running_mean"].clone()
    images = torch.rand(6, 1, 2, 2)
    z = features(net, images, batch_size=3)
    assert torch.equal(net[1].running_mean, before)
    assert [m.training for m in net.modules()] == [True, True, True, False, True]
    torch.testing.assert_close(z, net.eval()(images).detach())
    net.train()

    class Breaks(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken")

    net[0] = Breaks()
    with pytest.raises(ArithmeticError):
        features(net, images)
    assert net.training  # also after an error


def test_features_that_are_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"`encode` should return \[5, d\], got \(5, 1, 4, 4\). Pool or flatten"):
        features(nn.Identity(), torch.zeros(5, 1, 4, 4))
    with pytest.raises(ValueError, match=r"`encode` should return \[5, d\], got \(1, 80\)"):
        features(lambda x: x.reshape(1, -1), torch.zeros(5, 1, 4, 4))
    with pytest.raises(ValueError, match="`images` should not be empty"):
        features(nn.Flatten(), torch.zeros(0, 1, 4, 4))
    with pytest.raises(ValueError, match="`batch_size` should be at least 1"):
        features(nn.Flatten(), torch.zeros(5, 1, 4, 4), batch_size=0)


# -------------------------------------------------------------------------------------------------------------- frozen


def with_batch_norm() -> nn.Sequential:
    conv = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.ReLU()
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None)).double()


def by_the_batch(net: nn.Module) -> Callable[[Tensor], Tensor]:
    f = metacal.functional(net, batch_norm="batch")
    return lambda x: f.apply(f.params, x)


def shaded(n: int, size: int) -> Tensor:
    """Noise that grows darker from image to image, as a set that is stored class by class."""
    noise = torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.linspace(1, 0.1, n)[:, None, None, None]


@pytest.mark.parametrize(
    ("make", "n", "size"),
    [(with_batch_norm, 301, 4), (lambda: nets.ResNet18(1).double(), 9, 8)],
    ids=["small", "resnet18"],  # of 8 x 8 images a ResNet-18 makes maps of one pixel
)
def test_features_of_an_encoder_with_batch_norm_are_each_images_own(make: Callable[[], nn.Module], n: int, size: int) -> None:
    images, encode, order = shaded(n, size), by_the_batch(make()), torch.randperm(n)
    z = features(encode, images)
    assert z.std(0).mean() > 1e-3
    for batch_size in (n - 1, 4):  # the last batch has one image
        torch.testing.assert_close(features(encode, images, batch_size), z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features(encode, images[order]), z[order], rtol=1e-10, atol=1e-10)
    alone = frozen(encode, images)
    torch.testing.assert_close(features(alone, images[3:5], 1), z[3:5], rtol=1e-10, atol=1e-10)  # frozen stays frozen
    torch.testing.assert_close(features(frozen(alone, images[:4]), images), z, rtol=1e-10, atol=1e-10)


def test_a_frozen_encoder_is_torchs_evaluation_mode_with_cumulative_statistics() -> None:
    net, images, train = with_batch_norm(), shaded(20, 4), shaded(301, 4)
    by_batch, seen = by_the_batch(net), []

    def encode(x: Tensor) -> Tensor:
        seen.append(x)
        return by_batch(x)

    z = frozen(encode, train)(images)
    aborted, *batches, again = seen
    assert aborted is again is images
    assert [len(batch) for batch in batches] == [151, 150]
    read = torch.cat(batches).flatten(1)
    assert torch.equal(read[read.sum(1).argsort()], train.flatten(1)[train.flatten(1).sum(1).argsort()])  # all, once, shuffled
    assert batches[0].mean().item() == pytest.approx(train.mean().item(), rel=0.1)
    own = copy.deepcopy(net).train()
    with torch.no_grad():
        for batch in batches:
            own(batch)
    torch.testing.assert_close(z, own.eval()(images).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frozen(own, train[:9])(images), z, rtol=1e-12, atol=1e-12)  # has running statistics: they stay
    assert own[1].num_batches_tracked == len(batches)


def test_freezing_needs_images_where_there_is_something_to_freeze() -> None:
    images = shaded(5, 4)
    torch.testing.assert_close(frozen(nn.Flatten(), images[:0])(images), images.flatten(1))
    with pytest.raises(ValueError, match=r"`images` should be at least 2 to estimate the statistics .* got 1\..*frozen\(encode, "):
        features(by_the_batch(with_batch_norm()), images[:1])


# ------------------------------------------------------------------------------------------------------------ monitors


def orthonormal(n: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q


@pytest.mark.parametrize("d", [1, 3, 16])
def test_rank_me_counts_equal_directions(d: int) -> None:
    z = orthonormal(50, d) @ orthonormal(32, d).T * 7.0  # d equal singular values in 32 dimensions
    assert rank_me(z).item() == pytest.approx(d, rel=1e-9)
    assert rank_me(z[torch.randperm(50)]).item() == pytest.approx(d, rel=1e-9)


def test_rank_me_of_known_singular_values() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    z = orthonormal(20, 4) * s @ orthonormal(6, 4).T
    # shares 1/2, 1/4, 1/8, 1/8: entropy 1.75 bit
    assert rank_me(z).item() == pytest.approx(2**1.75, rel=1e-9)
    assert rank_me(torch.randn(20_000, 8)).item() == pytest.approx(8, rel=1e-3)  # identity covariance
    assert rank_me(torch.ones(5, 3)).item() == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.zeros(5, 3)).item() == 1


def test_dimension_std_is_one_when_spread_evenly_and_zero_when_collapsed() -> None:
    for d in (4, 64):
        assert dimension_std(torch.randn(20_000, d)).item() == pytest.approx(1, abs=0.02)
        assert dimension_std(torch.randn(d).expand(10, d)).item() < 1e-6
    # by hand: rows (1, 0) and (0, 2) become (1, 0) and (0, 1), deviation 1/2 each
    assert dimension_std(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item() == pytest.approx(0.5 * math.sqrt(2))


def test_uniformity_is_the_mean_over_pairs() -> None:
    z = torch.randn(12, 5, dtype=torch.float64)
    u = z / z.norm(dim=1, keepdim=True)
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(12) for j in range(i)]
    assert uniformity(z).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-12)
    assert uniformity(z[:1].expand(4, 5)).item() == pytest.approx(0, abs=1e-12)
    assert -4 < uniformity(torch.randn(2000, 256)).item() < -3.8  # all pairs nearly orthogonal: -4


def test_is_collapsed() -> None:
    spread, direction = torch.randn(200, 16), torch.randn(16)
    assert not is_collapsed(spread)
    assert not is_collapsed(spread.relu())
    assert not is_collapsed(spread + 2)
    assert is_collapsed(spread * 0)
    assert is_collapsed(100 + spread)  # one point
    assert is_collapsed(torch.randn(200, 1) * direction)  # one line through the origin
    assert is_collapsed(5 * torch.randn(16) + torch.randn(200, 1) * direction)  # one line anywhere
    assert is_collapsed(spread * math.nan)
    assert not is_collapsed(torch.randn(200, 1))


@pytest.mark.parametrize("monitor", [rank_me, dimension_std, uniformity])
def test_monitors_show_nan_take_half_precision_and_refuse_stacks(monitor: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(40, 6, requires_grad=True)
    value = monitor(z)
    assert value.shape == ()
    assert not value.requires_grad
    assert monitor(z.bfloat16()).item() == pytest.approx(value.item(), rel=0.02)
    bad = z.detach().clone()
    bad[3, 2] = math.nan
    assert monitor(bad).isnan()
    with pytest.raises(ValueError, match=r"`z` should be \[N, d\] with N >= 2, got \(2, 20, 6\).*flatten"):
        monitor(z.view(2, 20, 6))


# ----------------------------------------------------------------------------------------------------------- intervals


def test_intervals_are_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.1, 7), rng.normal(0.7, 0.1, 7)
    mean, half_width = mean_interval(a.tolist())
    low, high = stats.t.interval(0.95, 6, loc=a.mean(), scale=stats.sem(a))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high), rel=1e-12)
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    difference = paired_interval(a.tolist(), b.tolist())
    assert (difference.mean - difference.half_width, difference.mean + difference.half_width) == pytest.approx(tuple(paired), rel=1e-12)
    assert mean_interval([1, 1, 1]) == (1, 0)


def test_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    covered = sum(abs(i.mean) <= i.half_width for i in (mean_interval(rng.normal(size=3).tolist()) for _ in range(500)))
    assert 0.92 < covered / 500 < 0.98


def test_intervals_that_cannot_be() -> None:
    for values in ([0.5], [], [[0.5, 0.6]]):
        with pytest.raises(ValueError, match=r"`values` should hold at least 2 numbers.*more seeds"):
            mean_interval(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`b` should be finite.*nan"):
        paired_interval([0.1, 0.2], [0.1, math.nan])
    with pytest.raises(ValueError, match=r"`a` and `b` should be of one length.*3 and 2"):
        paired_interval([0.1, 0.2, 0.3], [0.1, 0.2])
