"""Few-shot learners on Omniglot: accuracy after a stated budget, and tasks per second against a loop over tasks.

    METACAL_DATA=... python -m benchmarks.omniglot train --out runs/few_shot --learner maml --ways 5 --shots 1 --steps 8000
    METACAL_DATA=... python -m benchmarks.omniglot speed
    METACAL_DATA=... python -m benchmarks.omniglot table --out runs/few_shot

`train` can be stopped and repeated: it goes on from its newest checkpoint. Its `results.json` has the accuracy on 600 episodes of
the test characters, read once at the end; `--judge validation` uses characters held out of the training ones instead, to choose
settings. As in MAML's own code a query is normalised by its batch (transductive BatchNorm).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metacal
from benchmarks.measure import interleaved
from metacal import optim
from metacal._typing import Tree
from metacal.adjoints import Unrolled
from metacal.algorithms import few_shot
from metacal.algorithms.few_shot import MetaLearner
from metacal.bilevel import BilevelState
from metacal.data import Images, load
from metacal.data.episodes import Episodes
from metacal.evaluate import mean_interval
from metacal.train.loop import fit

QUERIES = 15  # per class, in the episodes that judge
VALIDATION_CLASSES = 100  # held out of the characters to train on
EPISODES = 600

Apply = Callable[[Tree, Tensor], Tensor]

LEARNERS: dict[str, Callable[..., MetaLearner]] = {
    "maml": few_shot.maml,
    "anil": partial(few_shot.anil, head=["13.weight", "13.bias"]),
    "meta_sgd": few_shot.meta_sgd,
    "fomaml": few_shot.first_order_maml,
    "reptile": few_shot.reptile,
    "imaml": partial(few_shot.imaml, strength=2.0),
}

UNROLLED = ("maml", "anil", "meta_sgd")


class Training(NamedTuple):
    """What a run keeps: the learner's state, and the CPU seconds that it took so far."""

    learner: BilevelState
    cpu_seconds: Tensor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="trains one learner and judges it")
    training.set_defaults(command=train)
    training.add_argument("--judge", choices=("validation", "test"), default="test")
    training.add_argument("--split", choices=("characters", "alphabets"), default="characters")
    training.add_argument("--judge-steps", type=int, default=None, help="inner steps on a new task; by default as many as in training")
    training.add_argument("--steps", type=int, default=8000)
    speed_ = commands.add_parser("speed", help="tasks per second, vmap against loop")
    speed_.set_defaults(command=speed, steps=1)
    table_ = commands.add_parser("table", help="the results of all runs in a folder, as Markdown")
    table_.set_defaults(command=table)
    for command in (training, table_):
        command.add_argument("--out", type=Path, default=Path("runs/few_shot"))
    for command in (training, speed_):
        command.add_argument("--learner", choices=list(LEARNERS), default="maml")
        command.add_argument("--ways", type=int, default=5)
        command.add_argument("--shots", type=int, default=1)
        command.add_argument("--queries", type=int, default=5, help="per class, while training")
        command.add_argument("--width", type=int, default=32, help="channels of each of the four layers")
        command.add_argument("--num-tasks", type=int, default=16, help="per outer step")
        command.add_argument("--inner-steps", type=int, default=1)
        command.add_argument("--inner-lr", type=float, default=0.4)
        command.add_argument("--lr", type=float, default=3e-3, help="of the outer Adam, which falls to 0 as a cosine")
        command.add_argument("--tasks", choices=("vmap", "loop"), default="vmap")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.command(args)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = args.out / f"{args.learner}-{args.ways}way-{args.shots}shot-{args.split}-seed{args.seed}"
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "out", "judge", "judge_steps")}
    _remember(settings, folder)
    meta, apply, params = build(args)
    parts = characters(args.split)
    drawn = Episodes(parts["train"], args.ways, args.shots, args.queries, rotations=True)

    def step(state: Training, t: int) -> tuple[Training, dict[str, Tensor]]:
        started = time.process_time()
        support, query = drawn.sample(t, args.num_tasks, args.seed)
        # Reptile has no query: it fits all the images of a task.
        moved, hg = meta.step(state.learner, query if args.learner == "reptile" else support, query)
        seconds = state.cpu_seconds + (time.process_time() - started)
        return Training(moved, seconds), {"query_loss": hg.value, "cpu_seconds": seconds}

    state = Training(meta.init(params), torch.zeros((), dtype=torch.float64))
    state = fit(step, state, args.steps, folder, checkpoint_every=250, resume=True)
    # The learner that adapts may take more steps on a new task than it was trained for, as MAML's authors do.
    adapting, _, _ = build(argparse.Namespace(**{**vars(args), "inner_steps": args.judge_steps or args.inner_steps}))
    accuracies = judge(args, adapting, apply, state.learner, parts[args.judge])
    mean, half = mean_interval(accuracies)
    results = {
        **settings,
        "judge": args.judge,
        "judge_steps": args.judge_steps,
        "accuracy": mean,
        "interval": half,
        "episodes": EPISODES,
        "cpu_minutes": float(state.cpu_seconds) / 60,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results, indent=2))


