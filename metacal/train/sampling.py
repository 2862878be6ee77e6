"""The images of a run: which ones it trains on and is watched on, and the views of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metacal.data import Augmentation, Images, augmenter, batch_indices, load, resize, split_validation, views
from metacal.data.augment import families
from metacal.data.sets import SHAPES
from metacal.evaluate.parts import at_most, parts
from metacal.tasks import task_size
from metacal.train.config import Augmentations, Config, Domains


def training_images(config: Config) -> Images:
    """The images to pretrain on: the training part without what is held out for validation."""
    images = load(config.data.name, "train", root=config.data.root, download=config.data.download)
    return split_validation(images, config.data.validation, seed=0)[0] if config.data.validation else images


def trained_on(config: Config) -> tuple[str, ...]:
    """The data sets that the images of a run come from."""
    kind = config.tc2.tasks
    return kind.sets if isinstance(kind, Domains) and kind.sets else (config.data.name,)


def image_channels(config: Config) -> int:
    """Channels of the images that the encoder was built for."""
    return SHAPES[config.data.name][0]


def image_size(config: Config) -> int:
    """Side of the images that the encoder was built for, in pixels."""
    return SHAPES[config.data.name][-1]


def watched_images(config: Config) -> Images:
    """Some of the images that ``metacal evaluate --split validation`` judges on, in the form that the encoder takes."""
    data = config.data
    validation = parts(data.name, "validation", data.root, data.download)[1]
    return resize(at_most(validation, config.evaluate.online, "evaluate.online"), image_size(config), image_channels(config))


def sampler(config: Config, images: Images) -> Callable[..., Tensor]:
    """``sample(t)``: the views [N, m, C, H, W] of iteration t, where tasks are made of the data n of each, task by task."""
    K, kind = config.tc2.num_tasks, config.tc2.tasks
    n = task_size(config.train.batch_size, K)
    domains = _domains(config, images) if isinstance(kind, Domains) else [images]
    chosen: list[str | Augmentation] = [config.data.augmentation or config.data.name]
    if isinstance(kind, Augmentations):
        chosen = list(kind.families or families(images.images.shape[1]))
        _check_one_per_task("families", len(chosen), K)
    augments = [augmenter(augmentation, images.images.shape[-1], images.images.shape[1]) for augmentation in chosen]
    size = n if isinstance(kind, Domains) else config.train.batch_size

    def read(domain: Images, t: int) -> Tensor:
        return domain.batch(batch_indices(t, size, len(domain), config.seed).to(domain.images.device))

    def sample(t: int, num_views: int = config.tc2.num_views) -> Tensor:
        x = _joined([read(domain, t) for domain in domains])
        blocks = x.chunk(len(augments))
        return _joined([views(block, augment, num_views) for block, augment in zip(blocks, augments, strict=True)])

    return sample


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _domains(config: Config, images: Images) -> list[Images]:
    """The images of each task: groups of classes, or data sets in the form of ``images``."""
    kind, K = config.tc2.tasks, config.tc2.num_tasks
    assert isinstance(kind, Domains)
    if kind.sets:
        _check_one_per_task("sets", len(kind.sets), K)
        size, channels = images.images.shape[-1], images.images.shape[1]
        others = [training_images(replace(config, data=replace(config.data, name=name))) for name in kind.sets]
        return [resize(other, size, channels).to(images.images.device) for other in others]
    groups = kind.classes or tuple(tuple(run.tolist()) for run in images.labels.unique().tensor_split(K))
    _check_one_per_task("classes", len(groups), K)
    found = [images.select(torch.isin(images.labels, torch.tensor(group, device=images.labels.device))) for group in groups]
    for group, domain in zip(groups, found, strict=True):
        if len(domain) < config.train.batch_size // K:
            raise ValueError(
                f"`classes` should hold groups of at least n = {config.train.batch_size // K} training images, one task of a batch; "
                f"{list(group)} has {len(domain)}. Take a smaller batch, fewer tasks or larger groups."
            )
    return found


def _check_one_per_task(name: str, number: int, K: int) -> None:
    if number != K:
        raise ValueError(f"`{name}` should be one for each of the K = {K} tasks, got {number}. Set tc2.num_tasks to {number}.")
