"""The settings of a run, as typed values: what `metacal pretrain --help` shows and a run's config.yaml holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, final

from metacal.data import Augmentation
from metacal.data.sets import SetName
from metacal.evaluate.assess import Score
from metacal.objectives import SimCLR, SSLObjective
from metacal.tc2 import Calibrator, Networks, Stage

Reading = Literal["base", "matched", "split", "tasks", "paper", "lookahead", "pcgrad", "upgrad"]


def _at_least(least: int, section: str, settings: Any, *names: str) -> None:
    """Raises ValueError for a setting below ``least``; None is none."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` should be at least {least}, got {value}. Change the setting {section}.{name}.")


class Tasks:
    """What a task is: one of the classes below. All make K tasks of the same number of samples, batch_size / num_tasks."""


@final
@dataclass(frozen=True)
class Random(Tasks):
    """Every batch is dealt at random [S]. The tasks are i.i.d.: their conflict is largely sampling noise."""


@final
@dataclass(frozen=True)
class Clusters(Tasks):
    """Balanced clusters of the current encoder's outputs [O]; costs the encoder one more view of every image."""


@final
@dataclass(frozen=True)
class Domains(Tasks):
    """One group of classes, or one data set, for each task [O]. Groups read the labels, so this is a study of tasks and no SSL method.

    Every domain is read in an order of its own; the smaller ones come round more often.

    Args:
        classes: labels of each task; by default all classes in K runs of as equal a length as possible.
        sets: data sets of each task instead, brought to the size and channels of `data.name`.
    """

    classes: tuple[tuple[int, ...], ...] = ()
    sets: tuple[SetName, ...] = ()

    def __post_init__(self) -> None:
        if self.classes and self.sets:
            raise ValueError("`classes` and `sets` both say what a domain is: pass one of the two.")


@final
@dataclass(frozen=True)
class Augmentations(Tasks):
    """One family of augmentations for each task, in place of the data set's [O].

    Args:
        families: one for each task; by default the four of :func:`metacal.data.augment.families`.
    """

    families: tuple[Augmentation, ...] = ()


@final
@dataclass(frozen=True)
class Objectives(Tasks):
    """Another SSL objective for each task, on one network, in place of `objective`; the batch is dealt at random [O].

    Args:
        objectives: one for each task. Their losses are averaged as they are: bring them to one scale by their own weights.
    """

    objectives: tuple[SSLObjective, ...]


@dataclass(frozen=True)
class DataConfig:
    """The images to pretrain on.

    Args:
        name: a data set; "digits" comes with scikit-learn, the others are read from `root`.
        root: folder of the data sets; by default the environment variable METACAL_DATA.
        download: fetch missing files into `root`.
        augmentation: random views; by default the one that fits the data set.
        validation: share of the training images, stratified, that is kept for choosing settings; from 0 (none), below 1.
    """

    name: SetName = "digits"
    root: str | None = None
    download: bool = False
    augmentation: Augmentation | None = None
    validation: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(
                f"`validation` should be a share from 0 to below 1, got {self.validation}. For a tenth set data.validation to 0.1, for "
                "none to 0."
            )


@dataclass(frozen=True)
class NetworkConfig:
    """The encoder, and MLP heads.

    Args:
        encoder: "conv" (three layers, GroupNorm), "resnet18" (CIFAR stem, BatchNorm by the statistics of the batch) or "vit"
            (4 x 4 patches, 3 heads).
        width: channels of conv's first layer, a multiple of 8.
        dim: size of the representation that downstream users get; 512 for resnet18, a multiple of 12 for vit (192 is ViT-Tiny's).
        stem_stride: conv's first stride; 1 for 8 x 8 images.
        depth: blocks of vit.
        d: size of the projection, which a masked autoencoder does not have.
        hidden: width of the heads; of a decoder too, then a multiple of 4.
        norm: of the heads' hidden layers: "batch" (statistics of the task at hand), "shared" (statistics of all tasks of the batch),
            "layer" (no statistics of other samples: GroupNorm with one group) or null.
    """

    encoder: Literal["conv", "resnet18", "vit"] = "conv"
    width: int = 32
    dim: int = 64
    stem_stride: int = 1
    depth: int = 12
    d: int = 64
    hidden: int = 128
    norm: Literal["layer", "batch", "shared"] | None = "batch"


