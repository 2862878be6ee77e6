"""Studies: the grid of a YAML file, its runs in processes of their own, and the statistics of what they leave behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from metacal import study
from metacal.cli import main
from metacal.evaluate.intervals import holm, paired_interval, paired_p_value
from metacal.train import report
from metacal.train._files import alone
from metacal.train.experiment import pretrain
from metacal.train.settings import load_config

TINY: dict[str, Any] = {
    "title": "Tiny",
    "question": "Does it run?",
    "base": "tc2_digits",
    "settings": {
        "network": {"width": 8, "dim": 8, "d": 8, "hidden": 8},
        "train": {"steps": 2, "batch_size": 16, "measure_every": 0, "checkpoint_every": 1},
        "evaluate": {"labels": 60},
    },
    "seeds": [3, 4],
    "grid": {
        "objective": {"SimCLR": None, "VICReg": {"objective": {"class_path": "VICReg", "init_args": {"variance": 10.0}}}},
        "method": {"base": {"tc2": {"reading": "base", "num_views": 2}}, "TC² (paper)": {"tc2": {"reading": "paper"}}},
    },
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def test_the_grid_is_every_combination_seed_by_seed(tmp_path: Path) -> None:
    cells = study.cells(study.load_study(write(tmp_path)))
    assert len(cells) == 8
    assert [cell.seed for cell in cells] == [3] * 4 + [4] * 4
    assert [str(cell.path) for cell in cells[:4]] == [
        f"{objective}/{method}/seed3" for objective in ("simclr", "vicreg") for method in ("base", "tc²-paper")
    ]
    settings = tmp_path / "cell.yaml"
    for cell in cells:
        settings.write_text(yaml.safe_dump(dict(cell.settings)), encoding="utf-8")
        config = load_config(settings)
        assert (config.seed, config.train.steps, config.evaluate.split) == (cell.seed, 2, "test")
        assert type(config.objective).__name__ == cell.names["objective"]
        assert config.tc2.reading == ("base" if cell.names["method"] == "base" else "paper")
    assert load_config(settings).objective.variance == 10.0  # type: ignore[attr-defined]


def test_changes_go_over_settings_group_by_group() -> None:
    merged = study.plan.merged
    assert merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    old = {"objective": {"class_path": "SimCLR", "init_args": {"temperature": 0.5}}}
    assert merged(old, {"objective": {"class_path": "BYOL"}}) == {"objective": {"class_path": "BYOL"}}
    assert merged(old, {"objective": {"init_args": {"temperature": 0.1}}})["objective"]["class_path"] == "SimCLR"
    assert old["objective"]["init_args"] == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"references": ["nobody"]}, "nobody"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": ["x"]}, "`seeds` should be different whole numbers"),
        ({"split": "train"}, r"tiny\.yaml: `split`"),
        ({"grid": {**TINY["grid"], "lr": {}}}, "at least one name on every axis, the axis 'lr' has none"),
        (
            {"grid": {"method": {"base": {}, "lr < 0.1": {}, "LR > 0.1": {}}}},
            "'lr < 0.1' and 'LR > 0.1' .* would share the folder 'lr-0.1'",
        ),
        ({"grid": {"method": {"base": {}, "???": {}}}}, r"'\?\?\?' on the axis 'method' makes no name of a folder"),
        ({"grid": {"method": {"base": {}, "..": {}}}}, r"'\.\.' on the axis 'method' makes no name of a folder"),
        ({"seeds": 3}, "`seeds` should be a list, got 3"),
        ({"grid": {"method": {"base": 3}}}, "axis 'method' there is {'base': 3}"),
        ({"grid": {"method": None}}, "axis 'method' there is None"),
        ({"grid": {"method": 3}}, "axis 'method' there is 3"),
        ({"colour": "blue"}, "colour"),
        ({"together": "maybe"}, "`together` should be true or false, got 'maybe'"),
        ({"settings": {"seed": 3}}, "`seed` should stand in no settings"),
        ({"grid": {"method": {"base": {"seed": 3}}}}, "`seed` should stand in no settings"),
    ],
)
def test_bad_studies(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        study.load_study(write(tmp_path, **changes))


def test_missing_study() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        study.load_study("nowhere.yaml")


def test_settings_are_checked_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"TC² (paper)": {"tc2": {"readng": "paper"}}}
    path, out = write(tmp_path, grid={"method": {"base": {}, **odd}}, seeds=[3]), tmp_path / "out"
    assert main(["study", str(path), "--out", str(out), "--progress", "false"]) == 1
    said = capsys.readouterr().err
    assert "did you mean 'tc2.reading'?" in said
    for named in (str(path), "method 'TC² (paper)', seed 3", str(out / "settings" / "tc²-paper" / "seed3.yaml")):
        assert named in said
    assert not list(out.rglob("log.txt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "should be a file of settings, it holds none"),
        ("- a list", "should be a file of settings, it holds"),
        ("train: {steps: 3", "should be a YAML file: while parsing"),
        ("train: 3", ": `train` should hold settings by name, as train: {steps: ...}; got 3"),
        ("tc2: {encoder_stage: 3}", ": tc2: `encoder_stage` should hold settings by name"),
    ],
)
def test_a_base_without_settings_is_named(text: str, said: str, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(text)
    with pytest.raises(ValueError, match=f"`base`: {re.escape(str(base))} ?{re.escape(said)}"):
        study.cells(study.load_study(write(tmp_path, base=str(base))))


def test_what_is_no_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.yaml").write_text("seeds: [1\ngrid: {}")
    assert main(["study", str(tmp_path / "odd.yaml")]) == 1
    assert f"{tmp_path / 'odd.yaml'} should be a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": None}, "seed3.yaml: `data` should hold settings by name, as data: {name: ...}; got None"),
        ({"trian": {"steps": 3}}, "did you mean 'train.steps'?"),
        ({"objective": {"class_path": "SimCLR", "init_args": {"temprature": 0.5}}}, "did you mean 'temperature'?"),
    ],
)
def test_a_place_of_the_grid_with_odd_settings_is_named(
    settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, grid={"method": {"base": {}, "odd": settings}}, seeds=[3])
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--progress", "false"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert f"{path}: the settings of method 'odd', seed 3, cannot be used" in err
    assert err.startswith("metacal pretrain: error: ")
    assert "For all settings: metacal pretrain --help" in err


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_a_run_that_fails_does_not_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"odd": {"tc2": {"reading": "tasks", "num_tasks": 7}}}
    path, out = write(tmp_path, grid={"method": {**TINY["grid"]["method"], **odd}}, seeds=[3]), tmp_path / "out"
    command = [sys.executable, "-m", "metacal", "study", str(path), "--out", str(out), "--progress", "false"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.rglob("results.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (first,) = out.rglob("results.json")
    written = first.stat().st_mtime_ns

    assert main(["study", str(path), "--out", str(out), "--processes", "2", "--progress", "false"]) == 1
    assert len(list(out.rglob("results.json"))) == 2
    assert first.stat().st_mtime_ns == written, "a finished run was run again"
    assert "num_tasks" in (out / "odd" / "seed3" / "log.txt").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert "log.txt" in printed.err
    assert "| TC² (paper) | 1 |" in printed.out
    html = (out / "study.html").read_text(encoding="utf-8")
    for part in (
        "What was run",
        "tc2.reading",
        "method: TC² (paper)",
        "tc2_digits",
        "Every run",
        "The folder out has one folder for each run",
        "Does it run?",
        "2 of 3 runs",
        "seeds 3",
        "test images",
        "odd/seed3: not finished",
    ):
        assert part in html


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_runs_end_with_their_study(tmp_path: Path, number: signal.Signals) -> None:
    """Left alive they would write into the folders that the next study gives to its own."""
    changes = {**TINY["settings"], "train": {**TINY["settings"]["train"], "steps": 100_000}}
    path, out = write(tmp_path, grid={"method": TINY["grid"]["method"]}, seeds=[3], settings=changes), tmp_path / "out"
    command = [sys.executable, "-m", "metacal", "study", str(path), "--out", str(out), "--progress", "false", "--processes", "2"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [out / name / "seed3" for name in ("base", "tc²-paper")]
    deadline = time.monotonic() + 240
    while not all(list(folder.glob("checkpoints/*.pt")) for folder in folders) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match="another process"), alone(folders[0]):
        pass
    process.send_signal(number)
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
    ended = 0
    while ended < 2 and time.monotonic() < deadline:
        try:
            with alone(folders[ended]):
                ended += 1
        except RuntimeError:
            time.sleep(0.05)
    assert ended == 2


def test_findings_and_comparisons_are_those_of_the_runs(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": TINY["grid"]["method"]}))
    settings = tmp_path / "cell.yaml"
    for cell in study.cells(plan):
        settings.write_text(yaml.safe_dump(dict(cell.settings)), encoding="utf-8")
        pretrain(load_config(settings), tmp_path / cell.path, progress=False)
    with pytest.raises(ValueError, match="other settings in base/seed3"):
        study.run(plan, tmp_path, progress=False)  # whose settings nobody wrote down as this study's
    (base, calibrated) = study.findings(plan, tmp_path)
    scores = {
        (folder, seed): 100 * json.loads((tmp_path / folder / f"seed{seed}" / "results.json").read_text())["scores"]["digits"]["probe"]
        for folder in ("base", "tc²-paper")
        for seed in (3, 4)
    }
    assert base.values["digits probe"] == {seed: scores["base", seed] for seed in (3, 4)}
    (c,) = study.compare(plan, [base, calibrated], ["digits probe"], "base")
    differences = [scores["tc²-paper", seed] - scores["base", seed] for seed in (3, 4)]
    assert math.isclose(c.difference.mean, sum(differences) / 2, abs_tol=1e-12)
    assert c.num_seeds == 2
    assert c.p_holm == c.p
    drawn = study.picture(plan, tmp_path)
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert "4 of 4 runs" in study.page(plan, tmp_path).read_text(encoding="utf-8")


def test_p_values_are_corrected_for_the_comparisons_of_one_method_in_one_score(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, seeds=[1, 2, 3]))
    scores = {  # by hand: differences 1, 2, 3 and 1, 1, 2
        ("SimCLR", "base"): [50.0, 51.0, 52.0],
        ("SimCLR", "TC² (paper)"): [51.0, 53.0, 55.0],
        ("VICReg", "base"): [60.0, 61.0, 62.0],
        ("VICReg", "TC² (paper)"): [61.0, 62.0, 64.0],
    }
    found = [
        study.Finding({"objective": o, "method": m}, {"digits probe": dict(zip([1, 2, 3], v, strict=True))}, {})
        for (o, m), v in scores.items()
    ]
    first, second = study.compare(plan, found, ["digits probe"], "base")
    assert (first.difference.mean, second.difference.mean) == (2.0, 4 / 3)
    assert second.p < first.p
    assert math.isclose(second.p_holm, 2 * second.p)
    assert math.isclose(first.p_holm, max(first.p, 2 * second.p))
    (alone,) = study.compare(plan, found[:2], ["digits probe"], "base")
    assert alone.p_holm == alone.p


def test_transfer_is_judged_without_the_set_that_was_trained_on(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": {"base": {}}}, seeds=[3]))  # trains on digits
    (cell,) = study.cells(plan)
    results = {
        "scores": {"digits": {"probe": 0.9}, "mnist": {"probe": 0.5}, "omniglot": {"probe": 0.25}},
        "measured": {"conflict_rate": 0.5},
        "seconds_per_step": 1.0,
        "images_per_step": 2,
        "steps": 3,
    }
    (tmp_path / cell.path).mkdir(parents=True)
    (tmp_path / cell.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (found,) = study.findings(plan, tmp_path)
    assert found.values[study.TRANSFER] == {3: 37.5}
    assert study.scores([found])[0] == study.TRANSFER
    (record,) = map(json.loads, study.write_records(plan, tmp_path).read_text(encoding="utf-8").splitlines())
    assert study.picture(plan, tmp_path) is None  # one method alone
    assert (record["run"], record["method"], record["seed"], record["results"]) == ("base/seed3", "base", 3, results)
    assert record["settings"]["data"] == {"name": "digits"}


@pytest.mark.parametrize(
    ("settings", "transfer"),
    [
        ({}, 37.5),  # trains on digits, which nobody says
        ({"data": {"augmentation": None}}, 37.5),
        ({"data": {"name": "mnist"}}, 57.5),
        ({"data": {"name": "mnist"}, "tc2": {"tasks": "Domains"}}, 57.5),
        ({"data": {"name": "mnist"}, "tc2": {"tasks": {"class_path": "Domains", "init_args": {"sets": ["digits", "omniglot"]}}}}, 50.0),
    ],
)
def test_transfer_is_to_sets_that_a_run_has_not_read(settings: dict[str, Any], transfer: float, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("train: {steps: 3}")
    plan = study.load_study(write(tmp_path, base=str(base), settings=settings, grid={"method": {"base": {}}}, seeds=[3]))
    (cell,) = study.cells(plan)
    results = {
        "scores": {"digits": {"probe": 0.9}, "mnist": {"probe": 0.5}, "omniglot": {"probe": 0.25}},
        "measured": {},
        "seconds_per_step": 1.0,
        "images_per_step": 2,
        "steps": 3,
    }
    (tmp_path / cell.path).mkdir(parents=True)
    (tmp_path / cell.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (found,) = study.findings(plan, tmp_path)
    assert found.values[study.TRANSFER] == {3: transfer}


def test_the_page_names_collapsed_runs(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": {"base": {}}}, seeds=[3, 4]))
    for cell, collapsed in zip(study.cells(plan), (1.0, 0.0), strict=True):
        judged = {"probe": 0.1, "collapsed": collapsed, "dimension_std": 0.25, "rank_me": 1.5}
        results = {"scores": {"digits": judged}, "measured": {}, "seconds_per_step": 1.0, "images_per_step": 2, "steps": 3}
        (tmp_path / cell.path).mkdir(parents=True)
        (tmp_path / cell.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    said = study.page(plan, tmp_path).read_text(encoding="utf-8")
    assert "base/seed3: The encoder has collapsed on digits" in said
    assert "<td>base/seed4</td>" in said
    assert said.count("has collapsed") == 1


def test_scores_alone_do_not_finish_a_run(tmp_path: Path) -> None:
    """As `metacal evaluate` of an interrupted run once left them: the study resumes the run, and reports nothing of it meanwhile."""
    plan = study.load_study(write(tmp_path, grid={"method": {"base": {}}}, seeds=[3]))
    (cell,) = study.cells(plan)
    (tmp_path / cell.path).mkdir(parents=True)
    (tmp_path / cell.path / "results.json").write_text(json.dumps({"scores": {"digits": {"probe": 0.5}}}), encoding="utf-8")
    assert not study.runner.finished(tmp_path, cell)
    assert study.findings(plan, tmp_path) == []
    assert study.write_records(plan, tmp_path).read_text(encoding="utf-8") == ""
    assert "base/seed3: not finished" in study.page(plan, tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("written", ["apart", "as before splits stood apart"])
def test_a_study_reads_the_scores_of_its_split(written: str, tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": {"base": {}}}, seeds=[3], split="validation"))
    (cell,) = study.cells(plan)
    costs = {"measured": {}, "seconds_per_step": None, "images_per_step": 2, "steps": 3}
    on_validation, on_test = {"digits": {"probe": 0.5}}, {"digits": {"probe": 0.25}}
    apart = {"split": "validation", "scores": on_test, "validation_scores": on_validation}
    (tmp_path / cell.path).mkdir(parents=True)
    (tmp_path / cell.path / "config.yaml").write_text(yaml.safe_dump(dict(cell.settings)), encoding="utf-8")
    results = {**costs, **(apart if written == "apart" else {"scores": on_validation})}
    (tmp_path / cell.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (found,) = study.findings(plan, tmp_path)
    assert found.values["digits probe"] == {3: 50.0}
    assert "seconds per step" not in found.values
    (record,) = study.write_records(plan, tmp_path).read_text(encoding="utf-8").splitlines()
    assert json.loads(record)["results"]["validation_scores"] == on_validation
    assert "NaN" not in record


def test_the_page_has_every_score_and_what_each_run_had(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": {"base": {}}}, seeds=[3, 4]))
    for cell, x in zip(study.cells(plan), (0.0, 0.25), strict=True):
        judged = {
            "probe": 0.5 + x,
            "knn": 0.125 + x,
            "knn_200": 0.25 + x,
            "rank_me": 4 + x,
            "logme": x,
            "few_shot_1": x,
            "few_shot_1_95": 9.0,
        }
        measured = {"conflict_rate": 0.375 + x}
        results = {"scores": {"digits": judged}, "measured": measured, "seconds_per_step": 0.625 + x, "images_per_step": 2, "steps": 3}
        (tmp_path / cell.path).mkdir(parents=True)
        (tmp_path / cell.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (found,) = study.findings(plan, tmp_path)
    assert found.values["digits kNN, k = 200 %"] == {3: 25.0, 4: 50.0}
    assert found.values["digits LogME"] == {3: 0.0, 4: 0.25}
    assert study.scores([found]) == ["digits probe", "digits knn"]
    said = study.page(plan, tmp_path).read_text(encoding="utf-8")

    def rows(title: str) -> list[list[str]]:
        body = said.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
        return [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]

    assert rows("Every run") == [
        ["run", "steps", "digits probe", "digits knn", "digits RankMe", "conflict_rate", "seconds per step"],
        ["base/seed3", "3", "50", "12.5", "4", "0.375", "0.625"],
        ["base/seed4", "3", "75", "37.5", "4.25", "0.625", "0.875"],
    ]
    names, values = rows("Other scores")
    assert names == ["method", "seeds", "digits kNN, k = 200 %", "digits 5-way 1-shot %", "digits LogME", "digits RankMe"]
    assert values[2] == "37.5 ± 159"


def test_correlations_are_over_runs_with_the_places_means_taken_off(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    plan = study.load_study(write(tmp_path, seeds=[1, 2]))
    conflict = {("a", "base"): [0.1, 0.4], ("a", "TC² (paper)"): [0.2, 0.3], ("b", "base"): [5.1, 5.2], ("b", "TC² (paper)"): [5.4, 5.0]}
    score = {("a", "base"): [9.0, 7.5], ("a", "TC² (paper)"): [8.0, 7.0], ("b", "base"): [3.0, 2.0], ("b", "TC² (paper)"): [1.0, 2.5]}
    found = [
        study.Finding(
            {"objective": o, "method": m},
            {"x": dict(zip([1, 2], conflict[o, m], strict=True)), "y": dict(zip([1, 2], score[o, m], strict=True))},
            {},
        )
        for o, m in conflict
    ]
    c = study.correlate(plan, found, "x", "y")
    assert c is not None
    x = [v - (0.25 if o == "a" else 5.175) for (o, _), values in conflict.items() for v in values]
    y = [v - (7.875 if o == "a" else 2.125) for (o, _), values in score.items() for v in values]
    assert math.isclose(c.rho, spearmanr(x, y).statistic)
    assert c.rho < -0.5 < spearmanr([v for vs in conflict.values() for v in vs], y).statistic, "the objectives' means would hide it"
    assert [run[0] for run in c.pairs] == ["base", "base", "TC² (paper)", "TC² (paper)"] * 2
    assert study.correlate(plan, found[:2], "x", "y") is None  # four runs
    assert study.correlate(plan, found, "x", "unknown") is None


def test_differences_that_coincide_are_not_tested(tmp_path: Path) -> None:
    """Accuracies are counts: a few seeds may differ by the same number of images, which would have p-values of 0 or of rounding."""
    plan = study.load_study(write(tmp_path, seeds=[1, 2, 3]))
    values = {
        ("SimCLR", "base"): [50.1, 51.7, 52.3],
        ("SimCLR", "TC² (paper)"): [50.2, 51.8, 52.4],  # 0.1 up to rounding
        ("VICReg", "base"): [60.0, 61.0, 62.0],
        ("VICReg", "TC² (paper)"): [63.0, 64.1, 65.2],
    }
    found = [
        study.Finding({"objective": o, "method": m}, {"digits probe": dict(zip([1, 2, 3], v, strict=True))}, {})
        for (o, m), v in values.items()
    ]
    same, other = study.compare(plan, found, ["digits probe"], "base")
    assert math.isclose(same.difference.mean, 0.1)
    assert all(map(math.isnan, (same.difference.half_width, same.p, same.p_holm)))
    assert not same.significant
    assert other.p_holm == other.p < 0.05, "a family of one"
    assert other.significant
    assert math.isnan(study.differences(plan, found, "base", "digits probe").series["TC² (paper)"]["SimCLR"][1])


def test_what_is_not_tested_is_a_dash_and_two_seeds_have_no_star(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, grid={"method": TINY["grid"]["method"]}, settings={"data": {"name": "digits"}}))
    scores = {"base": ((0.5, 0.25, 0.5), (0.75, 0.5, 0.25)), "tc²-paper": ((0.625, 0.5, 0.75), (0.875, 0.75, 0.5005))}
    for name, seeds in scores.items():
        for seed, (digits, mnist, omniglot) in zip((3, 4), seeds, strict=True):
            judged = {"digits": {"knn": digits}, "mnist": {"knn": mnist}, "omniglot": {"knn": omniglot}}
            results = {"scores": judged, "measured": {}, "seconds_per_step": 1.0, "images_per_step": 2, "steps": 3}
            (tmp_path / name / f"seed{seed}").mkdir(parents=True)
            (tmp_path / name / f"seed{seed}" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert study.markdown(plan, tmp_path).splitlines()[-1] == "| TC² (paper) | +12.5 ± – | +25.0 ± – | +25.0 ± 0.3 |"
    (compared,) = study.compare(plan, study.findings(plan, tmp_path), ["omniglot knn"], "base")
    assert compared.p_holm < 0.05, "which says that two differences are near, and no more"
    page = study.page(plan, tmp_path).read_text(encoding="utf-8")
    row = '<td>TC² (paper)</td><td>digits knn</td><td class="number">12.5 ± –</td><td class="number">2</td>'
    assert row + '<td class="number">–</td>' * 2 in page
    assert "nan" not in page
    assert study.picture(plan, tmp_path) is not None


def test_the_overall_difference_is_paired_in_the_means_over_the_places(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, seeds=[1, 2, 3]))
    values = {
        ("SimCLR", "base"): {1: 1.0, 2: 2.0, 3: 3.0},
        ("SimCLR", "TC² (paper)"): {1: 2.0, 2: 3.0, 3: 5.0},  # + 1, 1, 2
        ("VICReg", "base"): {1: 7.0, 2: 5.0, 3: 6.0},
        ("VICReg", "TC² (paper)"): {1: 8.0, 2: 8.0, 3: 6.0},  # + 1, 3, 0
    }
    found = [study.Finding({"objective": o, "method": m}, {"score": v}, {}) for (o, m), v in values.items()]
    (name,) = differences = study.overall(plan, found, "score", "base")
    assert name == "TC² (paper)"
    assert differences[name] == paired_interval([1.0, 2.0, 1.0], [0.0, 0.0, 0.0])
    assert study.overall(plan, found[:3], "score", "base") == {}, "one place is missing"
    drawn = study.differences(plan, found, "base", "score").series[name]
    assert drawn["mean of all"] == tuple(differences[name])


def test_the_page_draws_the_differences_to_every_reference(tmp_path: Path) -> None:
    plan = study.load_study(write(tmp_path, seeds=[1, 2, 3], references=["base", "TC² (paper)"]))
    found = [
        study.Finding({"objective": o, "method": m}, {study.TRANSFER: {1: first, 2: 51.0, 3: 52.0}}, {})
        for o in ("SimCLR", "VICReg")
        for m, first in (("base", 50.0), ("TC² (paper)", 53.0))
    ]
    forward, backward = (study.differences(plan, found, name, study.TRANSFER) for name in plan.references)
    assert forward.series.keys() == {"TC² (paper)"}
    assert forward.series["TC² (paper)"].keys() == {"SimCLR", "VICReg", "mean of all"}
    mean, half = forward.series["TC² (paper)"]["VICReg"]
    assert math.isclose(mean, 1.0)
    assert backward.series["base"]["VICReg"] == (-mean, half)
    html = report.write(tmp_path / "page.html", report.Report("page", intervals=[forward])).read_text(encoding="utf-8")
    for text in ("VICReg", "TC² (paper)", "Against", "points"):
        assert text in html


def test_a_finished_run_of_other_settings_is_not_taken_for_this_studys(tmp_path: Path) -> None:
    grid = {"method": {"base": {"tc2": {"reading": "base"}}}}
    before = study.load_study(write(tmp_path, grid=grid, seeds=[3]))
    (cell,) = study.cells(before)
    path = study.runner.settings_file(tmp_path, cell)
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(dict(cell.settings), sort_keys=False), encoding="utf-8")
    (tmp_path / cell.path).mkdir(parents=True)
    (tmp_path / cell.path / "results.json").write_text('{"steps": 2}', encoding="utf-8")
    assert study.run(before, tmp_path, progress=False) == []
    after = study.load_study(write(tmp_path, grid=grid, seeds=[3], settings={"train": {"steps": 3}}))
    with pytest.raises(ValueError, match="other settings"):
        study.run(after, tmp_path, progress=False)


def test_holm_against_its_definition() -> None:
    """A hypothesis is rejected at level a iff its corrected p is at most a: the step-down procedure, written as a loop."""
    p = [0.012, 0.2, 0.001, 0.04, 0.04, 0.9]
    corrected = holm(p)
    for level in (0.005, 0.02, 0.05, 0.07, 0.15, 0.5, 0.95):
        rejected: set[int] = set()
        for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
            if p[i] > level / (len(p) - rank):
                break
            rejected.add(i)
        assert {i for i, c in enumerate(corrected) if c <= level} == rejected
    assert holm([]) == []
    tested = holm([math.nan, *p, math.nan])
    assert tested[1:-1] == corrected
    assert all(map(math.isnan, (tested[0], tested[-1])))


def test_paired_p_value_is_that_of_the_t_distribution() -> None:
    from scipy.stats import t

    a, b = [81.0, 82.5, 80.0, 83.0], [80.0, 82.0, 80.5, 81.0]
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / 4
    s = (sum((x - mean) ** 2 for x in d) / 3) ** 0.5
    assert math.isclose(paired_p_value(a, b), 2 * t.sf(mean / (s / 2), 3), rel_tol=1e-12)
    for same in ([80.0, 81.5, 79.0, 82.0], a, [x - 0.1 for x in a]):  # no spread, or that of rounding
        assert math.isnan(paired_p_value(a, same))
        assert math.isnan(paired_interval(a, same).half_width)
        assert math.isclose(paired_interval(a, same).mean, a[0] - same[0], abs_tol=1e-12)
    assert paired_p_value(a, [x - 0.1 - 1e-6 * i for i, x in enumerate(a)]) < 1e-8


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_packaged_studies_are_made_of_settings(path: Path, tmp_path: Path) -> None:
    """Every name of every axis at least once."""
    plan = study.load_study(path)
    missing = {(axis, name) for axis, names in plan.grid.items() for name in names}
    for cell in study.cells(plan):
        if missing & set(cell.names.items()):
            settings = tmp_path / "cell.yaml"
            settings.write_text(yaml.safe_dump(dict(cell.settings)), encoding="utf-8")
            assert load_config(settings).seed == cell.seed
            missing -= set(cell.names.items())
    assert not missing
