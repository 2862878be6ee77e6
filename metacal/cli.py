"""The command line: `metacal demo`, `metacal pretrain`, `metacal evaluate`, `metacal report`, `metacal study`,
`metacal together`, `metacal methods`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metacal import _lifeline

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from metacal.evaluate import Encoder
    from metacal.train.config import Config
    from metacal.train.settings import Parser

_DESCRIPTION = """Task conflict calibration (TC²) for self-supervised learning, on differentiable inner loops.

  metacal demo                                    TC² against its controls on bundled digits; writes report.html
  metacal pretrain tc2_fashion_mnist --seed 1     train by a packaged configuration (or a path to your own YAML file)
  metacal evaluate RUN --data mnist,omniglot      judge a run's frozen encoder on other data sets (--scores all: every way)
  metacal report RUN [RUN ...]                    one HTML page about one or several runs
  metacal study STUDY.yaml                        a grid of runs over methods and seeds, with paired tests, as one page
  metacal together tc2_digits --seeds 1 2 3       several seeds of one configuration in one process, side by side
  metacal methods                                 every hypergradient method: what it estimates, its bias, cost and memory

Any setting can be given after the configuration: --tc2.reading lookahead --objective VICReg --objective.variance 10
See `metacal pretrain --help` for all of them; `metacal pretrain tc2_digits --print_config` prints a complete file.
Data sets other than the bundled digits are read from the folder that METACAL_DATA names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _lifeline.hold()
    from metacal.train.settings import find

    parser = _parser()
    if not given:
        parser.print_help()
        return 0
    if given[0] == "pretrain" and len(given) > 1 and not given[1].startswith("-"):
        given[1:2] = ["--config", str(find(given[1], parser))]
    parsed = parser.parse_args(given)
    command = parsed["subcommand"]
    commands = {
        "demo": _demo,
        "pretrain": _pretrain,
        "evaluate": _evaluate,
        "report": _report,
        "study": _study,
        "together": _together,
        "methods": _methods,
    }
    try:
        commands[command](parser, parsed)
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        print(f"metacal {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        again = "the same command" if command == "together" else "--resume"  # what Python's resume=True is called here
        print(f"metacal {command}: {str(stop).replace('resume=True', again) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    import argparse

    from metacal.evaluate import SCORES
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

    evaluate = Parser(
        description="Judges the encoder of a run: prints a table of scores and writes them, a map of the representation and the "
        "accuracy against the number of labels into the run's report."
    )
    evaluate.add_argument("run", type=str, help="folder of a run")
    evaluate.add_argument("--data", type=str, default=None, help="data sets, separated by commas; by default the run's own")
    evaluate.add_argument("--split", type=str, default="test", choices=["validation", "test"], help="validation to choose, test to report")
    evaluate.add_argument(
        "--labels", type=int | None, default=None, help="training images with labels, at most, if not the run's own number"
    )
    evaluate.add_argument("--scores", type=str, default="probe,knn,monitors", help=f"separated by commas, of {', '.join(SCORES)}, or all")
    evaluate.add_argument("--against", type=str | None, default=None, help="folder of the run whose encoder CKA compares with")
    evaluate.add_argument("--map", type=str, default="pca", choices=["pca", "tsne", "none"], help="what is drawn; none draws nothing")
    commands.add_subcommand("evaluate", evaluate, help="judge a run on data sets")

    report = Parser(description="Writes one self-contained HTML page about one or several runs.")
    report.add_argument("run", type=str, nargs="+", help="folders of runs")
    report.add_argument("--out", type=str, default=None, help="the page to write; by default report.html in the first run's folder")
    commands.add_subcommand("report", report, help="a page about runs")

    study = Parser(
        description="Runs a grid of runs, going on where it stopped, and writes study.html, .md, .png and runs.jsonl into its folder."
    )
    study.add_argument("file", type=str, help="the study's YAML file")
    study.add_argument("--out", type=str, default=None, help="folder of the runs; by default runs/NAME-OF-THE-FILE")
    study.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core")
    study.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    commands.add_subcommand("study", study, help="a grid of runs and what it shows")

    together = Parser(
        description="Trains one configuration with several seeds in one process, under vmap, and leaves a run's folder for each. Goes on "
        "where it stopped."
    )
    together.add_argument("settings", type=str, help="a packaged configuration's name, or the path of a YAML file")
    together.add_argument("--seeds", type=int, nargs="+", required=True, help="different numbers, each the seed of one run")
    together.add_argument("--out", type=str | None, default=None, help="folder of the folders seedS; by default runs/DATA-READING")
    together.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    commands.add_subcommand("together", together, help="several seeds of one configuration, trained together")

    methods = Parser(description="Prints the table of hypergradient methods, or writes it between the methods-table markers of pages.")
    methods.add_argument("--write", type=str, nargs="*", default=[], help="Markdown pages")
    commands.add_subcommand("methods", methods, help="the table of hypergradient methods")
    return parser


def _demo(parser: Parser, parsed: Namespace) -> None:
    from metacal.demo import demo

    given = parsed["demo"]
    demo(seed=given["seed"], device=given["device"], steps=given["steps"], out=given["out"], page=given["report"])


def _pretrain(parser: Parser, parsed: Namespace) -> None:
    from metacal.train.experiment import pretrain
    from metacal.train.results import scores_on
    from metacal.train.settings import as_config
    from metacal.train.summary import print_scores

    given = parsed["pretrain"]
    config = as_config(parser.instantiate(parsed)["pretrain"])
    folder = Path(given["out"] or f"runs/{config.data.name}-{config.tc2.reading}-seed{config.seed}")
    results = pretrain(config, folder, resume=given["resume"], progress=given["progress"])
    print_scores({str(folder): scores_on(results, config.evaluate.split)})


def _evaluate(parser: Parser, parsed: Namespace) -> None:
    from metacal.evaluate import SCORES, Case, assess
    from metacal.train import report
    from metacal.train.results import read_results, with_scores, write_drawings, write_results
    from metacal.train.summary import collapse_notes, score_table, summarise, text_table

    given = parsed["evaluate"]
    folder = Path(given["run"])
    config = _run_config(folder)
    encoder, unfinished = _encoder(folder)
    against, theirs = _encoder(Path(given["against"])) if given["against"] else (None, None)
    asked = _names(given["scores"])
    if asked == ["all"]:
        asked = [name for name in SCORES if name != "cka" or against is not None]
    names = _names(given["data"]) if given["data"] else config.evaluate.data or (config.data.name,)
    labels = config.evaluate.labels if given["labels"] is None else given["labels"]
    if labels < 2:
        raise ValueError(f"`--labels` should be at least 2, of which one is held out to choose the probe's strength; got {labels}.")
    split, root, download = given["split"], config.data.root, config.data.download
    neighbours, source = config.evaluate.neighbours, config.data.name
    cases = {name: Case(encoder, name, split, labels, neighbours, source, against, root, download) for name in names}
    scores = {name: assess(case, asked) for name, case in cases.items()}
    own = config.evaluate.labels
    other = None
    if labels != own:
        other = f"These scores are of at most {labels} images with labels, those in the run's folder of at most {own}."
    apart = [*filter(None, (unfinished, other))]
    print("\n".join([text_table(score_table(scores)), *collapse_notes(scores), *apart, *filter(None, [theirs])]))
    if apart:
        print("They are printed, and nothing is written into the run's folder, where they would be compared with others.")
        return
    write_results(folder, with_scores(read_results(folder), scores, split))
    if given["map"] != "none":
        for name, case in cases.items():
            points, classes = case.map(given["map"])
            drawn = {"points": points.round(decimals=4).tolist(), "classes": classes.tolist(), **case.curve()._asdict()}
            write_drawings(folder, {name: {"method": given["map"], "split": split, **drawn}})
        print(f"Wrote {report.write(folder / 'report.html', summarise({folder.resolve().name: folder}))}")


def _names(given: str) -> list[Any]:
    return [name.strip() for name in given.split(",")]


def _encoder(folder: Path) -> tuple[Encoder, str | None]:
    """The encoder of a run, as it was last saved, and what to say if that was before the run's end."""
    from metacal.train.experiment import encoder, restore, unfinished

    config = _run_config(folder)
    state = restore(config, folder)
    return encoder(config, state.theta), unfinished(config, folder, state)


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


def _study(parser: Parser, parsed: Namespace) -> None:
    from metacal import study

    given = parsed["study"]
    plan = study.load_study(given["file"])
    out = Path(given["out"] or Path("runs") / Path(given["file"]).stem)
    try:
        failed = study.run(plan, out, processes=given["processes"], progress=given["progress"])
    except ValueError as error:
        raise ValueError(f"{given['file']}: {error}") from error
    study.write_records(plan, out)
    study.picture(plan, out)
    table = study.markdown(plan, out)
    (out / "study.md").write_text(table, encoding="utf-8")
    print(f"{table}\nWrote {study.page(plan, out)}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} runs failed; the first one's reason is in {out / failed[0].path / 'log.txt'}. Repeat to try again."
        )


def _together(parser: Parser, parsed: Namespace) -> None:
    from metacal.study.together import pretrain_together
    from metacal.train.results import scores_on
    from metacal.train.settings import find, load_config
    from metacal.train.summary import print_scores

    given = parsed["together"]
    config = load_config(find(given["settings"], parser))
    folder = Path(given["out"] or f"runs/{config.data.name}-{config.tc2.reading}")
    results = pretrain_together(config, given["seeds"], folder, progress=given["progress"])
    print_scores({str(folder / f"seed{seed}"): scores_on(found, config.evaluate.split) for seed, found in results.items()})


def _methods(parser: Parser, parsed: Namespace) -> None:
    from metacal.registry import markdown_table, written

    pages = [Path(name) for name in parsed["methods"]["write"]]
    for page in pages:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    if not pages:
        print(markdown_table())


def _run_config(folder: Path) -> Config:
    from metacal.train.results import CONFIG
    from metacal.train.settings import load_config

    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"`run` {folder} should be the folder of a run, which holds {CONFIG}. `metacal pretrain` makes one.")
    return load_config(path)
