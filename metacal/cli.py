"""The command line: `metacal demo`, `metacal pretrain`, `metacal evaluate`, `metacal report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from metacal.train.config import Config
    from metacal.train.settings import Parser

_DESCRIPTION = """Task conflict calibration (TC²) for self-supervised learning, on differentiable inner loops.

  metacal demo                                    TC² against its controls on bundled digits; writes report.html
  metacal pretrain tc2_fashion_mnist --seed 1     train by a packaged configuration (or a path to your own YAML file)
  metacal evaluate RUN --data mnist,omniglot      judge a run's frozen encoder on other data sets
  metacal report RUN [RUN ...]                    one HTML page about one or several runs

Any setting can be given after the configuration: --tc2.reading lookahead --objective VICReg --objective.variance 10
See `metacal pretrain --help` for all of them; `metacal pretrain tc2_digits --print_config` prints a complete file.
Data sets other than the bundled digits are read from the folder that METACAL_DATA names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from metacal.train.settings import find

    parser = _parser()
    if not given:
        parser.print_help()
        return 0
    if given[0] == "pretrain" and len(given) > 1 and not given[1].startswith("-"):
        given[1:2] = ["--config", str(find(given[1], parser))]
    parsed = parser.parse_args(given)
    command = parsed["subcommand"]
    commands = {"demo": _demo, "pretrain": _pretrain, "evaluate": _evaluate, "report": _report}
    try:
        commands[command](parser, parsed)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ArithmeticError, RuntimeError) as error:
        print(f"metacal {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"metacal {command}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    import argparse

    from metacal.train.settings import Parser, settings_parser

    parser = Parser(prog="metacal", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")

    demo = Parser(description="Trains base, base at TC²'s budget, tasks without calibration, and TC² on bundled digits.")
    demo.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    demo.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    demo.add_argument("--steps", type=int, default=200, help="iterations of TC²; the matched base takes more")
    demo.add_argument("--out", type=str, default="runs/demo", help="folder of the runs, made anew")
    demo.add_argument("--report", type=str, default="report.html", help="the page to write")
    commands.add_subcommand("demo", demo, help="the main job on an embedded data set")

    pretrain = settings_parser()
    pretrain.add_argument("--out", type=str | None, default=None, help="folder of the run; by default runs/DATA-READING-seedSEED")
    pretrain.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    pretrain.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    commands.add_subcommand("pretrain", pretrain, help="train an encoder and judge it")

    evaluate = Parser(description="Judges the frozen encoder of a run: linear probe and weighted neighbours.")
    evaluate.add_argument("run", type=str, help="folder of a run")
    evaluate.add_argument("--data", type=str, default=None, help="data sets, separated by commas; by default the run's own")
    evaluate.add_argument("--split", type=str, default="test", choices=["validation", "test"], help="validation to choose, test to report")
    evaluate.add_argument("--labels", type=int | None, default=None, help="training images with labels, at most; by default the run's own")
    commands.add_subcommand("evaluate", evaluate, help="judge a run on data sets")

    report = Parser(description="Writes one self-contained HTML page about one or several runs.")
    report.add_argument("run", type=str, nargs="+", help="folders of runs")
    report.add_argument("--out", type=str, default=None, help="the page to write; by default report.html in the first run's folder")
    commands.add_subcommand("report", report, help="a page about runs")
    return parser


def _demo(parser: Parser, parsed: Namespace) -> None:
    from metacal.demo import demo

    given = parsed["demo"]
    demo(seed=given["seed"], device=given["device"], steps=given["steps"], out=given["out"], page=given["report"])


def _pretrain(parser: Parser, parsed: Namespace) -> None:
    from metacal.train.experiment import pretrain
    from metacal.train.settings import as_config
    from metacal.train.summary import print_scores

    given = parsed["pretrain"]
    config = as_config(parser.instantiate(parsed)["pretrain"])
    folder = Path(given["out"] or f"runs/{config.data.name}-{config.tc2.reading}-seed{config.seed}")
    results = pretrain(config, folder, resume=given["resume"], progress=given["progress"])
    print_scores({str(folder): results["scores"]})


def _evaluate(parser: Parser, parsed: Namespace) -> None:
    from dataclasses import replace

    from metacal.train.experiment import judge, restore
    from metacal.train.summary import print_scores, read_results, write_scores

    given = parsed["evaluate"]
    folder = Path(given["run"])
    config = _run_config(folder)
    names = tuple(given["data"].split(",")) if given["data"] else ()
    labels = given["labels"] or config.evaluate.labels
    evaluate = replace(config.evaluate, data=names or config.evaluate.data, split=given["split"], labels=labels)
    scores = judge(config, restore(config, folder), evaluate)
    write_scores(folder, read_results(folder), scores, given["split"])
    print_scores({str(folder): scores})


def _report(parser: Parser, parsed: Namespace) -> None:
    from metacal.train import report
    from metacal.train.summary import summarise

    folders = [Path(run) for run in parsed["report"]["run"]]
    for folder in folders:
        _run_config(folder)
    out = Path(parsed["report"]["out"] or folders[0] / "report.html")
    names = [folder.resolve().name for folder in folders]
    named = {name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)}
    report.write(out, summarise(named))
    print(f"Wrote {out}")


def _run_config(folder: Path) -> Config:
    from metacal.train.settings import load_config

    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"`run` {folder} should be the folder of a run, which holds config.yaml. `metacal pretrain` makes one.")
    return load_config(path)
