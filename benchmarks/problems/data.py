"""Real data as batches of float32; where a set is not at hand, scikit-learn's digits stand in, and the name says so."""

from __future__ import annotations

import os
import pydoc_data.topics
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Size
from metacal.data import Images, load

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "omniglot": "Omniglot", "digits": "digits"}
NUM_TEST: dict[Size, int] = {"tiny": 100, "small": 2000, "full": 10_000}
"""Images to judge at the end."""


class Split(NamedTuple):
    """Three disjoint parts of a labelled set: inputs and labels, to train on, to judge while training, and to judge at the end."""

    title: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def images(name: str, split: Literal["train", "test"]) -> Images:
    """The set called ``name`` if METACAL_DATA has it, else digits."""
    try:
        return load(name, split)
    except FileNotFoundError:
        return load("digits", split)


def image_split(name: str, num_train: int, num_validation: int, num_test: int, *, flat: bool = True, seed: int = 0) -> Split:
    """Random parts of a set of images in [0, 1]; fewer where there are not so many."""
    pool, test = images(name, "train"), images(name, "test")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    num_validation = min(num_validation, len(pool) // 2)
    chosen = order[:num_validation], order[num_validation : num_validation + num_train], torch.arange(min(num_test, len(test)))

    def part(source: Images, where: Tensor) -> tuple[Tensor, Tensor]:
        x = source.batch(where)
        return (x.flatten(1) if flat else x), source.labels[where]

    return Split(TITLES[pool.name], part(pool, chosen[1]), part(pool, chosen[0]), part(test, chosen[2]))


@cache
def newsgroups(num_features: int, num_documents: int) -> Split:
    """20 newsgroups as tf-idf of the most frequent words, each column scaled to unit mean square; digits where it is not at hand."""
    folder = Path(os.environ.get("METACAL_DATA", "")) / "20newsgroups"
    if not os.environ.get("METACAL_DATA") or not folder.is_dir():
        return image_split("digits", num_documents, num_documents // 2, 300)
    from sklearn.datasets import fetch_20newsgroups
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = {s: fetch_20newsgroups(data_home=str(folder), subset=s, download_if_missing=False, random_state=0) for s in ("train", "test")}
    first, last = texts["train"], texts["test"]
    words = TfidfVectorizer(max_features=num_features, stop_words="english")
    total = num_documents + num_documents // 2
    x = torch.from_numpy(words.fit_transform(first.data[:total]).toarray()).float()
    held_out = torch.from_numpy(words.transform(last.data[: num_documents // 2]).toarray()).float()
    scale = x.square().mean(0).sqrt().clamp_min(1e-8)
    y, y_out = (torch.from_numpy(t.target).long() for t in (first, last))
    n = num_documents
    return Split(
        "20 newsgroups", (x[:n] / scale, y[:n]), (x[n:] / scale, y[n:total]), (held_out / scale, y_out[: num_documents // 2])
    )  # fmt: skip


def prose() -> bytes:
    """Python's own reference manual, as it comes with every Python."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode("ascii", "ignore")


def code() -> bytes:
    """Sources of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / name for name in ("argparse.py", "ast.py", "dataclasses.py", "decimal.py", "inspect.py", "typing.py")]
    return b"\n".join(file.read_bytes() for file in files if file.is_file()).decode("utf-8").encode("ascii", "ignore")
