"""Real image sets by name: scikit-learn's bundled digits, and torchvision's files under one root folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metacal.data.images import Images
from metacal.data.splits import stratified

_DIGITS_TEST_FRACTION = 0.2
_DIGITS_SEED = 0
_OMNIGLOT_SIZE = 28


def load(name: str, split: Literal["train", "test"], *, root: str | os.PathLike[str] | None = None, download: bool = False) -> Images:
    """Loads one split of a real image set into memory.

    ===============  ==================================  ======  ============  =======================
    name             train / test                        classes image         read with
    ===============  ==================================  ======  ============  =======================
    digits           1,438 / 359 (fixed, stratified)     10      1 x 8 x 8     scikit-learn (bundled)
    mnist            60,000 / 10,000                     10      1 x 28 x 28   torchvision
    fashion_mnist    60,000 / 10,000                     10      1 x 28 x 28   torchvision
    omniglot         19,280 / 13,180                     964/659 1 x 28 x 28   torchvision
    cifar10          50,000 / 10,000                     10      3 x 32 x 32   torchvision
    cifar100         50,000 / 10,000                     100     3 x 32 x 32   torchvision
    ===============  ==================================  ======  ============  =======================

    Omniglot's drawings are shrunk from 105 x 105 and inverted, so that strokes are bright as in MNIST; its "train" are the
    background alphabets, its "test" the evaluation alphabets: *other classes*, labelled from 0 again. To probe on it, divide
    one of the two with :func:`split_per_class`. Decoding its files takes about 7 s; the other sets take under 3 s.

    Args:
        name: one of the names above.
        split: "train" or "test".
        root: the folder that torchvision's data set classes read; by default the environment variable METACAL_DATA.
        download: fetch missing files from the set's public source into ``root``; never done unless asked.

    Errors:
        ValueError: an unknown ``name`` or ``split``.
        FileNotFoundError: the files are not under ``root``.

    >>> digits = load("digits", "train")
    >>> digits.images.shape, digits.num_classes
    (torch.Size([1438, 1, 8, 8]), 10)
    """
    if name not in NAMES:
        raise ValueError(f"`name` should be one of {', '.join(NAMES)}; got {name!r}.")
    if split not in ("train", "test"):
        raise ValueError(f'`split` should be "train" or "test", got {split!r}. Make a validation split with split_validation.')
    if name == "digits":
        return _digits(split == "train")
    folder = _root(name, root)
    try:
        images, labels = _READERS[name](folder, split == "train", download)
    except RuntimeError as error:  # torchvision's word for "not there" and for "damaged"
        if download:
            raise
        raise FileNotFoundError(
            f"The files of {name!r} are missing or damaged under `root` = {folder}. Set the environment variable METACAL_DATA "
            "(or `root`) to the folder that holds them, or pass download=True to fetch them there."
        ) from error
    return Images(images, labels, name, num_classes=int(labels.max()) + 1)


def _root(name: str, root: str | os.PathLike[str] | None) -> Path:
    where = root if root is not None else os.environ.get("METACAL_DATA")
    if not where:
        raise FileNotFoundError(
            f"`root`, the folder with the files of {name!r}, is not known. Set the environment variable METACAL_DATA (or pass "
            '`root`) to the folder that holds them, and add download=True to fetch them there. The set "digits" needs no files.'
        )
    return Path(where).expanduser()


def _digits(train: bool) -> Images:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float().div(16).unsqueeze(1)  # pixels are counts from 0 to 16
    labels = torch.from_numpy(bundled.target).long()
    rest, test = stratified(labels, _DIGITS_TEST_FRACTION, _DIGITS_SEED)
    return Images(images, labels, "digits", num_classes=10).select(rest if train else test)


def _mnist(kind: str) -> Callable[[Path, bool, bool], tuple[Tensor, Tensor]]:
    def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        files = getattr(torchvision.datasets, kind)(root, train=train, download=download)
        return files.data.unsqueeze(1), files.targets.long()

    return read


def _cifar(kind: str) -> Callable[[Path, bool, bool], tuple[Tensor, Tensor]]:
    def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        files = getattr(torchvision.datasets, kind)(root, train=train, download=download)
        return torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets)

    return read


def _omniglot(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    import numpy as np
    from PIL import Image
    from torchvision.datasets import Omniglot

    class Extracted(Omniglot):
        """torchvision checks the zip files' sums, even where only the folders that it reads were kept."""

        def _check_integrity(self) -> bool:
            return (Path(self.root) / self._get_target_folder()).is_dir() or super()._check_integrity()

    files: Any = Extracted(str(root), background=train, download=download)
    # torchvision lists folders in the file system's order: sort, so that labels and splits agree between machines.
    drawings = sorted((files._characters[character], drawing) for drawing, character in files._flat_character_images)
    number = {character: index for index, character in enumerate(sorted(files._characters))}
    images = np.empty((len(drawings), _OMNIGLOT_SIZE, _OMNIGLOT_SIZE), dtype=np.uint8)
    for row, (character, drawing) in enumerate(drawings):
        with Image.open(Path(files.target_folder, character, drawing)) as ink:
            shrunk = ink.convert("L").resize((_OMNIGLOT_SIZE, _OMNIGLOT_SIZE), Image.Resampling.BILINEAR)
        images[row] = 255 - np.asarray(shrunk)
    return torch.from_numpy(images).unsqueeze(1), torch.tensor([number[character] for character, _ in drawings])


_READERS: dict[str, Any] = {
    "mnist": _mnist("MNIST"),
    "fashion_mnist": _mnist("FashionMNIST"),
    "omniglot": _omniglot,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
}

SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "omniglot": (1, _OMNIGLOT_SIZE, _OMNIGLOT_SIZE),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
}
"""The shape [C, H, W] of each set's images, known before they are read."""

SetName = Literal["digits", "mnist", "fashion_mnist", "omniglot", "cifar10", "cifar100"]
NAMES: tuple[str, ...] = get_args(SetName)
"""The names that :func:`load` knows."""
