"""`metacal evaluate`: its table, its warnings, and what it draws into the run's report."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from metacal import tree
from metacal.cli import main
from metacal.evaluate import SCORES, flat_map
from metacal.train import checkpoint, report
from metacal.train.experiment import pretrain
from metacal.train.pictures import Curves, Points, Series
from metacal.train.report import Report
from metacal.train.results import read_results, with_scores, write_results
from metacal.train.settings import load_config
from metacal.train.summary import collapse_notes, score_table, summarise, text_table

SETTINGS = """
data: {name: digits}
network: {width: 8, dim: 8, d: 8, hidden: 8}
tc2: {reading: base, num_views: 2}
train: {steps: 4, batch_size: 32, checkpoint_every: 4, measure_every: 0}
evaluate: {labels: 250, split: validation}
device: cpu
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "settings.yaml").write_text(SETTINGS)
    pretrain(load_config(folder / "settings.yaml"), folder / "run", progress=False)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in ("evaluate", *arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_all_scores_in_a_table_and_in_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(run)
    status, out, _ = call(capsys, run, "--scores", "all", "--against", run, "--split", "validation")
    assert status == 0
    found = results(run)["validation_scores"]["digits"]
    assert found["cka"] == pytest.approx(1)  # with itself
    for label, key, factor in (("linear probe %", "probe", 100), ("LogME", "logme", 1), ("fine-tuned on 10% %", "fine_tune_10", 100)):
        assert re.search(rf"^{re.escape(label)} +{re.escape(f'{factor * found[key]:.4g}')}$", out, re.MULTILINE)
    few = f"{100 * found['few_shot_1']:.4g} +- {100 * found['few_shot_1_95']:.2g}"
    assert re.search(rf"^5-way 1-shot % +{re.escape(few)}$", out, re.MULTILINE)
    assert f"Wrote {run / 'report.html'}" in out
    assert found.items() >= before["validation_scores"]["digits"].items()
    assert {**results(run), "validation_scores": 0} == {**before, "validation_scores": 0}

    page = (run / "report.html").read_text()
    HTMLParser().feed(page)
    assert "digits: accuracy against labels" in page
    assert "run: digits" in page
    assert "PCA of validation images, by class" in page
    assert "All scores on validation images: run" in page
    drawn = json.loads((run / "drawings.json").read_text())["digits"]
    assert len(drawn["points"]) == len(drawn["classes"]) == 143  # a tenth of the 1,438 training images, by class
    assert drawn["labels"] == [20, 50, 100, 200]


def test_scores_add_up_over_calls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(run)
    assert "scores" not in before, "the run was judged on validation images"
    for scores in ("knn", "h_score,transrate"):
        assert call(capsys, run, "--scores", scores, "--map", "none", "--split", "test")[0] == 0
    after = results(run)
    assert set(after.pop("scores")["digits"]) == {"knn", "knn_200", "h_score", "transrate"}
    assert after == before
    assert not (run / "drawings.json").exists()
    assert not (run / "report.html").exists()


def test_scores_of_another_number_of_labels_are_printed_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written over the run's own, they would be compared with other runs' of another budget."""
    before = results(run)
    assert (before["labels"], before["neighbours"]) == (250, 20)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, out, _ = call(capsys, run, "--labels", "60", "--split", "validation", "--scores", "probe, knn")
    assert status == 0
    assert re.search(r"^kNN % +[\d.]+$", out, re.MULTILINE)
    assert "These scores are of at most 60 images with labels, those in the run's folder of at most 250." in out
    assert "nothing is written into the run's folder" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert call(capsys, run, "--labels", "250", "--split", "validation", "--scores", "h_score", "--map", "none")[0] == 0
    assert "h_score" in results(run)["validation_scores"]["digits"]
    old = {name: value for name, value in results(run).items() if name not in ("labels", "neighbours")}  # as runs were written before
    write_results(run, old)
    assert call(capsys, run, "--split", "validation", "--scores", "transrate", "--map", "none")[0] == 0
    assert set(results(run)["validation_scores"]["digits"]) == {*old["validation_scores"]["digits"], "transrate"}


def test_a_run_is_judged_by_the_scores_it_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text(
        SETTINGS.replace("evaluate: {", "evaluate: {scores: [knn, h_score], ").replace("steps: 4", "steps: 1")
    )
    assert main(["pretrain", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "run"), "--progress", "false"]) == 0
    assert set(results(tmp_path / "run")["validation_scores"]["digits"]) == {"knn", "knn_200", "h_score"}
    assert re.search(r"digits +- +[\d.]+ +- +-$", capsys.readouterr().out, re.MULTILINE)


def test_what_the_command_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, run, "--scores", "probe,log_me")
    assert (status, "`scores` should be some of probe, knn" in err, "got 'log_me'" in err) == (1, True, True)
    status, _, err = call(capsys, run, "--scores", "cka")
    assert (status, "--against RUN" in err) == (1, True)
    status, _, err = call(capsys, run, "--against", tmp_path)
    assert (status, f"`run` {tmp_path} should be the folder of a run" in err) == (1, True)
    status, _, err = call(capsys, run, "--scores", "knn", "--labels", "12")
    assert (status, "`neighbours` should be at most the" in err) == (1, True)
    status, _, err = call(capsys, run, "--labels", "1")
    assert (status, "`--labels` should be at least 2" in err, "got 1" in err) == (1, True, True)


@pytest.mark.filterwarnings("ignore:`train` has collapsed")
def test_a_collapsed_encoder_is_named_and_points_to_the_monitors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    state = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in found.tensors["state"].items()}
    checkpoint.save(run / "checkpoints", found.step + 1, {"state": state})
    status, out, _ = call(capsys, run, "--map", "none", "--split", "validation")
    assert status == 0
    assert re.search(r"^collapsed +yes$", out, re.MULTILINE)
    assert re.search(r"The encoder has collapsed on digits: .*dimension_std 0, RankMe 1\b.*metrics.jsonl.* show when", out)
    assert collapse_notes({"digits": {"collapsed": 0.0}}) == []
    assert score_table({"digits": {"knn": 0.5}}) == [{"score": "kNN %", "digits": 50.0}]


@pytest.mark.filterwarnings("ignore:`(train|features)` has collapsed")
def test_a_collapsed_encoder_can_be_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    state = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in found.tensors["state"].items()}
    checkpoint.save(run / "checkpoints", found.step + 1, {"state": state})
    assert call(capsys, run, "--map", "tsne", "--scores", "knn", "--split", "validation")[0] == 0
    assert {tuple(point) for point in json.loads((run / "drawings.json").read_text())["digits"]["points"]} == {(0.0, 0.0)}


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_features_that_say_nothing_are_drawn_as_one_point(method: Literal["pca", "tsne"]) -> None:
    """In a process of its own this was a segmentation fault of scikit-learn's: NaN in its Barnes-Hut tree."""
    for same in (torch.ones(120, 6), torch.zeros(120, 6), torch.ones(5, 2)):
        with pytest.warns(RuntimeWarning, match="`features` has collapsed: .* so the map is one point"):
            assert torch.equal(flat_map(same, method), torch.zeros(len(same), 2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_a_t_sne_is_the_same_at_any_scale(scale: float) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = flat_map(scale * x, "tsne")
    assert drawn.isfinite().all()
    power = 2.0 ** round(math.log2(scale))
    assert torch.equal(flat_map(power * x, "tsne"), flat_map(x, "tsne"))


def test_an_unfinished_run_is_judged_in_print_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "results.json").unlink()
    (run / "budget.json").write_text('{"steps": 8}')
    files = set(run.rglob("*"))
    status, out, _ = call(capsys, run, "--scores", "knn", "--split", "validation")
    assert status == 0
    assert re.search(r"^kNN % +[\d.]+$", out, re.MULTILINE)
    assert f"The run {run} is not finished: its newest readable checkpoint is of step 4 of 8." in out
    assert f"`metacal pretrain {run / 'config.yaml'} --out {run} --resume`" in out
    assert "nothing is written" in out
    assert set(run.rglob("*")) == files


def test_a_finished_run_that_is_resumed_keeps_all_it_has(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, run, "--scores", "h_score", "--map", "none", "--split", "validation")[0] == 0
    assert call(capsys, run, "--scores", "knn", "--map", "none", "--split", "test")[0] == 0
    before = results(run)
    assert before["seconds_per_step"] > 0
    assert main(["pretrain", str(run / "config.yaml"), "--out", str(run), "--resume", "--progress", "false"]) == 0
    assert results(run) == before


# ------------------------------------------------------------------------------------------------------------ the report


def test_the_table_leaves_open_what_was_not_measured() -> None:
    rows = score_table({"a": {"probe": 0.5, "collapsed": 0.0}, "b": {"logme": -0.25, "few_shot_5": 0.75, "few_shot_5_95": 0.01}})
    lines = text_table(rows).split("\n")
    assert [re.split(r" {2,}", line) for line in lines[:1] + lines[2:]] == [
        ["score", "a", "b"],
        ["linear probe %", "50", "-"],
        ["5-way 5-shot %", "-", "75 +- 1"],
        ["LogME", "-", "-0.25"],
        ["collapsed", "no", "-"],
    ]


def test_half_widths_have_two_digits_and_no_powers_of_ten() -> None:
    shown = {0.0123: "0.012", 9.96: "10", 99.4: "99", 110.3: "110", 1234.5: "1234", float("nan"): "–"}
    assert {value: report.half_width(value) for value in shown} == shown
    assert text_table([{"a": (250.0, 159.4)}]).split("\n")[2] == "250 +- 159"


def test_the_conflict_matrix_over_time(tmp_path: Path) -> None:
    rows = [
        {"step": t, "loss": 1.0} | ({"cosine_1_2": t / 100, "cosine_1_3": -0.5, "cosine_2_3": 0.0} if t % 5 == 4 else {}) for t in range(50)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.json").write_text(json.dumps({"steps": 50, "cosines": [[1.0]], "transfer": [[0.0]]}))
    (series,) = [m for m in summarise({"a": tmp_path}).matrices if isinstance(m, Series)]
    assert (series.labels[0], series.labels[-1]) == ("step 5", "step 50")
    values = torch.as_tensor(series.values)
    assert values.shape == (6, 3, 3)
    assert torch.equal(values, values.mT)
    assert values[-1].tolist() == [[1, 0.49, -0.5], [0.49, 1, 0], [-0.5, 0, 1]]
    assert "a: conflict over time" in report.write(tmp_path / "page.html", summarise({"a": tmp_path})).read_text()


def test_pictures_of_points_series_and_log_curves(tmp_path: Path) -> None:
    points, classes = torch.randn(30, 2), [i % 3 for i in range(30)]
    shown = Report(
        "page",
        curves=[Curves("curve", {"a": ([10, 100, 1000], [1, 2, 3])}, log_x=True)],
        matrices=[Series("series", torch.eye(3).expand(2, 3, 3), ["first", "last"])],
        maps=[Points("map", points, classes)],
    )
    page = report.write(tmp_path / "page.html", shown).read_text()
    assert page.count("<svg") == 3
    assert all(f">{label}</" in page for label in ("first", "last", "map", "series", "1000"))
    assert "mathdefault" not in page
    assert page.count("<use") >= 30  # a mark for each point
    for broken, message in (
        (Report("page", maps=[Points("map", points, classes[1:])]), r"map 'map' should be \[N, 2\] with one class each.*\(29,\)"),
        (Report("page", matrices=[Series("s", torch.eye(3), ["a"])]), r"series 's' should be \[T, K, K\], one matrix for each of its 1"),
    ):
        with pytest.raises(ValueError, match=message):
            report.write(tmp_path / "broken.html", broken)


def test_scores_of_a_set_are_merged_and_splits_stay_apart(tmp_path: Path) -> None:
    found = with_scores({"steps": 3}, {"digits": {"probe": 0.5}}, "test")
    found = with_scores(found, {"digits": {"knn": 0.25}, "mnist": {"knn": 0.75}}, "test")
    found = with_scores(found, {"digits": {"knn": 0.125}}, "validation")
    assert found == {
        "steps": 3,
        "scores": {"digits": {"probe": 0.5, "knn": 0.25}, "mnist": {"knn": 0.75}},
        "validation_scores": {"digits": {"knn": 0.125}},
    }
    write_results(tmp_path, found)
    titles = [table.title for table in summarise({"a": tmp_path}).tables]
    assert titles == ["Frozen encoders", "Frozen encoders on validation images"]


def test_scores_that_no_split_was_named_for_are_those_of_the_settings(tmp_path: Path) -> None:
    old = {"steps": 3, "scores": {"digits": {"probe": 0.5}}, "validation_scores": {"digits": {"h_score": 0.25}}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    (tmp_path / "config.yaml").write_text("evaluate:\n  split: test\n")
    assert read_results(tmp_path) == old
    (tmp_path / "config.yaml").write_text("evaluate:\n  split: validation\n")
    moved = {"steps": 3, "split": "validation", "validation_scores": {"digits": {"probe": 0.5, "h_score": 0.25}}}
    assert read_results(tmp_path) == moved
    tested = with_scores(moved, {"digits": {"probe": 0.125}}, "test")
    write_results(tmp_path, tested)
    assert read_results(tmp_path) == tested, "moved once"


def test_results_are_strict_json(tmp_path: Path) -> None:
    nan = float("nan")
    write_results(tmp_path, {"steps": 3, "seconds_per_step": nan, "scores": {"digits": {"cka": nan, "logme": -float("inf"), "knn": 0.5}}})
    assert results(tmp_path) == {"steps": 3, "seconds_per_step": None, "scores": {"digits": {"cka": None, "logme": None, "knn": 0.5}}}
    found = read_results(tmp_path)["scores"]
    assert text_table(score_table(found)).split("\n")[2:] == ["kNN %      50", "LogME     nan", "CKA       nan"]


def test_the_help_names_every_score(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert [name for name in SCORES if not re.search(rf"\b{name}\b", text)] == []


def test_trees_of_a_run_are_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Judging, fine-tuning included, changes nothing of the checkpoint."""
    before = checkpoint.latest(run / "checkpoints")
    assert before is not None
    assert call(capsys, run, "--scores", "fine_tune", "--map", "none", "--split", "validation")[0] == 0
    after = checkpoint.latest(run / "checkpoints")
    assert after is not None
    assert tree.leaves(after.tensors["state"])
    assert all(torch.equal(after.tensors["state"][name], t) for name, t in before.tensors["state"].items())
