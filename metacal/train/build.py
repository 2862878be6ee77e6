"""The networks, the problem and the training method of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metacal import optim, tree
from metacal._typing import Tree
from metacal.nets import ConvEncoder, ResNet18, ViT
from metacal.tc2 import (
    Identity,
    Method,
    MethodState,
    Network,
    PerTask,
    Problem,
    base,
    literal,
    lookahead,
    network,
    paper,
    pcgrad,
    project_conflicts,
    stable,
    upgrad,
)
from metacal.train.config import Augmentations, Clusters, Config, Domains, NetworkConfig, Objectives
from metacal.train.environment import resolve_device


def build(config: Config, channels: int, adapt: Callable[[Network], Network] = lambda net: net) -> tuple[Problem, Method]:
    """The problem and the training method of a configuration; draws the networks from torch's default generator.

    ``adapt`` may wrap the network's functions before anything is built on them.
    """
    c, t = config.tc2, config.train
    n = config.network
    objective = PerTask(c.tasks.objectives) if isinstance(c.tasks, Objectives) else config.objective
    encoder = _encoder(n, channels)
    if t.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    net = network(encoder, objective, dim=n.dim, d=n.d, hidden=n.hidden, norm="batch" if n.norm == "shared" else n.norm)
    net = net._replace(params=tree.to(net.params, resolve_device(config.device)))
    if t.bf16:
        net = _in_bfloat16(net)
    net = adapt(net)
    problem = Problem(
        net,
        objective,
        c.calibrator if c.reading in ("paper", "lookahead") else Identity(),
        c.where,
        c.num_tasks,
        c.split_by,
        t.momentum,
        # Domains and augmentations are made where images are drawn, task by task.
        deal="clusters" if isinstance(c.tasks, Clusters) else "given" if isinstance(c.tasks, Domains | Augmentations) else "random",
        statistics="batch" if n.norm == "shared" else "task",
    )
    return problem, training_method(config, problem)


_SURGERY: dict[str, Callable[[list[Tree]], Tree]] = {"split": tree.mean, "pcgrad": pcgrad, "upgrad": upgrad}


def training_method(config: Config, problem: Problem) -> Method:
    """How a configuration trains a problem."""
    c = config.tc2
    outer, calibrator_outer = optim.adam(config.train.lr), optim.adam(c.calibrator_lr)
    calibration = stable(c.lambda_s, c.lambda_1) if c.form == "stable" else literal(c.lambda_s)
    if c.reading in ("base", "matched"):
        return base(problem, outer)
    if c.reading in _SURGERY:
        return project_conflicts(problem, outer, _SURGERY[c.reading])
    if c.reading == "lookahead":
        stages: dict[str, Any] = {"calibration": calibration, "encoder_stage": c.encoder_stage, "warmup": c.warmup}
        return lookahead(problem, outer, calibrator_outer, **stages)
    return paper(
        problem,
        outer,
        calibrator_outer,
        calibration=calibration,
        calibrator_stage=c.calibrator_stage,
        encoder_stage=c.encoder_stage,
        pairing=c.pairing,
        warmup=c.warmup,
        tasks=c.run_tasks,
    )


def initial_state(config: Config, method: Method) -> MethodState:
    """The state before the first iteration, on the configuration's device."""
    state = method.init()
    return tree.to(state, resolve_device(config.device))._replace(step=state.step)


def _encoder(n: NetworkConfig, channels: int) -> nn.Module:
    if n.encoder == "conv":
        return ConvEncoder(channels, n.width, n.dim, stem_stride=n.stem_stride)
    if n.encoder == "vit":
        return ViT(channels, dim=n.dim, depth=n.depth)
    if n.dim != ResNet18.dim:
        raise ValueError(f"`network.dim` should be {ResNet18.dim} for the encoder resnet18, got {n.dim}.")
    return ResNet18(channels)


def _in_bfloat16(net: Network) -> Network:
    """The encoder in bfloat16, the heads as they are: they cost little, and normalise.

    By casts and not torch.autocast, under which GroupNorm has no forward-mode derivative, nor BatchNorm any under vmap.
    """

    def encode(theta: Tree, x: Tensor) -> Tensor:
        return net.encode(tree.to({"encoder": theta["encoder"]}, torch.bfloat16), x.bfloat16()).to(x.dtype)

    return net._replace(encode=encode)
