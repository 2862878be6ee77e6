"""Sets, splits, the order of batches and augmentation: on the bundled digits, on files made here, and on real files."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metacal.data import (
    AUGMENTATIONS,
    NAMES,
    Augmentation,
    Images,
    augmenter,
    batch_indices,
    load,
    resize,
    sets,
    split_per_class,
    split_validation,
    to_float,
    views,
)

GREY = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "omniglot": 28}
SHAPES = {**{name: (1, size) for name, size in GREY.items()}, "cifar10": (3, 32), "cifar100": (3, 32)}


def noise(per_class: list[int], *, channels: int = 1, size: int = 4) -> Images:
    """Random images whose first pixel tells them apart."""
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    labels = labels[torch.randperm(len(labels))]
    images = torch.rand(len(labels), channels, size, size)
    images[:, 0, 0, 0] = torch.arange(len(labels)) / len(labels)
    return Images(images, labels, "noise", num_classes=len(per_class))


def identities(images: Images) -> list[float]:
    return images.images[:, 0, 0, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------- sets


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("kornia", "sklearn", "torchvision", "scipy", "PIL", "matplotlib")
    probe = f"import sys, metacal.data, metacal.evaluate; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_digits_are_sklearns_divided_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape == (1438, 1, 8, 8)
    assert sets.SHAPES["digits"] == (1, 8, 8)
    assert tuple(sets.SHAPES) == NAMES
    assert train.images.dtype == torch.float32
    assert (train.name, train.num_classes) == ("digits", 10)
    # every bundled image is in exactly one of the two, with its label
    bundled = load_digits()
    wanted = sorted((*image.ravel(), label) for image, label in zip(bundled.images, bundled.target, strict=True))
    got = sorted(
        (*image, label)
        for part in (train, test)
        for image, label in zip((part.images * 16).flatten(1).tolist(), part.labels.tolist(), strict=True)
    )
    assert got == wanted
    # stratified: a fifth of every class, to rounding
    assert (np.abs(test.labels.bincount().numpy() - np.bincount(bundled.target) / 5) <= 0.5).all()
    assert torch.equal(load("digits", "test").images, test.images)
    assert test.labels[:12].tolist() == [1, 2, 6, 0, 3, 6, 2, 5, 9, 9, 8, 1]  # published figures depend on this very split


def test_images_refuses_what_it_is_not() -> None:
    good, labels = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    for images, targets, classes, message in [
        (good[:, 0], labels, 2, r"`images` should be \[N, C, H, W\].*got \(2, 4, 4\).*unsqueeze"),
        (good.long(), labels, 2, "`images` should be .*uint8 or floating point"),
        (good + 2, labels, 2, r"`images` of floating point should lie in \[0, 1\]; got values from 2 to 2"),
        (good * math.nan, labels, 2, r"`images` of floating point should lie in \[0, 1\]; got values from nan"),
        (good, labels[:1], 2, r"`labels` should be int64 of shape \[2\]"),
        (good, labels.int(), 2, "`labels` should be int64.*labels.long"),
        (good, labels, 1, r"`labels` should lie in \[0, 1\), got values from 0 to 1"),
        (good, labels - 1, 2, "`labels` should lie in .* from -1 .*unlabelled"),
    ]:
        with pytest.raises(ValueError, match=message):
            Images(images, targets, "bad", num_classes=classes)


def test_select_and_batch() -> None:
    images = Images(torch.arange(0, 256, 51, dtype=torch.uint8).view(6, 1, 1, 1), torch.arange(6), "ramp", num_classes=6)
    assert images.select(torch.tensor([4, 1])).labels.tolist() == [4, 1]
    torch.testing.assert_close(images.batch(torch.tensor([5, 1])).flatten(), torch.tensor([1.0, 0.2]))
    assert to_float(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert images.to("cpu").labels.equal(images.labels)


def test_missing_files_name_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METACAL_DATA", raising=False)
    for name in NAMES[1:]:
        with pytest.raises(FileNotFoundError, match=r"`root`.*METACAL_DATA.*download=True"):
            load(name, "train")
        with pytest.raises(FileNotFoundError, match=f"{name}.*{re.escape(str(tmp_path))}.*METACAL_DATA.*download=True"):
            load(name, "train", root=tmp_path)
    monkeypatch.setenv("METACAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*METACAL_DATA"):
        load("mnist", "test")
    assert list(tmp_path.iterdir()) == []  # nothing is written where nothing was asked


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"`name` should be one of digits, mnist, .*got 'mnits'"):
        load("mnits", "train")
    with pytest.raises(ValueError, match=r"`split` should be .*got 'validation'.*split_validation"):
        load("digits", "validation")  # type: ignore[arg-type]


def test_omniglot_is_inverted_shrunk_and_numbered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extracted folders are enough, and labels follow the names, whatever order the file system lists them in."""
    for alphabet, character in [("Latin", "character02"), ("Greek", "character01"), ("Latin", "character01")]:
        folder = tmp_path / "omniglot-py" / "images_background" / alphabet / character
        folder.mkdir(parents=True)
        for drawing in range(3):
            paper = np.ones((105, 105), dtype=bool)
            paper[: 30 + drawing, :50] = False  # ink is 0
            Image.fromarray(paper).save(folder / f"{drawing}.png")
    listdir = os.listdir
    drawn = []
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda folder, order=order: order(listdir(folder)))
        drawn.append(load("omniglot", "train", root=tmp_path))
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert drawn[0].images.shape == (9, 1, 28, 28)
    assert drawn[0].labels.tolist() == drawn[1].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert drawn[0].num_classes == 3
    first = drawn[0].images[0, 0]
    assert first[0, 0] == 255  # strokes bright,
    assert first[-1, -1] == 0  # paper dark
    assert first.float().mean() / 255 == pytest.approx(30 * 50 / 105**2, rel=0.02)
    assert first.float().mean() < drawn[0].images[2].float().mean()  # drawings in the order of their names
    with pytest.raises(FileNotFoundError, match="omniglot"):
        load("omniglot", "test", root=tmp_path)  # only the background folder is there


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "sizes", "classes", "mean"),
    [  # mean pixel of the training set, as widely published for normalisation
        ("mnist", (60000, 10000), 10, (0.1307,)),
        ("fashion_mnist", (60000, 10000), 10, (0.2860,)),
        ("cifar10", (50000, 10000), 10, (0.4914, 0.4822, 0.4465)),
    ],
)
def test_real_files(name: str, sizes: tuple[int, int], classes: int, mean: tuple[float, ...]) -> None:
    train, test = load(name, "train"), load(name, "test")
    assert (len(train), len(test)) == sizes
    assert train.num_classes == test.num_classes == classes
    assert train.images.dtype == torch.uint8
    assert train.images.shape[1:] == sets.SHAPES[name] == (SHAPES[name][0], SHAPES[name][1], SHAPES[name][1])
    assert train.labels.bincount().tolist() == test.labels.bincount().mul(sizes[0] // sizes[1]).tolist() or name == "mnist"
    for channel, wanted in enumerate(mean):
        assert train.images[:, channel].double().mean() / 255 == pytest.approx(wanted, abs=1e-4)


@pytest.mark.data
@pytest.mark.slow
def test_real_omniglot() -> None:
    evaluation = load("omniglot", "test")
    assert evaluation.images.shape == (13180, 1, 28, 28)
    assert evaluation.num_classes == 659
    assert (evaluation.labels.bincount() == 20).all()
    assert 0.05 < evaluation.images.double().mean() / 255 < 0.12  # bright strokes on dark paper, thinner than MNIST's (0.13)
    parts = split_per_class(evaluation, (14, 3, 3), seed=0)
    assert [len(part) for part in parts] == [659 * 14, 659 * 3, 659 * 3]


# -------------------------------------------------------------------------------------------------------------- splits


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.05, 0.95), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_validation_split_is_a_stratified_partition(per_class: list[int], fraction: float, seed: int) -> None:
    images = noise(per_class)
    train, validation = split_validation(images, fraction, seed)
    assert sorted(identities(train) + identities(validation)) == sorted(identities(images))
    for count, held, rest in zip(
        per_class, validation.labels.bincount(minlength=len(per_class)), train.labels.bincount(minlength=len(per_class)), strict=True
    ):
        assert abs(int(held) - fraction * count) <= 1
        assert min(int(held), int(rest)) >= 1
    again, _ = split_validation(images, fraction, seed)
    assert identities(again) == identities(train)


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    images = noise([40, 40])
    state = torch.get_rng_state()
    first = identities(split_validation(images, 0.5, seed=0)[1])
    assert first != identities(split_validation(images, 0.5, seed=1)[1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert first == identities(split_validation(images, 0.5, seed=0)[1])


def test_split_per_class_draws_disjoint_parts_of_the_sizes_asked() -> None:
    images = noise([20, 20, 25])
    parts = split_per_class(images, (14, 3, 3), seed=0)
    for part, size in zip(parts, (14, 3, 3), strict=True):
        assert part.labels.bincount().tolist() == [size] * 3
    drawn = [identity for part in parts for identity in identities(part)]
    assert len(set(drawn)) == len(drawn) == 60
    assert [identities(p) for p in parts] == [identities(p) for p in split_per_class(images, (14, 3, 3), seed=0)]
    assert [identities(p) for p in parts] != [identities(p) for p in split_per_class(images, (14, 3, 3), seed=1)]


def test_splits_that_cannot_be_made() -> None:
    for fraction in (0.0, 1.0, -0.1, 20):
        with pytest.raises(ValueError, match="`fraction` should lie between 0 and 1"):
            split_validation(noise([5, 5]), fraction, seed=0)
    with pytest.raises(ValueError, match=r"at least 2 images of every class.*class 1 has 1"):
        split_validation(noise([5, 1]), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"`sizes` = \(4, 2\) needs 6 images per class; class 1 has 5"):
        split_per_class(noise([6, 5]), (4, 2), seed=0)
    with pytest.raises(ValueError, match="`sizes` should hold one positive number"):
        split_per_class(noise([6, 5]), (4, 0), seed=0)
    with pytest.raises(ValueError, match="`images` should not be empty"):
        split_validation(noise([2]).select(torch.tensor([], dtype=torch.long)), 0.5, seed=0)


# ------------------------------------------------------------------------------------------------------ order of batches


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_each_epoch_is_a_partition(batch_size: int, extra: int, seed: int, epoch: int) -> None:
    num_samples = batch_size + extra
    per_epoch = num_samples // batch_size
    batches = [batch_indices(epoch * per_epoch + i, batch_size, num_samples, seed) for i in range(per_epoch)]
    assert {len(batch) for batch in batches} == {batch_size}
    read = torch.cat(batches).tolist()
    assert len(set(read)) == len(read) == per_epoch * batch_size
    assert set(read) <= set(range(num_samples))


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    def read(steps: range, seed: int = 0) -> dict[int, list[int]]:
        return {step: batch_indices(step, 8, 50, seed).tolist() for step in steps}

    forwards = read(range(100))
    state = torch.get_rng_state()
    batch_indices(7, 8, 50, 0).zero_()  # what a caller does to its batch stays its own
    assert batch_indices(7, 8, 50, 0).tolist() == forwards[7]
    assert read(range(99, -1, -1)) == forwards
    assert torch.equal(torch.get_rng_state(), state)
    epochs = {tuple(forwards[step]) for step in range(0, 100, 6)}
    assert len(epochs) == 17  # a new permutation each epoch
    assert read(range(6, 12)) != {step: forwards[step - 6] for step in range(6, 12)}
    assert read(range(6), seed=1) != read(range(6))
    # the next seed's first epoch is not this one's second
    assert list(read(range(6), seed=1).values()) != list(read(range(6, 12), seed=0).values())
    assert forwards[50] == [26, 21, 12, 20, 27, 2, 45, 7]  # on every machine: a resumed run depends on it


def test_every_sample_is_read_equally_often() -> None:
    counts = torch.cat([batch_indices(step, 4, 10, seed=3) for step in range(2000)]).bincount()  # 1,000 epochs of 8 out of 10
    assert counts.sum() == 8000
    assert (counts - 800).abs().max() < 5 * math.sqrt(1000 * 0.8 * 0.2)


def test_batches_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="`batch_size` should be between 1 and `num_samples` = 5, got 6"):
        batch_indices(0, 6, 5, 0)
    with pytest.raises(ValueError, match="`batch_size`"):
        batch_indices(0, 0, 5, 0)
    for step, seed in [(-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match="`step` and `seed` should not be negative"):
            batch_indices(step, 1, 5, seed)


# -------------------------------------------------------------------------------------------------------- augmentation

EACH_FIELD = {
    "crop": Augmentation(crop=(0.3, 0.6)),
    "degrees": Augmentation(degrees=30),
    "translate": Augmentation(translate=0.3),
    "zoom": Augmentation(zoom=(0.5, 0.8)),
    "brightness": Augmentation(brightness=0.5, jitter=1),
    "contrast": Augmentation(contrast=0.5, jitter=1),
    "flip": Augmentation(flip=0.5),
    "blur": Augmentation(blur=0.5),
}
EACH_COLOUR_FIELD = {
    **EACH_FIELD,
    "saturation": Augmentation(saturation=0.5, jitter=1),
    "hue": Augmentation(hue=0.3, jitter=1),
    "grayscale": Augmentation(grayscale=0.5),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_defaults_keep_shape_dtype_and_range(name: str) -> None:
    channels, size = SHAPES[name]
    augment = augmenter(name, size, channels)
    for x in (torch.rand(16, channels, size, size), torch.ones(3, channels, size, size), torch.rand(1, channels, size, size).double()):
        y = augment(x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert y.min() >= 0
        assert y.max() <= 1
        assert not torch.equal(x, y)


@pytest.mark.parametrize(("channels", "field"), [(1, f) for f in EACH_FIELD] + [(3, f) for f in EACH_COLOUR_FIELD])
def test_each_sample_draws_for_itself(channels: int, field: str) -> None:
    """Equal images in one batch become different ones, by each transformation alone."""
    x = torch.rand(1, channels, 12, 12).expand(32, -1, -1, -1)
    distinct = augmenter(EACH_COLOUR_FIELD[field], 12, channels)(x).flatten(1).unique(dim=0)
    assert len(distinct) == (2 if field in ("flip", "grayscale") else pytest.approx(32 if field != "blur" else 16, abs=10))


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_do_not_mix(channels: int) -> None:
    """The contrast of an even image is that image, whatever else the batch holds."""
    x = torch.linspace(0, 1, 7).view(7, 1, 1, 1).expand(-1, channels, 8, 8)
    torch.testing.assert_close(augmenter(EACH_FIELD["contrast"], 8, channels)(x), x)
    # and no picture leaks into a blank neighbour
    x = torch.zeros(2, channels, 8, 8)
    x[0] = 1
    augment = augmenter(
        Augmentation(crop=(0.3, 1), degrees=20, translate=0.1, brightness=0.4, contrast=0.4, flip=0.5, blur=0.5), 8, channels
    )
    for _ in range(10):
        assert augment(x)[1].abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_are_the_factors_they_say(channels: int) -> None:
    x = 0.1 + 0.5 * torch.rand(256, channels, 8, 8)
    factor = (augmenter(Augmentation(brightness=0.4, jitter=1), 8, channels)(x) / x).flatten(1)
    torch.testing.assert_close(factor.amin(1), factor.amax(1), rtol=1e-4, atol=1e-5)
    factor = factor[:, 0]
    assert 0.6 <= factor.min() < 0.65
    assert 1.35 < factor.max() <= 1.4

    x = 0.4 + 0.2 * torch.rand(256, 1, 8, 8).expand(-1, channels, -1, -1)
    y = augmenter(Augmentation(contrast=0.4, jitter=1), 8, channels)(x)
    torch.testing.assert_close(y.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0, atol=1e-3)  # kornia's grey weights add up to 0.9999
    factor = y.std((1, 2, 3)) / x.std((1, 2, 3))
    assert 0.59 <= factor.min() < 0.65
    assert 1.35 < factor.max() <= 1.41

    untouched = (augmenter(Augmentation(brightness=0.4, contrast=0.4, jitter=0.25), 8, channels)(x) == x).flatten(1).all(1)
    assert 0.6 < untouched.double().mean() < 0.9


def test_affine_moves_what_it_should() -> None:
    x = torch.zeros(64, 1, 17, 17)
    x[:, :, 8, 8] = 1
    turned = augmenter(Augmentation(degrees=90), 17, 1)(x)
    torch.testing.assert_close(turned[:, :, 8, 8], torch.ones(64, 1))  # the centre stays
    assert turned.sum((1, 2, 3)).max() < 1.4
    assert augmenter(Augmentation(translate=0.25), 17, 1)(x)[:, 0].flatten(1).argmax(1).unique().numel() > 30
    ones = torch.ones(64, 1, 16, 16)
    share = augmenter(Augmentation(zoom=(0.5, 0.5)), 16, 1)(ones).mean((1, 2, 3))
    torch.testing.assert_close(share, torch.full((64,), 0.25), atol=0.05, rtol=0)
    inside = augmenter(Augmentation(crop=(0.2, 1.0)), 16, 1)(ones)
    torch.testing.assert_close(inside, ones)  # a crop shows nothing from outside


def test_no_flip_unless_asked() -> None:
    assert all(AUGMENTATIONS[name].flip == 0 for name in ("digits", "mnist", "omniglot"))
    x = torch.rand(8, 1, 6, 6)
    assert torch.equal(augmenter(Augmentation(), 6, 1)(x), x)
    assert torch.equal(augmenter(Augmentation(flip=1), 6, 1)(x), x.flip(-1))


def test_rounding_does_not_leave_the_range() -> None:
    assert augmenter(Augmentation(blur=1), 28, 1)(torch.ones(64, 1, 28, 28)).max() <= 1  # a kernel's weights may add up to 1 + 2e-7


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_draws_come_from_torchs_default_generator_alone(name: str) -> None:
    channels, size = SHAPES[name]
    augment, x = augmenter(name, size, channels), torch.rand(16, channels, size, size)
    before_python, before_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.manual_seed(3)
    first, after = augment(x), torch.get_rng_state()
    other = augment(x)
    assert random.getstate() == before_python
    assert np.array_equal(np.random.get_state()[1], before_numpy[1])  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(3)
    assert torch.equal(augmenter(name, size, channels)(x), first)  # nothing hidden in the object: a new one draws the same
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(first, other)


def test_the_input_is_left_alone() -> None:
    x = torch.rand(8, 3, 32, 32)
    copy = x.clone()
    augmenter("cifar10", 32, 3)(x)
    assert torch.equal(x, copy)


def test_views_keep_a_samples_views_together() -> None:
    x = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    calls = []

    def record(flat: torch.Tensor) -> torch.Tensor:
        calls.append(flat.shape)
        return flat

    out = views(x, record, 3)
    assert calls == [(15, 1, 8, 8)]  # augmented in one call
    assert torch.equal(out, x.unsqueeze(1).expand(5, 3, 1, 8, 8))
    digits = load("digits", "test").images[:6]
    out = views(digits, augmenter("digits", 8, 1), 4)
    assert out.shape == (6, 4, 1, 8, 8)
    assert len(out.flatten(0, 1).flatten(1).unique(dim=0)) == 24
    with pytest.raises(ValueError, match="`num_views` should be at least 1, got 0"):
        views(x, record, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Augmentation(crop=(0.0, 1.0)), r"`crop` should be \(low, high\) with 0 < low <= high <= 1, got \(0.0, 1.0\)"),
        (lambda: Augmentation(crop=(0.5, 1.5)), "`crop` should be"),
        (lambda: Augmentation(zoom=(1.2, 0.8)), "`zoom` should be"),
        (lambda: Augmentation(flip=1.5), r"`flip` should lie in \[0, 1\], got 1.5"),
        (lambda: Augmentation(hue=0.6), r"`hue` should lie in \[0, 0.5\]"),
        (lambda: Augmentation(degrees=-1), r"`degrees` should lie in \[0, 180\]"),
        (lambda: augmenter("mnits", 28, 1), "`augmentation` should be an Augmentation or one of digits.*'mnits'"),
        (lambda: augmenter("digits", 8, 2), "`channels` should be 1 or 3, got 2"),
        (lambda: augmenter("cifar10", 32, 1), "leave colour alone for grey images; set saturation, hue, grayscale to 0"),
        (lambda: augmenter("digits", 8, 1)(torch.rand(2, 1, 28, 28)), r"`x` should be .*\[B, 1, 8, 8\], got \(2, 1, 28, 28\)"),
        (lambda: augmenter("digits", 8, 1)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), "got .*uint8.*to_float"),
    ],
)
def test_augmentations_that_cannot_be(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_augments_on_the_batchs_device(name: str) -> None:
    channels, size = SHAPES[name]
    augment, x = augmenter(name, size, channels), torch.rand(16, channels, size, size, device="cuda")
    torch.manual_seed(0)
    first = augment(x)
    torch.manual_seed(0)
    assert first.device.type == "cuda"
    assert torch.equal(augment(x), first)


# -------------------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize(("have", "want"), [(8, 28), (28, 8), (105, 28), (28, 32), (28, 28)])
def test_resize_agrees_with_pil(have: int, want: int) -> None:
    images = noise([4], size=have)
    pixels = (images.images * 255).round().to(torch.uint8)
    resized = resize(Images(pixels, images.labels, "noise", 1), want, 1).images
    for got, source in zip(resized, pixels, strict=True):
        pil = np.asarray(Image.fromarray(source[0].numpy()).resize((want, want), Image.Resampling.BILINEAR))
        assert np.abs(got[0].numpy().astype(int) - pil.astype(int)).max() <= 1
    assert resized.dtype == torch.uint8


def test_resize_changes_channels() -> None:
    colour, grey = noise([3, 3], channels=3), noise([3, 3])
    luma = resize(colour, 4, 1).images[:, 0]
    r, g, b = colour.images.unbind(1)
    torch.testing.assert_close(luma, 0.299 * r + 0.587 * g + 0.114 * b)
    assert torch.equal(resize(grey, 4, 3).images, grey.images.repeat(1, 3, 1, 1))
    both = resize(colour, 9, 1)
    assert both.images.shape == (6, 1, 9, 9)
    assert torch.equal(both.labels, colour.labels)
    assert (both.name, both.num_classes) == ("noise", 2)
    assert resize(grey, 4, 1) is grey
    with pytest.raises(ValueError, match="`channels` should be 1 as in the images, or 1 <-> 3; got 4"):
        resize(grey, 4, 4)
    with pytest.raises(ValueError, match="`size` should be at least 1"):
        resize(grey, 0, 1)
