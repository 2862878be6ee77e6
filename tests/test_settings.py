"""Settings: what is refused before anything is trained, what a change of class leaves, and what a matched run costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metacal import objectives
from metacal.adjoints import Unrolled
from metacal.tc2 import PCA, Networks
from metacal.train import config as c
from metacal.train.budget import budget
from metacal.train.experiment import pretrain
from metacal.train.settings import as_config, load_config, packaged, settings_parser, to_yaml

# 1. What is refused


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        (c.TrainConfig, "steps", -3, "`steps` should be at least 0, got -3. Change the setting train.steps"),
        (c.TrainConfig, "measure_every", -1, "`measure_every` should be at least 0, got -1. .*train.measure_every"),
        (c.TrainConfig, "batch_size", 0, "`batch_size` should be at least 1, got 0"),
        (c.TrainConfig, "checkpoint_every", 0, "`checkpoint_every` should be at least 1, got 0"),
        (c.TrainConfig, "log_every", 0, "`log_every` should be at least 1, got 0"),
        (c.TrainConfig, "threads", 0, "`threads` should be at least 1, got 0"),
        (c.TrainConfig, "lr", -1e-3, "`lr` should be at least 0, got -0.001"),
        (c.TrainConfig, "lr", float("nan"), "`lr` should be at least 0, got nan"),
        (c.TrainConfig, "momentum", 1.5, "`momentum` should be at most 1, got 1.5"),
        (c.EvaluateConfig, "labels", 0, "`labels` should be at least 2, got 0. Change the setting evaluate.labels"),
        (c.EvaluateConfig, "neighbours", 0, "`neighbours` should be at least 1, got 0. .*evaluate.neighbours"),
        (c.EvaluateConfig, "online", -1, "`online` should be at least 0, got -1. .*evaluate.online"),
        (c.EvaluateConfig, "scores", ("probe", "cka"), "cannot be cka, which compares two"),
        (c.TC2Config, "warmup", -5, "`warmup` should be at least 0, got -5. Change the setting tc2.warmup"),
        (c.TC2Config, "num_tasks", 0, "`num_tasks` should be at least 1, got 0"),
        (c.TC2Config, "lambda_s", -1.0, "`lambda_s` should be at least 0, got -1"),
        (c.DataConfig, "validation", 1.5, "`validation` should be a share from 0 to below 1, got 1.5. .*data.validation"),
        (c.DataConfig, "validation", 1.0, "`validation` should be a share"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(section: type[Any], setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**{setting: value})


def test_the_ends_of_the_ranges_are_in_them() -> None:
    c.TrainConfig(steps=0, measure_every=0, momentum=1.0, threads=None)
    c.EvaluateConfig(labels=2, neighbours=1, online=0)
    c.DataConfig(validation=0.0)
    c.TC2Config(warmup=0, num_tasks=1, num_views=2)


TINY = c.Config(
    network=c.NetworkConfig(width=8, dim=8, d=8, hidden=8),
    tc2=c.TC2Config(reading="base"),
    train=c.TrainConfig(steps=1, batch_size=16, measure_every=0),
    device="cpu",
)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (c.EvaluateConfig(labels=15), "`labels` should give every class of digits at least 2 training images"),
        (c.EvaluateConfig(neighbours=5000), "`neighbours` should be at most the 1295 training images of digits"),
        (c.EvaluateConfig(labels=5), "`labels` should be at least 10, one image of every class of digits; got 5"),
        (c.EvaluateConfig(online=5), "`evaluate.online` should be at least 10, one image of every class of digits; got 5"),
        (c.EvaluateConfig(online=15), "`images` watched while training .setting evaluate.online. should be 2 of every class"),
    ],
)
def test_what_the_data_cannot_give_is_refused_before_training(evaluate: c.EvaluateConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(replace(TINY, evaluate=evaluate), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_computes_the_scores_that_are_asked_for(tmp_path: Path) -> None:
    asked = c.EvaluateConfig(labels=100, scores=("knn", "few_shot", "leep"))
    found = pretrain(replace(TINY, evaluate=asked), tmp_path, progress=False)["scores"]["digits"]
    assert found.keys() == {"knn", "knn_200", "few_shot_1", "few_shot_1_95", "few_shot_5", "few_shot_5_95", "leep"}


# 2. A change of class


def given(tmp_path: Path, text: str, *options: str) -> c.Config:
    (tmp_path / "mine.yaml").write_text(text)
    parser = settings_parser()
    return as_config(parser.instantiate(parser.parse_args(["--config", str(tmp_path / "mine.yaml"), *options])))


@pytest.mark.parametrize("name", ["MoCo", "DCL", "SwAV", "DINO", "SimCLR", "VICReg"])
def test_an_objective_has_its_own_settings_unless_others_are_given(name: str, tmp_path: Path) -> None:
    own = getattr(objectives, name)()
    file = tmp_path / "own.yaml"
    file.write_text(f"objective: {{class_path: {name}}}")
    assert load_config(file).objective == own
    assert given(tmp_path, "seed: 1", "--objective", name).objective == own
    assert packaged("tc2_digits", "--objective", name).objective == own  # which writes out what SimCLR has anyway
    assert given(tmp_path, to_yaml(c.Config()), "--objective", name).objective == own  # a run's config.yaml writes out all


def test_settings_that_were_given_stay(tmp_path: Path) -> None:
    simclr = "objective: {class_path: SimCLR, init_args: {temperature: 0.3}}"
    assert given(tmp_path, simclr).objective == objectives.SimCLR(0.3)
    assert given(tmp_path, simclr, "--objective", "MoCo").objective == objectives.MoCo(0.3)
    assert given(tmp_path, "seed: 1", "--objective.temperature", "0.3", "--objective", "MoCo").objective == objectives.MoCo(0.3)
    assert given(tmp_path, "seed: 1", "--objective", "MoCo", "--objective.temperature", "0.5").objective == objectives.MoCo(0.5)
    calibrator = "tc2: {calibrator: {class_path: Networks, init_args: {n_f: 16, hidden: 8}}}"
    assert given(tmp_path, calibrator).tc2.calibrator == Networks(16, hidden=8)
    assert given(tmp_path, calibrator, "--tc2.calibrator", "PCA").tc2.calibrator == PCA(16)


def test_defaults_are_what_they_were(tmp_path: Path) -> None:
    assert given(tmp_path, "seed: 0") == c.Config()
    assert given(tmp_path, "seed: 0", "--tc2.encoder_stage.adjoint.window", "2").tc2.encoder_stage.adjoint == Unrolled("graph", window=2)
    mixed = "tc2: {encoder_stage: {lr: 0.05, adjoint: {class_path: Unrolled, init_args: {mode: mixed}}}}"  # Unrolled's own, not ours
    assert given(tmp_path, mixed).tc2.encoder_stage.adjoint == Unrolled("mixed")
    (tmp_path / "again.yaml").write_text(to_yaml(given(tmp_path, mixed)))
    assert load_config(tmp_path / "again.yaml") == given(tmp_path, mixed)


# 3. The matched budget


@pytest.mark.parametrize(("warmup", "steps"), [(0, 400), (100, 300), (150, 250), (200, 200), (1000, 200)])
def test_the_matched_budget_counts_the_warm_up_as_what_it_costs(warmup: int, steps: int) -> None:
    """Reading "paper" passes m = 4 views twice in an iteration, in its warm-up once, as the base does."""
    found = budget(packaged("matched_fashion_mnist", "--tc2.warmup", str(warmup)))
    assert found["steps"] == steps
    passes = {"paper": 2048, "tasks": 1024, "matched": 1024}
    assert found["matched_by"] == {"passes": {name: n for name, n in passes.items() if warmup or name != "tasks"}}


def test_a_budget_of_seconds_times_the_warm_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(compared: dict[str, c.Config]) -> dict[str, float]:
        assert all(one.tc2.warmup == 0 for one in compared.values())  # or iteration 0, which is timed, would be one of warm-up
        assert {name: one.tc2.reading for name, one in compared.items()} == {name: name for name in compared}
        return {"paper": 3.0, "tasks": 2.0, "matched": 1.0}

    monkeypatch.setattr("metacal.train.budget.seconds_per_iteration", timed)
    assert budget(packaged("matched_seconds_fashion_mnist", "--tc2.warmup", "50"))["steps"] == 150 * 3 + 50 * 2
