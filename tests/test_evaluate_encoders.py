"""Encoders judged end to end: fine-tuning against a torch.optim loop, scores by name, scores while training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metacal
from metacal import nets, objectives, optim, tc2, tree
from metacal.data import Images, batch_indices, load, split_validation
from metacal.data.splits import stratified
from metacal.evaluate import (
    SCORES,
    Case,
    Encoder,
    assess,
    check_online,
    cka,
    features,
    few_shot,
    fine_tune,
    frozen,
    held_out_probabilities,
    knn,
    leep,
    linear_probe,
    logme,
    nce,
    online,
)
from metacal.evaluate.parts import at_most, parts

CPU = torch.device("cpu")


def network(channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 8)).double()


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    return split_validation(load("digits", "train"), 0.2, seed=0)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_is_the_loop_one_would_write(digits: tuple[Images, Images]) -> None:
    few, judged = digits[0].select(torch.arange(100)), digits[1]
    net = network()
    f = metacal.functional(net)
    before = tree.clone(f.params)
    state = torch.get_rng_state()
    found = fine_tune(f.apply, f.params, few.images, few.labels, judged.images, judged.labels, steps=30, batch_size=16, lr=0.01, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(f.params[name], before[name]) for name in before)

    head = nn.Linear(8, 10).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    start = net(few.images.double()).detach()
    mean, deviation = start.mean(0), start.std(0, correction=0)

    def model(x: Tensor) -> Tensor:
        return head((net(x) - mean) / deviation)

    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for t in range(30):
        rows = batch_indices(t, 16, 100, 5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(few.images[rows].double()), few.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(found.params["encoder"][name], value.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.params["head"]["weight"], head.weight.detach().T, rtol=1e-9, atol=1e-11)
    accuracy = (model(judged.images.double()).argmax(1) == judged.labels).double().mean().item()
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12)


def test_fine_tuning_learns_and_moves_the_encoder(digits: tuple[Images, Images]) -> None:
    f = metacal.functional(nets.ConvEncoder(width=8, dim=16, stem_stride=1))
    few, judged = digits[0].select(torch.arange(300)), digits[1]
    found = fine_tune(f.apply, f.params, few.images.mul(255).round().byte(), few.labels, judged.images, judged.labels, steps=80, lr=1e-2)
    frozen, judged_frozen = (features(lambda x: f.apply(f.params, x), part.images) for part in (few, judged))
    assert found.accuracy > linear_probe(frozen, few.labels, judged_frozen, judged.labels).accuracy + 0.05
    assert all((found.params["encoder"][name] - value).abs().max() > 1e-3 for name, value in f.params.items())


@pytest.mark.parametrize(("num_labels", "steps"), [(60, 200), (700, 219)])  # 20 passes over 700 images in batches of 64
def test_the_budget_of_fine_tuning_grows_with_the_labels(digits: tuple[Images, Images], num_labels: int, steps: int) -> None:
    f = metacal.functional(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)))
    few = digits[0].select(torch.arange(num_labels))
    default, counted = (
        fine_tune(f.apply, f.params, few.images, few.labels, few.images, few.labels, **given) for given in ({}, {"steps": steps})
    )
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(default.params), tree.leaves(counted.params), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"train_labels": a["train_labels"] - 1}, "`train_labels` should not be negative, got -1.*unlabelled"),
        (lambda a: a | {"test_labels": a["test_labels"] - 1}, "`test_labels` should not be negative"),
        (lambda a: a | {"test_labels": a["test_labels"] + 5}, "every class of `test_labels`; missing: 10, 11, 12, 13, 14. Split by class"),
        (lambda a: a | {"train_labels": a["train_labels"] * 0}, "at least 2 classes"),
        (lambda a: a | {"train_labels": a["train_labels"][1:]}, "`train_labels` should be 60 integers, one per row of `train`"),
        (lambda a: a | {"train": a["train"].expand(-1, 3, -1, -1)}, r"`images` \[60, 3, 8, 8\].*resize.*1 <-> 3 channels"),
        (lambda a: a | {"test": a["test"].expand(-1, 3, -1, -1)}, r"`images` \[60, 3, 8, 8\].*resize.*1 <-> 3 channels"),
        (lambda a: a | {"steps": 0}, "`steps` should be at least 1, got 0"),
    ],
)
def test_fine_tuning_refuses(digits: tuple[Images, Images], change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    f = metacal.functional(network())
    few = digits[0].select(torch.arange(60))
    good = {"train": few.images, "train_labels": few.labels, "test": few.images, "test_labels": few.labels, "steps": 1}
    with pytest.raises(ValueError, match=message):
        fine_tune(f.apply, f.params, **change(good))


def test_fine_tuning_that_diverges_says_so(digits: tuple[Images, Images]) -> None:
    f = metacal.functional(network())
    few = digits[0].select(torch.arange(60))
    with pytest.raises(ArithmeticError, match=r"Fine-tuning diverged.*Lower `lr` = 1e\+308"):
        fine_tune(f.apply, f.params, few.images, few.labels, few.images, few.labels, steps=3, lr=1e308)


def test_features_of_images_with_other_channels() -> None:
    with pytest.raises(ValueError, match=r"`images` \[5, 3, 8, 8\] have other channels or another size.*metacal.data.resize"):
        features(network(), torch.rand(5, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"`images` \[5, 1, 9, 11\] have other channels or another size"):
        features(network(), torch.rand(5, 1, 9, 11).double())

    def breaks(x: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        features(breaks, torch.rand(5, 1, 8, 8))


# -------------------------------------------------------------------------------------------------------- scores by name


def encoder(dim: int = 8) -> Encoder:
    f = metacal.functional(nets.ConvEncoder(width=8, dim=dim, stem_stride=1))
    return Encoder(f.apply, f.params, 8, 1)


def test_assess_gives_every_score_of_one_protocol() -> None:
    enc = encoder()
    case = Case(enc, "digits", "validation", labels=250, source="digits", against=encoder(12))
    found = assess(case, SCORES)
    train, test = (features(lambda x: enc.encode(enc.params, x), part.images) for part in (case.train, case.test))
    y, y_test = case.train.labels, case.test.labels
    assert len(y) == pytest.approx(250, abs=10)
    assert found["knn"] == knn(train, y, test, y_test)
    assert found["knn_200"] == knn(train, y, test, y_test, k=200)
    assert found["probe"] == linear_probe(train, y, test, y_test).accuracy
    assert found["logme"] == logme(train, y)
    assert found["fine_tune_1"] < found["fine_tune_10"]
    assert found["few_shot_1"] < found["few_shot_5"]
    assert 0 < found["few_shot_1_95"] < 0.02
    named = held_out_probabilities(train, y)  # the source is the set itself
    assert found["leep"] == leep(named, y)
    assert found["nce"] == nce(named.argmax(1), y)
    against = case.against
    assert against is not None
    assert found["cka"] == cka(test, features(lambda x: against.encode(against.params, x), case.test.images))
    assert all(math.isfinite(value) for value in found.values())


def test_few_shot_never_reads_test_images_to_choose_settings() -> None:
    pixels = Encoder(lambda params, x: x.flatten(1) * params["one"], {"one": torch.ones(())}, 8, 1)
    for split, part in (("validation", "train"), ("test", "test")):
        images = load("digits", part)  # type: ignore[arg-type]
        wanted = few_shot(images.images.flatten(1), images.labels, shots=5).mean
        assert assess(Case(pixels, "digits", split), ["few_shot"])["few_shot_5"] == wanted  # type: ignore[arg-type]


def test_scores_that_lack_something() -> None:
    case = Case(encoder(), "digits", labels=250)
    with pytest.raises(ValueError, match=r"`scores` should be some of probe, knn, .*got 'prob'"):
        assess(case, ["prob"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`source` should name the data set"):
        assess(case, ["leep"])
    with pytest.raises(ValueError, match=r"`against` should be the encoder to compare with.*--against RUN"):
        assess(case, ["cka"])
    with pytest.raises(ValueError, match=r"`neighbours` should be at most the 250 training images of digits with labels, got 400"):
        assess(replace(case, neighbours=400), ["knn"])
    with pytest.raises(ValueError, match=r"`labels` should give every class of digits at least 2 .* 15 give a class only 1") as said:
        assess(replace(case, labels=15), ["probe"])
    least = re.search(r"Ask for (\d+) or more", str(said.value))
    assert least is not None
    assess(replace(case, labels=int(least[1]), neighbours=5), ["probe", "knn"])
    for name, value, expected in (("labels", 0, "at least 2"), ("neighbours", 0, "at least 1")):
        with pytest.raises(ValueError, match=f"`{name}` should be {expected}, got 0"):
            replace(case, **{name: value})


def test_too_few_labels_for_a_curve_leave_it_out() -> None:
    case = Case(encoder(), "digits", labels=15, neighbours=5)
    assert set(assess(case, ["knn"])) == {"knn", "knn_200"}
    assert case.curve() == ([], [])
    assert case.map()[0].shape == (len(case.test), 2)


def test_episodes_do_not_depend_on_the_number_of_labels() -> None:
    few, many = (Case(encoder(), "digits", labels=labels) for labels in (20, 4000))
    few = replace(few, encoder=many.encoder)
    assert assess(few, ["few_shot"]) == assess(many, ["few_shot"])


# ------------------------------------------------------------------------------------------------------- with BatchNorm


def normalising() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8))


def test_a_case_freezes_batch_norm_on_training_images_whatever_is_asked() -> None:
    f = metacal.functional(normalising(), batch_norm="batch")
    enc = Encoder(f.apply, f.params, 8, 1)
    few = Case(enc, "digits", "validation", labels=60)
    z = few.z_test
    encode = frozen(lambda x: enc.encode(enc.params, x), few.everything[0].images)
    torch.testing.assert_close(z, features(encode, few.test.images), rtol=1e-4, atol=1e-4)
    many = replace(few, labels=1000)
    torch.testing.assert_close(many.encoded(few.test.select(torch.arange(5))), z[:5], rtol=1e-4, atol=1e-4)
    assert assess(replace(few, against=enc), ["cka"])["cka"] == pytest.approx(1, abs=1e-4)


def test_fine_tuning_with_batch_norm_judges_every_image_by_itself(digits: tuple[Images, Images]) -> None:
    f = metacal.functional(normalising().double(), batch_norm="batch")
    few, judged = digits[0].select(torch.arange(200)), digits[1]

    def shaded(part: Images) -> Tensor:  # by class, which batches of one class would hide
        return part.images.double() * (part.labels[:, None, None, None] + 1) / 10

    def accuracy(part: Images) -> float:
        return fine_tune(f.apply, f.params, shaded(few), few.labels, shaded(part), part.labels, steps=40, lr=1e-2).accuracy

    whole = accuracy(judged)
    assert whole > 0.6
    one_class = [judged.select((judged.labels == label).nonzero().squeeze(1)) for label in range(10)]
    parts = sum(accuracy(part) * len(part) for part in one_class) / len(judged)
    assert parts == pytest.approx(whole, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------- online


def problem(dim: int = 8) -> tuple[tc2.Problem, Any]:
    net = tc2.network(nets.ConvEncoder(width=8, dim=dim, stem_stride=1), objectives.SimCLR(), dim=dim, d=8)
    made = tc2.Problem(net, objectives.SimCLR())
    return made, tc2.base(made, optim.adam(1e-3)).init()


def test_online_scores_are_those_of_the_frozen_encoder(digits: tuple[Images, Images]) -> None:
    made, state = problem()
    rng = torch.get_rng_state()
    found = online(made, state, digits[1], neighbours=10)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(value.ndim == 0 for value in found.values())
    learn, judge = split_validation(digits[1], 0.5, seed=0)
    z, z_judge = (made.network.encode(state.theta, part.images).detach() for part in (learn, judge))
    probe = linear_probe(z, learn.labels, z_judge, judge.labels, strengths=(1e-2,))
    assert found["online_probe"].item() == pytest.approx(probe.accuracy)
    assert found["online_knn"].item() == pytest.approx(knn(z, learn.labels, z_judge, judge.labels, k=10))


def test_online_scores_show_a_collapsed_and_a_diverged_encoder(digits: tuple[Images, Images]) -> None:
    made, state = problem()
    flat = state._replace(theta=tree.map(lambda leaf: 0 * leaf, state.theta))
    found = online(made, flat, digits[1])
    assert found["dimension_std"] == 0
    assert found["online_probe"] < 0.2
    bad = state._replace(theta=tree.map(lambda leaf: math.nan * leaf, state.theta))
    assert all(value.isnan() for value in online(made, bad, digits[1]).values())
    with pytest.raises(ValueError, match=r"`images` \[\d+, 3, 8, 8\] have other channels"):
        online(made, state, replace(digits[1], images=digits[1].images.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"`images` watched .*evaluate.online.* at least 1000 for as many neighbours; got \d+"):
        online(made, state, digits[1], neighbours=1000)
    with pytest.raises(ValueError, match=r"2 of every class or more.*got 10 of 10 classes. Ask for 60 or more, or for none"):
        check_online(at_most(digits[1], 10))
    check_online(at_most(digits[1], 60))


def test_online_scores_with_batch_norm_are_those_of_single_images(digits: tuple[Images, Images]) -> None:
    made = tc2.Problem(tc2.network(normalising(), objectives.SimCLR(), dim=8, d=8), objectives.SimCLR())
    theta = made.network.params
    found = online(made, tc2.base(made, optim.adam(1e-3)).init(), digits[1])
    learn, judge = split_validation(digits[1], 0.5, seed=0)
    encode = frozen(lambda x: made.network.encode(theta, x), learn.images)
    z, z_judge = encode(learn.images), torch.cat([encode(image) for image in judge.images.split(1)])
    assert found["online_knn"].item() == pytest.approx(knn(z, learn.labels, z_judge, judge.labels))


# ------------------------------------------------------------------------------------------------- how many images


def of_classes(*sizes: int) -> Images:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    return Images(torch.rand(len(labels), 1, 1, 1), labels, "noise", num_classes=len(sizes))


@pytest.mark.parametrize("most", [16, 25, 99, 500, 1294])
def test_labels_are_as_many_as_are_asked_for(most: int) -> None:
    """Shares rounded by the largest remainder, in fractions; ties are left open."""
    everything = load("digits", "train")
    few = at_most(everything, most)
    assert len(few) == most
    shares = [Fraction(most * int(n), len(everything)) for n in everything.labels.bincount()]
    more = [int(size) - int(share) for size, share in zip(few.labels.bincount(), shares, strict=True)]
    assert set(more) == {0, 1}
    up, down = ([share % 1 for share, n in zip(shares, more, strict=True) if n == one] for one in (1, 0))
    assert min(up) >= max(down)
    assert len({image.numpy().tobytes() for image in few.images}) > 0.9 * most  # of different images, drawn once
    assert torch.equal(at_most(everything, most).images, few.images)


def test_every_class_has_a_label_and_sets_of_one_size_are_those_of_rounding() -> None:
    assert at_most(of_classes(1000, 10, 10, 10), 20).labels.bincount().tolist() == [17, 1, 1, 1]
    assert at_most(of_classes(96, 1, 1, 1, 1), 5).labels.bincount().tolist() == [1] * 5
    assert at_most(of_classes(5, 5), 10).labels.bincount().tolist() == [5, 5]
    with pytest.raises(ValueError, match="`labels` should be at least 4, one image of every class of noise; got 3"):
        at_most(of_classes(10, 10, 10, 10), 3)
    with pytest.raises(ValueError, match=r"`evaluate\.online` should be at least 4"):
        at_most(of_classes(10, 10, 10, 10), 3, "evaluate.online")
    images = of_classes(200, 100, 300)
    assert torch.equal(at_most(images, 60).images, images.select(stratified(images.labels, 0.1, 0)[1]).images)


@pytest.mark.data
@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "omniglot", "cifar10"])
def test_the_committed_studies_read_the_images_that_they_read(name: str) -> None:
    """They asked for 2,000, when every class's share was rounded by itself."""
    everything = parts(name, "validation")[0]
    few = everything if len(everything) <= 2000 else everything.select(stratified(everything.labels, 2000 / len(everything), 0)[1])
    assert torch.equal(at_most(everything, 2000).images, few.images)
