"""The command line as users meet it: real runs that are killed and resumed, and what they are told when something is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from metacal import linear
from metacal.adjoints import Implicit
from metacal.cli import main
from metacal.objectives import VICReg
from metacal.tc2 import PCA, Networks, Stage, TopK
from metacal.train import checkpoint, read_metrics
from metacal.train.loop import _farewell
from metacal.train.settings import configurations, load_config, packaged, to_yaml

ROOT = Path(__file__).parent.parent
TINY = """
data: {name: digits}
network: {width: 8, dim: 8, d: 8, hidden: 8}
tc2: {calibrator: {class_path: Networks, init_args: {hidden: 8}}}
train: {steps: 12, batch_size: 32, checkpoint_every: 3, log_every: 1, measure_every: 6}
evaluate: {labels: 200}
device: cpu
"""


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metacal", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(*arguments: str | Path) -> str:
    running = process(*arguments)
    out, err = running.communicate()
    assert running.returncode == 0, err
    return out


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The same in this process: (exit status, output, errors)."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    return found.tensors["state"]


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit: weights, metrics of every step, and scores."""
    a, b = weights(folder), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert read_metrics(folder) == read_metrics(other)
    first, second = results(folder), results(other)
    assert {**first, "seconds_per_step": 0} == {**second, "seconds_per_step": 0}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change one change a copy."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    out = finished("pretrain", tiny, "--out", folder)
    assert re.search(r"undisturbed +digits +[\d.]+ +[\d.]+ +[\d.]+ +(yes|no)\n", out)
    return folder


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copied"))


# 1. Runs


def test_a_run_leaves_its_folder(undisturbed: Path) -> None:
    config = load_config(undisturbed / "config.yaml")
    assert (config.network.width, config.train.steps, config.tc2.reading) == (8, 12, "paper")
    rows = read_metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["step"] for row in rows if "conflict_rate" in row] == [5, 11]
    assert all(row["first_bad_step"] == -1 for row in rows)
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == ["step_00000009.pt", "step_00000012.pt"]
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert (environment["seed"], environment["device"]) == (0, "cpu")
    assert "pretrain" in environment["command"]
    assert any((undisturbed / "tensorboard").iterdir())
    found = results(undisturbed)
    assert (found["steps"], found["images_per_step"]) == (12, 8 * 32)
    assert 0.1 < found["scores"]["digits"]["probe"] <= 1
    assert len(found["cosines"]) == len(found["transfer"]) == 4


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    undisturbed: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "pretrain", tiny, "--out", tmp_path / "same", "--progress", "false")[0] == 0
    assert_same_run(tmp_path / "same", undisturbed)
    options = ("--seed", "1", "--train.steps", "1", "--progress", "false")
    assert call(capsys, "pretrain", tiny, "--out", tmp_path / "other", *options)[0] == 0
    assert read_metrics(tmp_path / "other")[0]["loss"] != read_metrics(undisturbed)[0]["loss"]


def test_killed_and_resumed_a_run_ends_as_if_undisturbed(undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    moments = random.Random()  # other moments every time
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        seen = len(read_metrics(folder))
        running = process("pretrain", tiny, "--out", folder, *(["--resume"] if seen else []))
        deadline = time.monotonic() + 120
        # Rows of a resumed run come after those that it kept: wait until it is under way.
        while len(read_metrics(folder)) <= seen and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0 if number == signal.SIGINT else moments.uniform(0, 0.2))
        running.send_signal(number)
        _, err = running.communicate()
        if running.returncode == 0:
            break  # it was faster: the next resumption finds a finished run
        if number == signal.SIGINT:
            assert running.returncode == 130, err
            assert re.search(r"metacal pretrain: (Stopped after \d+ steps; a checkpoint is in|stopped\n)", err)  # in training, or later
            assert "Traceback" not in err
            assert "resume=True" not in err
        else:
            assert running.returncode == -signal.SIGKILL
    finished("pretrain", tiny, "--out", folder, "--resume", "--progress", "false")
    assert_same_run(folder, undisturbed)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    undisturbed: Path, copied: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = copied / "checkpoints" / "step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (copied / "results.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"step_00000012.pt cannot be read .* Going back to step_00000009.pt"):
        status, _, _ = call(capsys, "pretrain", tiny, "--out", copied, "--resume", "--progress", "false")
    assert status == 0
    assert_same_run(copied, undisturbed)