@dataclass(frozen=True)
class TC2Config:
    """Task conflict calibration and its controls.

    Args:
        reading: "paper" and "lookahead" are TC² in its two readings; "base" is the SSL objective on the whole batch,
            "matched" the same for as many iterations as cost what "paper" costs, "tasks" splits into tasks without calibration,
            "pcgrad" and "upgrad" project conflicting gradients instead, "split" takes the mean of the tasks' gradients as it is.
        budget: what "matched" matches: encoder passes, or seconds as a short run of both measures them before training.
        num_tasks: K; the batch size should be divisible by it.
        tasks: what a task is: Random, Clusters, Domains, Augmentations or Objectives, with their settings.
        num_views: views per image; half of them are support, half query.
        split_by: support and query are views of the same samples, or different samples (2 views are then enough).
        calibrator: Networks (learned), PCA (closed form) or Identity, with their settings.
        where: calibrate the projector's or the encoder's output.
        pairing: which tasks' query losses judge an adapted encoder: own, cross, all or cyclic.
        form: of the calibration loss; "stable" is squared and normalised, "literal" as reported.
        lambda_s: weight of the per-sample terms.
        lambda_1: weight of sparsity within them (stable form).
        calibrator_lr: outer learning rate of the calibrator (Adam).
        calibrator_stage: the inner run of stage 1.
        encoder_stage: the inner run of stage 2, and of "lookahead".
        warmup: iterations at the start without calibration.
        run_tasks: stage 2's tasks in a loop or under vmap.
    """

    reading: Reading = "paper"
    budget: Literal["passes", "seconds"] = "passes"
    num_tasks: int = 4
    tasks: Tasks = field(default_factory=Random)
    num_views: int = 4
    split_by: Literal["views", "samples"] = "views"
    calibrator: Calibrator = field(default_factory=Networks)
    where: Literal["projector", "encoder"] = "projector"
    pairing: Literal["own", "cross", "all", "cyclic"] = "own"
    form: Literal["stable", "literal"] = "stable"
    lambda_s: float = 0.1
    lambda_1: float = 0.1
    calibrator_lr: float = 1e-3
    calibrator_stage: Stage = field(default_factory=lambda: Stage(lr=1e-2))
    encoder_stage: Stage = field(default_factory=lambda: Stage(lr=0.05))
    warmup: int = 0
    run_tasks: Literal["loop", "vmap"] = "loop"

    def __post_init__(self) -> None:
        _at_least(1, "tc2", self, "num_tasks", "num_views")
        _at_least(0, "tc2", self, "lambda_s", "lambda_1", "calibrator_lr", "warmup")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: iterations.
        batch_size: images per iteration, N.
        lr: outer learning rate of the network (Adam).
        momentum: of the EMA target network (BYOL, MoCo, DINO).
        bf16: run the encoder in bfloat16; its parameters, heads, losses and updates stay in float32.
        channels_last: keep convolutions' weights in the layout that is faster on a GPU.
        checkpoint_every: iterations between checkpoints.
        log_every: iterations between readings of the metrics.
        measure_every: iterations between measurements of conflict and transfer; 0 measures at the end only.
        measure_batches: batches whose mean the measurement after the last iteration is.
        threads: of torch on a CPU; null leaves torch's choice. Small images run no faster on more than one.
    """

    steps: int = 300
    batch_size: int = 256
    lr: float = 1e-3
    momentum: float = 0.99
    bf16: bool = False
    channels_last: bool = False
    checkpoint_every: int = 50
    log_every: int = 10
    measure_every: int = 50
    measure_batches: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "batch_size", "checkpoint_every", "log_every", "measure_batches", "threads")
        _at_least(0, "train", self, "steps", "lr", "momentum", "measure_every")
        if self.momentum > 1:
            raise ValueError(f"`momentum` should be at most 1, got {self.momentum}. Change the setting train.momentum.")


@dataclass(frozen=True)
class EvaluateConfig:
    """How a frozen encoder is judged.

    Args:
        data: data sets to judge on; by default the one that was pretrained on.
        split: "validation" for choosing settings, "test" for reporting, once.
        labels: training images with labels for the probe and the neighbours, at most; the same ones for every encoder.
        neighbours: k of the weighted kNN.
        scores: what is computed, see :func:`metacal.evaluate.assess`; all but cka, which compares two encoders.
        online: labelled images for scores logged while training, of the validation part and whenever conflict is measured; 0 logs none.
    """

    data: tuple[SetName, ...] = ()
    split: Literal["validation", "test"] = "test"
    labels: int = 4000
    neighbours: int = 20
    scores: tuple[Score, ...] = ("probe", "knn", "monitors")
    online: int = 0

    def __post_init__(self) -> None:
        _at_least(2, "evaluate", self, "labels")
        _at_least(1, "evaluate", self, "neighbours")
        _at_least(0, "evaluate", self, "online")
        if "cka" in self.scores:
            raise ValueError(
                "`scores` of a run (evaluate.scores) cannot be cka, which compares two. Afterwards: metacal evaluate --against."
            )


@dataclass(frozen=True)
class Config:
    """A run: what is trained, on what, how, and how it is judged.

    Args:
        seed: of everything that is drawn.
        device: "auto", "cpu" or "cuda".
    """

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: SSLObjective = field(default_factory=SimCLR)
    tc2: TC2Config = field(default_factory=TC2Config)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0
    device: str = "auto"