def _remember(settings: dict[str, Any], folder: Path) -> None:
    """A run goes on with the settings that it began with."""
    path, text = folder / "settings.json", json.dumps(settings, indent=2)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path} holds other settings. Repeat the run's own command, or name another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def characters(split: str) -> dict[str, Images]:
    """Omniglot's 1,623 characters as training, validation and test images, which share no character.

    "characters": 1,100, 100 and 423 drawn at random over all alphabets, as in the papers (Vinyals et al. 2016). "alphabets":
    864 and 100 of the background alphabets, 659 of the evaluation alphabets: harder, no test alphabet was ever seen.
    """
    background, evaluation = load("omniglot", "train"), load("omniglot", "test")
    if split == "alphabets":
        held_out = background.labels >= background.num_classes - VALIDATION_CLASSES
        return {
            "train": background.select((~held_out).nonzero()[:, 0]),
            "validation": background.select(held_out.nonzero()[:, 0]),
            "test": evaluation,
        }
    num_classes = background.num_classes + evaluation.num_classes
    labels = torch.cat([background.labels, background.num_classes + evaluation.labels])
    everything = Images(torch.cat([background.images, evaluation.images]), labels, "omniglot", num_classes)
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_classes))
    sizes = {"train": 1200 - VALIDATION_CLASSES, "validation": VALIDATION_CLASSES, "test": num_classes - 1200}
    chosen = order.split(list(sizes.values()))
    return {name: everything.select(torch.isin(labels, classes).nonzero()[:, 0]) for name, classes in zip(sizes, chosen, strict=True)}


def judge(args: argparse.Namespace, meta: MetaLearner, apply: Apply, state: BilevelState, images: Images) -> list[float]:
    """The accuracy on each of the episodes."""
    tasks = Episodes(images, args.ways, args.shots, QUERIES)
    found: list[float] = []
    for t in range(EPISODES // 20):
        support, query = tasks.sample(t, 20, seed=1)
        found += few_shot.accuracy(apply, meta.adapt(state, support), query).tolist()
    return found


def speed(args: argparse.Namespace) -> None:
    """Prints tasks per second of an outer step; the two take turns."""
    torch.set_num_threads(1)
    batch = Episodes(load("omniglot", "train"), args.ways, args.shots, args.queries).sample(0, args.num_tasks, args.seed)
    steps = {}
    for tasks in ("loop", "vmap"):
        meta, _, params = build(argparse.Namespace(**{**vars(args), "tasks": tasks}))
        steps[tasks] = partial(meta.step, meta.init(params), batch.support, batch.query)
    for step in steps.values():
        step()
    for tasks, seconds in interleaved(steps, rounds=7).items():
        print(f"{tasks}: {args.num_tasks / median(seconds):.0f} tasks per second")


def table(args: argparse.Namespace) -> None:
    lines = ["| learner | episodes of | accuracy, % | outer steps | CPU minutes | judged on |", "|" + " --- |" * 6]
    for path in sorted(args.out.glob("*/results.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        accuracy = f"{100 * r['accuracy']:.2f} ± {100 * r['interval']:.2f}"
        kind = f"{r['ways']} ways, {r['shots']} shot{'s' if r['shots'] > 1 else ''}"
        steps = f"{r['steps']} x {r['num_tasks']} tasks"
        lines.append(f"| {r['learner']} | {kind} | {accuracy} | {steps} | {r['cpu_minutes']:.0f} | {r['judge']} {r['split']} |")
    print("\n".join(lines))


def build(args: argparse.Namespace) -> tuple[MetaLearner, Apply, Tree]:
    """The learner of the command line, the network's function, and where it starts."""
    torch.manual_seed(args.seed)
    net = metacal.functional(conv4(args.width, args.ways), batch_norm="batch")
    options: dict[str, Any] = {"num_steps": args.inner_steps, "tasks": args.tasks}
    if args.learner in UNROLLED and args.tasks == "loop":
        options["adjoint"] = Unrolled(mode="graph")  # fastest where one step's graph is small; autograd's graph cannot be vmapped
    optimizer = optim.adam(optim.schedules.Cosine(args.lr, args.steps))
    meta = LEARNERS[args.learner](
        lambda w, batch: F.cross_entropy(net.apply(w, batch[0]), batch[1]), args.inner_lr, optimizer=optimizer, **options
    )
    return meta, net.apply, net.params


def conv4(width: int, ways: int) -> nn.Sequential:
    """MAML's network for Omniglot: four 3 x 3 convolutions of stride 2 with BatchNorm, then a linear layer.

    A module with torch's own initialisation, as a user has it; the pure functions of ``benchmarks.problems`` start otherwise.
    """

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU()]

    return nn.Sequential(*block(1), *block(width), *block(width), *block(width), nn.Flatten(), nn.Linear(4 * width, ways))


if __name__ == "__main__":
    main()
