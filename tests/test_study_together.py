"""Seeds trained together under vmap: the numbers, draws and folders of runs of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from metacal import adjoints, linear, objectives, study, tc2, tree
from metacal.study import together
from metacal.study.together import pretrain_together, refuse, side_by_side, stacked
from metacal.train import build, checkpoint, config, experiment, logs, settings

SMALL = settings.packaged("tc2_digits", *[f"--network.{size}=8" for size in ("width", "dim", "d", "hidden")])
SMALL = replace(
    SMALL,
    tc2=replace(SMALL.tc2, calibrator=tc2.Networks(hidden=8)),
    train=replace(SMALL.train, steps=3, batch_size=16, measure_every=2, checkpoint_every=1),
    evaluate=replace(SMALL.evaluate, labels=60),
)


def changed(base: config.Config = SMALL, **tc2_settings: Any) -> config.Config:
    return replace(base, tc2=replace(base.tc2, **tc2_settings))


NEUMANN = tc2.Stage(0.05, adjoint=adjoints.Implicit(linear.Neumann(num_steps=3, step_size=0.01)))
METHODS = {
    "base, a queue and a target": replace(changed(reading="base"), objective=objectives.MoCo(queue_size=32)),
    "tasks": changed(reading="tasks", run_tasks="loop", pairing="cross"),
    "split": changed(reading="split"),
    "paper, the second iteration calibrated": changed(reading="paper", warmup=1),
    "lookahead, exact": changed(reading="lookahead"),
    "lookahead, a linear solver": changed(reading="lookahead", encoder_stage=NEUMANN),
}


@pytest.mark.filterwarnings("ignore:The hypergradient is unreliable")  # three terms of a series: the same wrong number, then
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_of_several_runs_is_the_iteration_of_each(name: str) -> None:
    """In float64, two iterations of three runs with networks of their own; alone, stages are differentiated by one graph."""
    of = METHODS[name]
    runs = 3
    problem = replace(build.build(of, 1)[0], deal="given")
    alone, joint = build.training_method(of, problem), side_by_side(build.training_method(together._mappable(of), problem))

    def other(x: Tensor) -> Tensor:
        return x.double() + 0.1 * torch.randn_like(x, dtype=torch.float64)

    start = alone.init()
    each = [
        start._replace(
            theta=tree.map(other, start.theta),
            phi=tree.map(other, start.phi),
            target=tree.map(other, start.target),
            theta_opt=tree.to(start.theta_opt, torch.float64),
            phi_opt=tree.to(start.phi_opt, torch.float64),
            carry=tree.to(start.carry, torch.float64),
        )
        for _ in range(runs)
    ]
    all_of_them = stacked(each)
    for _ in range(2):
        views = torch.rand(runs, 16, of.tc2.num_views, 1, 8, 8, dtype=torch.float64)
        all_of_them, metrics = joint(all_of_them, views)
        steps = [alone.step(state, x) for state, x in zip(each, views, strict=True)]
        each = [state for state, _ in steps]
        # Adam divides a gradient that is zero but for rounding (a bias in front of BatchNorm) by 1e-8.
        for i, (state, own) in enumerate(steps):
            torch.testing.assert_close(tree.state_dict(together._row(all_of_them, i)), tree.state_dict(state), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(tree.index(metrics, i), own, rtol=1e-8, atol=1e-8)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "events" not in path.name}


@pytest.mark.parametrize("kind", ["base", "paper, clusters"])
def test_each_seed_leaves_what_a_run_of_its_own_leaves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = changed(reading="base") if kind == "base" else changed(reading="paper", tasks=config.Clusters())
    # Probes take seconds, and see nothing but the encoder that they are given.
    monkeypatch.setattr(experiment, "judge", lambda of, state: {"weights": {"norm": float(tree.norm(state.theta))}})
    own, joint = tmp_path / "own", tmp_path / "joint"
    found = pretrain_together(of, [3, 5], joint, progress=False)
    assert sorted(path.name for path in joint.iterdir()) == ["seed3", "seed5"]
    losses = []
    for seed in (3, 5):
        run = replace(of, seed=seed)
        expected = experiment.pretrain(run, own / f"seed{seed}", progress=False)
        here, there = joint / f"seed{seed}", own / f"seed{seed}"
        assert files(here) == files(there) - {"checkpoints/step_00000002.pt"}
        assert settings.load_config(here / "config.yaml") == run
        assert json.loads((here / "environment.json").read_text())["seed"] == seed

        rows, expected_rows = logs.read_metrics(here), logs.read_metrics(there)
        assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row == pytest.approx(expected_row, rel=2e-3, abs=1e-4)
        losses.append(rows[-1]["loss"])

        results = json.loads((here / "results.json").read_text())
        assert results == json.loads(json.dumps(found[seed]))
        assert results.pop("together") == [3, 5]
        assert results.keys() == expected.keys()
        assert (results["steps"], results["images_per_step"]) == (expected["steps"], expected["images_per_step"])
        assert 0 < results["seconds_per_step"] < 60
        assert results["scores"]["weights"]["norm"] == pytest.approx(expected["scores"]["weights"]["norm"], rel=1e-4)
        assert results["measured"] == pytest.approx(expected["measured"], rel=2e-3, abs=1e-4)

        mine, theirs = checkpoint.latest(here / "checkpoints"), checkpoint.latest(there / "checkpoints")
        assert mine is not None
        assert theirs is not None
        assert mine.step == theirs.step == 3
        # Every draw was the same, bit for bit, and so is what would be drawn next.
        assert torch.equal(mine.random_state["torch"], theirs.random_state["torch"])
        assert torch.equal(mine.random_state["numpy"][1], theirs.random_state["numpy"][1])
        assert mine.random_state["python"] == theirs.random_state["python"]
        assert experiment.restore(run, here).step == 3
    assert abs(losses[0] - losses[1]) > 1e-3, "the seeds trained one network"


def stop_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """The next joint training is interrupted where it would draw this iteration's images."""
    prepare = experiment.prepare

    def interrupted(of: config.Config) -> experiment.Prepared:
        run = prepare(of)

        def sample(t: int, *num_views: int) -> Tensor:
            if t == iteration:
                raise KeyboardInterrupt
            return run.sample(t, *num_views)

        return run._replace(sample=sample)

    monkeypatch.setattr(together, "prepare", interrupted)