def test_an_inner_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "diverged"
    options = ["--tc2.calibrator_stage.lr", "1e38", "--tc2.warmup", "4", "--progress", "false"]
    status, _, err = call(capsys, "pretrain", tiny, "--out", out, *options)
    assert status == 1
    assert re.search(r"The metric 'calibration_loss' is (nan|inf) at step 4\.", err)
    assert "Lower the learning rates" in err
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None
    assert found.step == 3
    assert all(leaf.isfinite().all() for leaf in found.tensors["state"].values() if leaf.is_floating_point())
    status, _, err = call(capsys, "pretrain", tiny, "--out", tmp_path / "encoder", "--tc2.encoder_stage.lr", "1e38", "--progress", "false")
    assert status == 1
    assert re.search(r"The metric 'loss' is (nan|inf) at step 0\.", err)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(copied: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(copied)): path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    before = contents()
    status, _, err = call(capsys, "pretrain", tiny, "--out", copied, "--seed", "1")
    assert (status, contents()) == (1, before)
    assert "already holds a run" in err
    assert "--resume" in err
    status, _, err = call(capsys, "pretrain", tiny, "--out", copied, "--resume", "--seed", "1")
    assert (status, contents()) == (1, before)
    assert "config.yaml holds other settings" in err


def test_a_run_that_failed_in_its_first_step_leaves_the_folder_usable(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "run", ["--train.steps", "2", "--progress", "false"]
    status, _, err = call(capsys, "pretrain", tiny, "--out", out, *options, "--tc2.num_tasks", "3")
    assert status == 1
    assert "N = 32 samples do not make K = 3 equal tasks" in err
    assert call(capsys, "pretrain", tiny, "--out", out, *options)[0] == 0
    assert load_config(out / "config.yaml").tc2.num_tasks == 4


def test_an_optional_dependency_that_is_missing_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    status, _, err = call(capsys, "pretrain", tiny, "--out", tmp_path / "run", "--tc2.reading", "upgrad", "--progress", "false")
    assert status == 1
    assert err.startswith("metacal pretrain: ")
    assert 'pip install "torchjd[quadprog-projector]"' in err


# 2. Judging and reporting


def test_evaluate_repeats_the_scores_and_keeps_validation_apart(
    undisturbed: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "evaluate", copied)[0] == 0  # the run's own data set and number of labels
    assert results(copied)["scores"] == results(undisturbed)["scores"]
    status, out, _ = call(capsys, "evaluate", copied, "--data", "digits", "--split", "validation")
    assert status == 0
    found = results(copied)
    assert f"{100 * found['validation_scores']['digits']['probe']:.4g}" in out
    assert found["scores"] == results(undisturbed)["scores"]
    assert found["validation_scores"] != found["scores"]


def test_a_report_is_one_self_contained_page(undisturbed: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "report", copied)[0] == 0
    assert (copied / "report.html").is_file()
    twin = Path(shutil.copytree(undisturbed, tmp_path / "elsewhere" / "copied"))
    page = tmp_path / "both.html"
    status, out, _ = call(capsys, "report", copied, twin, "--out", page)
    assert (status, out) == (0, f"Wrote {page}\n")
    html = page.read_text()
    assert f"<td>{copied}</td>" in html  # runs of one name are told apart by their folders
    assert f"<td>{twin}</td>" in html
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)|@import|<script|<link""", html)
    assert html.count("<svg") >= 4


def test_the_demo_compares_four_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ("demo", "--steps", "2", "--out", tmp_path / "runs", "--report", page, "--device", "cpu")
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    rows = [line.split("  ")[0] for line in out.splitlines() if re.search(r"  \d", line)]
    assert rows == ["base, 2 views", "base, TC²'s budget", "tasks, no calibration", "TC²"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "base-2-views",
        "matched-4-views",
        "paper-4-views",
        "tasks-4-views",
    ]
    assert results(tmp_path / "runs" / "matched-4-views")["steps"] == 2 * 8 // 4  # TC²'s 8 N passes, 4 N at a time
    html = page.read_text()
    assert all(name in html for name in ("base, 2 views", "tasks, no calibration", "TC²: conflict", "TC²: transfer"))
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert "holds notes.txt, which is not a run of the demo" in err
    assert (tmp_path / "runs" / "paper-4-views" / "results.json").is_file()
    (tmp_path / "runs" / "notes.txt").unlink()
    own = Path(shutil.copytree(tmp_path / "runs" / "paper-4-views", tmp_path / "runs" / "mine"))
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert "holds mine, which is not a run of the demo" in err
    assert (own / "results.json").is_file()


# 3. Settings


def test_the_readme_lists_the_packaged_configurations() -> None:
    said = re.search(r"Packaged configurations:.*?\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    assert said is not None
    assert sorted(re.findall(r"`(\w+)`", said[0])) == configurations()


@pytest.mark.parametrize("name", configurations())
def test_packaged_configurations_round_trip(name: str, tmp_path: Path) -> None:
    config = packaged(name)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_settings_of_every_family_round_trip(tmp_path: Path) -> None:
    calibrator = ("--tc2.calibrator", "Networks", "--tc2.calibrator.n_f", "8", "--tc2.calibrator.sparsity", "metacal.tc2.TopK")
    stage = ("--tc2.encoder_stage.adjoint", "Implicit", "--tc2.encoder_stage.adjoint.solver", "metacal.linear.CG")
    config = packaged(
        "tc2_digits",
        *(*calibrator, "--tc2.calibrator.sparsity.k", "3", "--objective", "VICReg", "--objective.variance", "10"),
        *(*stage, "--tc2.encoder_stage.adjoint.solver.num_steps", "7", "--tc2.encoder_stage.strength", "2"),
    )
    assert config.tc2.calibrator == Networks(n_f=8, sparsity=TopK(3))
    assert config.objective == VICReg(variance=10.0)
    assert config.tc2.encoder_stage == Stage(0.05, 1, Implicit(linear.CG(7)), 2.0)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert packaged("tc2_digits", "--tc2.calibrator", "PCA", "--tc2.calibrator.n_f", "4").tc2.calibrator == PCA(n_f=4)


def test_a_printed_configuration_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "pretrain", "tc2_digits", "--train.lr", "0.005", "--print_config")
    assert status == 0
    path = tmp_path / "mine.yaml"
    path.write_text(out)
    assert call(capsys, "pretrain", path, "--print_config") == (0, out, "")
    assert "lr: 0.005" in out


def test_help() -> None:
    """In a process of its own: the entry point, and no warnings of its imports."""
    out = finished("--help")
    assert all(command in out for command in ("metacal demo", "metacal pretrain", "metacal evaluate", "metacal report"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--steps", "--seed", "--report"]),
        ("pretrain", ["--tc2.reading", "--train.steps", "--resume", "tc2_fashion_mnist", "batch size should be divisible"]),
        ("evaluate", ["--data", "--split", "--labels"]),
        ("report", ["--out", "folders of runs"]),
    ],
)
def test_help_of_every_command(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, command, "--help")
    flat = " ".join(out.split())
    assert status == 0
    assert [word for word in words if word not in flat] == []


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys) == call(capsys, "--help")


# 4. What users get told


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ("tc2: {readng: paper}", "tc2.reading"),
        ("trian: {steps: 3}", "train.steps"),
        ("network: {widht: 8}", "network.width"),
        ("tc2: {encoder_stage: {lrr: 0.1}}", "tc2.encoder_stage.lr"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(settings: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(settings)
    status, _, err = call(capsys, "pretrain", path)
    assert status == 2
    assert f"did you mean '{meant}'?" in err


@pytest.mark.parametrize(
    ("option", "meant"),
    [("--trian.steps", "train.steps"), ("--train.step", "train.steps"), ("--tc2.readin", "tc2.reading"), ("--sed", "seed")],
)
def test_an_unknown_option_names_the_nearest(option: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "pretrain", "tc2_digits", option, "3")
    assert status == 2
    assert f"did you mean '{meant}'?" in err


def test_an_unknown_configuration_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "pretrain", "tc2_digit")
    assert status == 2
    assert "There is no packaged configuration 'tc2_digit'; did you mean 'tc2_digits'?" in err
    status, _, err = call(capsys, "pretrain", "mine.yaml")
    assert status == 2
    assert "There is no configuration file mine.yaml" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tc2.reading", "papr"], "tc2.reading"),
        (["--train.steps", "many"], "train.steps"),
        (["--objective", "SimCRL"], "`objective` may be AlignUniform, BYOL, BarlowTwins, DCL, "),
        (["--tc2.calibrator", "Pca"], "`tc2.calibrator` may be Identity, Networks, PCA, or the import path of your own; got 'Pca'"),
        (["--tc2.encoder_stage.adjoint", "Exact"], "`tc2.encoder_stage.adjoint` may be FiniteDifference, FirstOrder, "),
        (["--network.norm", "group"], "network.norm"),
    ],
)
def test_a_bad_value_names_its_setting(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "pretrain", "tc2_digits", *options)
    assert status == 2
    assert message in err


def test_missing_data_say_where_they_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METACAL_DATA", raising=False)
    status, _, err = call(capsys, "pretrain", "tc2_fashion_mnist", "--out", tmp_path / "run")
    assert status == 1
    assert "METACAL_DATA" in err
    assert "fashion_mnist" in err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("METACAL_DATA", str(tmp_path))
    status, _, err = call(capsys, "pretrain", "tc2_fashion_mnist", "--out", tmp_path / "run")
    assert status == 1
    assert f"`root` = {tmp_path}" in err


def test_what_a_file_system_refuses_is_one_message(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        status, _, err = call(capsys, "pretrain", tiny, "--out", out, "--train.steps", "0", "--progress", "false")
        assert status == 1
        assert err.startswith("metacal pretrain: ")
        assert str(out) in err


@pytest.mark.parametrize("command", [("pretrain",), ("together", "--seeds", "1")])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train: 5", "mine.yaml: `train` should hold settings by name, as train: {steps: ...}; got 5"),
        ("data:", "mine.yaml: `data` should hold settings by name, as data: {name: ...}; got None"),
        ("train: {steps: 3", "mine.yaml should be a YAML file: while parsing"),
        ("", "mine.yaml should be a file of settings, it holds none"),
        ("trian: {steps: 3}", "did you mean 'train.steps'?"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(
    command: tuple[str, ...], settings: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(settings)
    status, _, err = call(capsys, command[0], tmp_path / "mine.yaml", *command[1:])
    assert status == 2
    assert message in err
    assert re.match(r"metacal(?: pretrain)?: error: ", err)


@pytest.mark.parametrize(("command", "again"), [("pretrain", "--resume"), ("together", "the same command")])
def test_ctrl_c_says_how_to_go_on(command: str, again: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise _farewell(signal.SIGINT, 7, Path("run"))

    monkeypatch.setattr(f"metacal.cli._{command}", interrupted)
    status, _, err = call(capsys, command, "tc2_digits", *(["--seeds", "1"] if command == "together" else []))
    said = f"metacal {command}: Stopped after 7 steps; a checkpoint is in run/checkpoints. Go on with {again}.\n"
    assert (status, err) == (130, said)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_folder_without_a_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, command, tmp_path)
    assert status == 1
    assert f"`run` {tmp_path} should be the folder of a run" in err


def test_evaluate_needs_a_checkpoint_and_a_known_set(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "evaluate", copied, "--data", " digits", "--scores", "knn, monitors", "--map", "none")[0] == 0
    status, _, err = call(capsys, "evaluate", copied, "--data", "digitz")
    assert status == 1
    assert "`name` should be one of digits, mnist" in err
    shutil.rmtree(copied / "checkpoints")
    status, _, err = call(capsys, "evaluate", copied)
    assert status == 1
    assert "holds no checkpoint. Train first" in err
