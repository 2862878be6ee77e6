"""The two stages of TC², each as the problem that it solves, and its whole step beside a step without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Problem, Rule, Size
from benchmarks.problems import data
from metacal import nets, optim, tree
from metacal import tc2 as library
from metacal._typing import Tree
from metacal.objectives import SimCLR


class Dimensions(NamedTuple):
    width: int
    d: int
    samples: int
    num_steps: int


DIMENSIONS: dict[Size, Dimensions] = {
    "tiny": Dimensions(8, 6, 16, 2), "small": Dimensions(16, 32, 32, 2), "full": Dimensions(32, 64, 128, 5),
}  # fmt: skip
VIEWS, TASKS = 4, 4


def ssl_problem(size: Size) -> tuple[library.Problem, Tensor]:
    """SimCLR on a small convolutional encoder with TC²'s calibrator, and views [N, m, 1, H, W]."""
    dims = DIMENSIONS[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = library.network(nets.ConvEncoder(width=dims.width, dim=dims.d), SimCLR(), dim=dims.d, d=dims.d, hidden=2 * dims.d)
    images = data.images("digits" if size == "tiny" else "fashion_mnist", "train").batch(torch.arange(dims.samples))
    noise = torch.randn(dims.samples, VIEWS, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    problem = library.Problem(net, SimCLR(), library.Networks(n_f=dims.d // 2), num_tasks=TASKS, deal="given")
    return problem, images[:, None] + 0.2 * noise


def calibrator_stage(size: Size) -> Problem:
    """Stage 1: the calibrator's initialisation, judged after its own steps; on representations."""
    problem, batch, phi, theta = _start(size)
    calibration = library.stable()
    r_s, r_q = (problem.represent_tasks(theta, side.x).detach() for side in (batch.support, batch.query))
    Z = problem.pooled(r_s, r_q)
    whole, start = _flat(phi)

    def objective(w: Tree, h: Tree, given: tuple[Tensor, Tensor]) -> Tensor:
        r, Z = given
        phi = whole({name: h[name] + w[name] for name in h})
        V = problem.calibrator.factors(phi, Z)
        losses = [problem.loss_of({}, phi, V, library.Views(task)) for task in r]
        return torch.stack(losses).mean() + calibration(Z, V, problem.calibrator.weights(phi, Z, V))[0]

    zero, steps = tree.zeros_like(start), [(r_s, Z)] * DIMENSIONS[size].num_steps
    return Problem("TC², calibrator stage", objective, objective, zero, start, steps, (r_q, Z), Rule("sgd", 0.01), step_size=0.01)


def encoder_stage(size: Size) -> Problem:
    """Stage 2 for one task: the encoder's initialisation, judged on the task's query after steps on its support."""
    problem, batch, phi, theta = _start(size)
    r = (problem.represent_tasks(theta, side.x) for side in (batch.support, batch.query))
    V = problem.calibrator.factors(phi, problem.pooled(*r)).detach()
    whole, start = _flat(theta)

    def loss(w: Tree, h: Tree, given: tuple[Tensor, Tensor, Tree]) -> Tensor:
        x, V, phi = given
        return problem.loss(whole({name: h[name] + w[name] for name in h}), phi, V, library.Views(x))

    support, query = ((side.x[0], V, phi) for side in (batch.support, batch.query))
    zero, steps = tree.zeros_like(start), [support] * DIMENSIONS[size].num_steps
    return Problem("TC², encoder stage", loss, loss, zero, start, steps, query, Rule("sgd", 0.05), step_size=0.01)


def steps(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A training step of the SSL objective alone, and one of TC², with as many views; each call takes it from the start.

    Where images are few and channels narrow, TC²'s many small kernels cost more than what they compute: in the small suite too the
    step is that of the full size.
    """
    problem, views = ssl_problem("tiny" if size == "tiny" else "full")
    problem = library.Problem(
        problem.network._replace(params=tree.to(problem.network.params, device)), problem.objective, problem.calibrator,
        num_tasks=TASKS, deal="given",
    )  # fmt: skip
    views, optimizer = views.to(device), optim.sgd(0.05, momentum=0.9)
    methods = {"base": library.base(problem, optimizer), "TC²": library.paper(problem, optimizer, optim.adam(1e-3))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        states = {name: method.init() for name, method in methods.items()}
    return {name: partial(method.step, states[name], views) for name, method in methods.items()}


def _start(size: Size) -> tuple[library.Problem, Any, Tree, Tree]:
    problem, views = ssl_problem(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        phi = problem.calibrator.init(problem.d)
    return problem, problem.batch(views, ()), phi, problem.network.params


def _flat(like: Tree) -> tuple[Callable[[Tree], Tree], Tree]:
    """A tree as a flat dict by dotted names, and the way back."""
    names, structure = tree.paths(like), tree.structure(like)
    return lambda flat: tree.unflatten(structure, [flat[name] for name in names]), tree.state_dict(like)