def states(folder: Path) -> list[dict[str, Tensor]]:
    found = [checkpoint.latest(folder / f"seed{seed}" / "checkpoints") for seed in (3, 5)]
    return [one.tensors["state"] for one in found if one is not None]


def test_what_is_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, progress = replace(changed(reading="base"), train=replace(SMALL.train, measure_every=0, checkpoint_every=1)), False
    # What a run does once it is trained is another test's.
    judged: list[int] = []
    monkeypatch.setattr(together, "pretrain", lambda of, folder, **_: judged.append(of.seed))
    pretrain_together(of, [3, 5], tmp_path / "whole", progress=progress)
    whole = states(tmp_path / "whole")
    assert len(whole) == 2

    folder = tmp_path / "stopped"
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        pretrain_together(of, [3, 5], folder, progress=progress)
    assert [path.name for path in folder.glob("together-*")] == ["together-3-5"]
    stop_at(monkeypatch, 1)  # which is behind it
    with pytest.raises(ValueError, match="other settings"):
        pretrain_together(replace(of, train=replace(of.train, lr=1.0)), [3, 5], folder, progress=progress)
    pretrain_together(of, [3, 5], folder, progress=progress)
    assert sorted(path.name for path in folder.iterdir()) == ["seed3", "seed5"]
    for mine, theirs in zip(states(folder), whole, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = [logs.read_metrics(place / "seed5") for place in (folder, tmp_path / "whole")]
    assert rows[0] == rows[1]

    # Trained already: nothing is drawn any more, every seed is judged.
    judged.clear()
    stop_at(monkeypatch, 0)
    pretrain_together(of, [3, 5], folder, progress=progress)
    assert judged == [3, 5]


def test_groups_are_what_was_interrupted_together_and_what_has_not_begun(tmp_path: Path) -> None:
    groups: Callable[[list[int]], list[list[int]]] = lambda seeds: together._groups(tmp_path, seeds)  # noqa: E731
    assert groups([1, 2, 3]) == [[1, 2, 3]]
    (tmp_path / "together-1-2").mkdir()
    assert groups([1, 2, 3, 4]) == [[1, 2], [3, 4]]
    assert groups([2, 3]) == [[2, 3]]  # seed 1 is not wanted any more: another group
    for seed in (1, 4):  # the group had begun to leave its folders, and 4 was started by itself
        checkpoint.save(tmp_path / f"seed{seed}" / "checkpoints", 1, {})
    assert groups([1, 2, 3, 4]) == [[1, 2], [3]]
    (tmp_path / "together-1-2").rmdir()
    assert groups([1, 4]) == []


REFUSED = {
    "pcgrad": changed(reading="pcgrad"),
    "upgrad": changed(reading="upgrad"),
    "seconds": changed(reading="matched", budget="seconds"),
    "SIGReg": replace(SMALL, objective=objectives.SIGReg()),
    "MAE": replace(SMALL, objective=objectives.MAE()),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_be_mapped_is_refused_before_anything_runs(word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{word}.*Set it to false"):
        pretrain_together(REFUSED[word], [1, 2], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for of in METHODS.values():
        refuse(of)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_different_numbers(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`seeds`"):
        pretrain_together(SMALL, seeds, tmp_path)


@dataclass(frozen=True)
class Drawing(objectives.SSLObjective):
    """One that draws inside the loss, unlike this library's own."""

    def __call__(self, outputs: objectives.Outputs, carry: Any = ()) -> Tensor:
        return (outputs.z * torch.randn_like(outputs.z)).mean()


@dataclass(frozen=True)
class Peeking(objectives.SSLObjective):
    """One whose loss the host reads."""

    def __call__(self, outputs: objectives.Outputs, carry: Any = ()) -> Tensor:
        loss = outputs.z.square().mean()
        return loss if loss > 0 else -loss


@pytest.mark.parametrize("objective", [Drawing(), Peeking()], ids=["draws", "is read by the host"])
def test_what_vmap_refuses_is_an_error_that_names_the_remedy(objective: objectives.SSLObjective) -> None:
    method = build.build(replace(changed(reading="base"), objective=objective), 1)[1]
    with pytest.raises(RuntimeError, match=r"(?s)cannot be trained together.*vmap.*Set `together` to false"):
        side_by_side(method)(stacked([method.init(), method.init()]), torch.rand(2, 8, 2, 1, 8, 8))


def test_errors_that_are_not_vmaps_stay_as_they_are() -> None:
    method = build.build(changed(reading="base"), 1)[1]
    with pytest.raises(ValueError, match="other channels") as caught:
        side_by_side(method)(stacked([method.init(), method.init()]), torch.rand(2, 8, 2, 3, 8, 8))  # three channels
    assert "together" not in str(caught.value)


TINY: dict[str, Any] = {
    "title": "Together",
    "base": "tc2_digits",
    "settings": {
        "network": {"width": 8, "dim": 8, "d": 8, "hidden": 8},
        "train": {"steps": 2, "batch_size": 16, "measure_every": 0},
        "evaluate": {"labels": 60},
    },
    "seeds": [3, 4],
    "grid": {"method": {"base": {"tc2": {"reading": "base"}}, "odd": {"tc2": {"reading": "tasks", "num_tasks": 7}}}},
    "together": True,
}


def written(folder: Path, **changes: Any) -> study.Study:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}), encoding="utf-8")
    return study.load_study(path)


@pytest.mark.slow
def test_a_study_trains_the_seeds_of_each_place_in_one_process(tmp_path: Path) -> None:
    plan, out = written(tmp_path), tmp_path / "out"
    failed = study.run(plan, out, progress=False)
    assert [cell.path for cell in failed] == [Path("odd/seed3"), Path("odd/seed4")]
    for cell in failed:
        assert "num_tasks" in (out / cell.path / "log.txt").read_text(encoding="utf-8")
    for seed in (3, 4):
        results = json.loads((out / "base" / f"seed{seed}" / "results.json").read_text())
        assert (results["steps"], results["together"]) == (2, [3, 4])
    finding = next(found for found in study.findings(plan, out) if found.names == {"method": "base"})
    assert finding.values["digits probe"].keys() == {3, 4}
    alone = written(tmp_path, together=False, grid={"method": {"base": TINY["grid"]["method"]["base"]}})
    assert study.run(alone, out, progress=False) == [], "the settings of a run say nothing of who trains it"


def test_a_study_refuses_what_cannot_be_trained_together(tmp_path: Path) -> None:
    plan = written(tmp_path, grid={"method": {"base": {"tc2": {"reading": "pcgrad"}}}})
    with pytest.raises(ValueError, match=r"base: `together`.*pcgrad"):
        study.run(plan, tmp_path / "out", progress=False)
    assert [cell.settings for cell in study.cells(plan)] == [cell.settings for cell in study.cells(replace(plan, together=False))]
