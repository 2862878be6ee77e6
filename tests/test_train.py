"""Long runs: killed anywhere and resumed they end with the same bits; broken files and NaNs lose nothing.

Run as a script this file is the process that gets killed: see :func:`_main`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from metacal import data, evaluate, objectives, tree
from metacal.evaluate.parts import at_most
from metacal.tc2 import PCA
from metacal.train import _files as files
from metacal.train import budget, checkpoint, environment, experiment, fit, logs, loop, pictures, report, sampling, settings
from metacal.train import config as train_config
from metacal.train.build import build

NUM_STEPS = 160
quiet: dict[str, Any] = {"progress": False, "tensorboard": False}


class Momentum(NamedTuple):
    params: dict[str, Tensor]
    velocity: dict[str, Tensor]
    count: Tensor


def start() -> Momentum:
    environment.seed_everything(7)
    params = {"w1": torch.randn(8, 300) / 3, "w2": torch.randn(300, 1) / 20}
    return Momentum(params, tree.zeros_like(params), torch.tensor(0))


def noisy_step(state: Momentum, step: int) -> tuple[Momentum, dict[str, Any]]:
    """Momentum SGD on data that all three generators have a part in."""
    x = torch.randn(16, 8) * random.uniform(0.5, 1.5) + float(np.random.normal())  # noqa: NPY002
    params = {name: w.detach().requires_grad_() for name, w in state.params.items()}
    hidden = torch.nn.functional.dropout(torch.tanh(x @ params["w1"]), 0.3)
    loss = (hidden @ params["w2"] - x.sum(1, keepdim=True).sin()).square().mean()
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    velocity = tree.axpy(0.9, state.velocity, grads)
    return Momentum(tree.detach(tree.axpy(-0.01, velocity, params)), velocity, state.count + 1), {"loss": loss, "uniform": random.random()}


# --- killed ---


def _train(folder: Path, *, resume: bool = True) -> Momentum:
    return fit(noisy_step, start(), NUM_STEPS, folder, checkpoint_every=7, log_every=3, resume=resume, **quiet)


def _kill_on(owner: Any, name: str, call: int, *, after: bool = False, before: Callable[..., None] = lambda *_: None) -> None:
    """Replaces ``owner.name`` by a function that kills this process at its ``call``-th call."""
    real = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def _half_a_checkpoint(content: Any, file: Any) -> None:
    whole = pickle.dumps(content)
    file.write(whole[: len(whole) // 2])
    file.flush()


def _half_a_line(log: logs.Logs, step: int, metrics: Any) -> None:
    log._file.write(b'{"step": ' + str(step).encode() + b', "lo')
    log._file.flush()


# Each life of the run ends at one of these moments. A life starts from the last checkpoint, so that the counts begin anew.
MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: _kill_on(torch.autograd, "grad", 5),
    "between two checkpoints": lambda: _kill_on(torch.autograd, "grad", 18),
    "at the end of a step that was logged": lambda: _kill_on(logs.Logs, "write", 12, after=True),
    "in the middle of a log line": lambda: _kill_on(logs.Logs, "write", 9, before=_half_a_line),
    "before the log is on the disk": lambda: _kill_on(logs.Logs, "flush", 2),
    "in the middle of writing a checkpoint": lambda: _kill_on(torch, "save", 2, before=_half_a_checkpoint),
    "before a checkpoint gets its name": lambda: _kill_on(os, "replace", 3),  # the first call opens the log
    "after a checkpoint got its name": lambda: _kill_on(os, "replace", 3, after=True),
    "while an old checkpoint is removed": lambda: _kill_on(Path, "unlink", 1),
    "while the log is opened": lambda: _kill_on(os, "replace", 1),
}


def _tell_on_first_step(writer: int) -> None:
    real = torch.autograd.grad

    def telling(*args: Any, **kwargs: Any) -> Any:
        torch.autograd.grad = real
        os.write(writer, b"!")
        return real(*args, **kwargs)

    torch.autograd.grad = telling


def _main(folder: Path, num_random_moments: int) -> None:
    """Lives and dies in forked children: first at the named moments, then at random ones, then to the end."""

    def live(ending: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            ending()
            _train(folder)
            os._exit(0)
        return child

    def killed(child: int) -> bool:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    for moment, ending in MOMENTS.items():
        print(f"{moment}: {'killed' if killed(live(ending)) else 'survived'}")
    moments = random.Random(0)
    for _ in range(num_random_moments):
        reader, writer = os.pipe()
        child = live(lambda writer=writer: _tell_on_first_step(writer))  # type: ignore[misc]
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        time.sleep(moments.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        killed(child)
    assert not killed(live(lambda: None))


def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed = _train(tmp_path / "undisturbed", resume=False)
    # As an error, because no kill may leave a checkpoint that cannot be read.
    command = [sys.executable, "-W", "error::RuntimeWarning", __file__, str(tmp_path / "killed"), "8"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{moment}: killed" for moment in MOMENTS]

    ours, theirs = (checkpoint.latest(tmp_path / run / loop.CHECKPOINTS) for run in ("undisturbed", "killed"))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step == NUM_STEPS
    for path, value in tree.state_dict(undisturbed).items():
        assert torch.equal(theirs.tensors["state"][path], value), path
    assert torch.equal(ours.random_state["torch"], theirs.random_state["torch"])
    assert ours.random_state["python"] == theirs.random_state["python"]

    rows = logs.read_metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert rows == logs.read_metrics(tmp_path / "undisturbed")
    # Nothing is left behind but the two newest checkpoints, and one more if the last kill came between writing one and deleting one.
    *more, before, last = sorted(p.name for p in (tmp_path / "killed" / loop.CHECKPOINTS).iterdir())
    assert (before, last) == ("step_00000154.pt", "step_00000160.pt")
    assert more in ([], ["step_00000147.pt"])


@pytest.mark.parametrize(("number", "leaves_by"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_polite_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals, leaves_by: type[BaseException]) -> None:
    def step_fn(state: Momentum, step: int) -> tuple[Momentum, dict[str, Any]]:
        if step == 40:
            signal.raise_signal(number)
        return noisy_step(state, step)

    undisturbed = _train(tmp_path / "undisturbed", resume=False)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(leaves_by) as caught:
        fit(step_fn, start(), NUM_STEPS, tmp_path / "run", checkpoint_every=1000, **quiet)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    if leaves_by is SystemExit:
        assert caught.value.args == (143,)
    found = checkpoint.latest(tmp_path / "run" / loop.CHECKPOINTS)
    assert found is not None
    assert found.step == 41  # the step that was under way is not lost
    resumed = _train(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(resumed), tree.leaves(undisturbed), strict=True))


# --- the loop ---


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    fit(noisy_step, start(), 3, tmp_path, **quiet)
    with pytest.raises(FileExistsError, match=r"already holds a run\. Pass resume=True"):
        fit(noisy_step, start(), 3, tmp_path, **quiet)


def test_a_finished_run_resumes_to_its_end_and_can_be_prolonged(tmp_path: Path) -> None:
    ten = fit(noisy_step, start(), 10, tmp_path / "a", **quiet)

    def forbidden(state: Momentum, step: int) -> Any:
        raise RuntimeError("a finished run took another step")

    again = fit(forbidden, start(), 10, tmp_path / "a", resume=True, **quiet)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(ten), strict=True))
    longer = fit(noisy_step, start(), 15, tmp_path / "a", resume=True, **quiet)
    straight = fit(noisy_step, start(), 15, tmp_path / "b", **quiet)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(longer), tree.leaves(straight), strict=True))
    with pytest.raises(ValueError, match=r"`num_steps` is 5, but the checkpoint .* after 15 steps"):
        fit(noisy_step, start(), 5, tmp_path / "a", resume=True, **quiet)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(noisy_step, start(), 2, tmp_path, **quiet)
    with pytest.raises(ValueError, match=r"'params\.w1' should have shape \(2,\), got \(8, 300\)"):
        fit(noisy_step, start()._replace(params={"w1": torch.zeros(2), "w2": torch.zeros(300, 1)}), 4, tmp_path, resume=True, **quiet)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_a_metric_that_is_not_finite_stops_the_run(tmp_path: Path, value: float | Tensor) -> None:
    def step_fn(state: Momentum, step: int) -> tuple[Momentum, dict[str, Any]]:
        state, metrics = noisy_step(state, step)
        return state, {**metrics, "conflict": value if step == 23 else 0.5}

    message = r"The metric 'conflict' is (nan|-?inf) at step 23\. The run stopped; the checkpoints"
    with pytest.raises(loop.NonFiniteError, match=message) as error:
        fit(step_fn, start(), 40, tmp_path, checkpoint_every=10, log_every=7, **quiet)
    assert (error.value.step, error.value.term) == (23, "conflict")
    found = checkpoint.latest(tmp_path / loop.CHECKPOINTS)
    assert found is not None
    assert found.step == 20
    assert [row["step"] for row in logs.read_metrics(tmp_path)] == list(range(23))
    resumed = fit(noisy_step, start(), 40, tmp_path, resume=True, **quiet)
    straight = fit(noisy_step, start(), 40, tmp_path / "straight", **quiet)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(resumed), tree.leaves(straight), strict=True))


def test_a_run_that_fails_at_once_says_that_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(loop.NonFiniteError, match=r"at step 0\. The run stopped; there was no checkpoint yet\. Lower the learning rates"):
        fit(lambda state, step: (state, {"loss": float("nan")}), start(), 40, tmp_path, **quiet)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    def step_fn(state: Momentum, step: int) -> tuple[Momentum, dict[str, Any]]:
        state, _ = noisy_step(state, step)
        if step == 14:
            state.velocity["w2"][4] = float("nan")
        return state, {}

    with pytest.raises(loop.NonFiniteError, match=r"The state's 'velocity\.w2' holds nan after step 14") as error:
        fit(step_fn, start(), 40, tmp_path, checkpoint_every=5, **quiet)
    assert (error.value.step, error.value.term) == (14, "velocity.w2")
    assert sorted(p.name for p in (tmp_path / loop.CHECKPOINTS).iterdir()) == ["step_00000005.pt", "step_00000010.pt"]


def test_metrics_are_numbers_and_their_graphs_are_let_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric 'loss' should be a float or a 0-dim tensor, got a tensor of shape \(2,\)"):
        fit(lambda s, i: (s, {"loss": torch.zeros(2)}), start(), 1, tmp_path / "a", **quiet)

    graphs: list[weakref.ref[Any]] = []

    def step_fn(state: Momentum, step: int) -> tuple[Momentum, dict[str, Any]]:
        assert all(graph() is None for graph in graphs), "an earlier step's graph is still alive"
        loss = torch.ones(3, requires_grad=True).sum()
        graphs.append(weakref.ref(loss))
        return state, {"loss": loss}

    fit(step_fn, start(), 5, tmp_path / "b", **quiet)
    assert len(graphs) == 5


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the leaf at 'count' is a int"):
        fit(noisy_step, start()._replace(count=0), 10, tmp_path, **quiet)  # type: ignore[arg-type]
    for name in ("checkpoint_every", "log_every"):
        with pytest.raises(ValueError, match=f"`{name}` should be at least 1, got 0"):
            fit(noisy_step, start(), 10, tmp_path, **{name: 0}, **quiet)


def test_progress_bar_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(noisy_step, start(), 4, tmp_path, log_every=1)
    assert "4/4" in capsys.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    assert written == {row["step"]: pytest.approx(row["loss"]) for row in logs.read_metrics(tmp_path)}


@pytest.mark.cuda
def test_a_run_on_cuda_resumes(tmp_path: Path) -> None:
    def step_fn(state: dict[str, Tensor], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        w = state["w"] + torch.randn(5, device="cuda")
        return {"w": w}, {"norm": w.norm()}

    def begin() -> dict[str, Tensor]:
        environment.seed_everything(1)
        return {"w": torch.randn(5, device="cuda")}

    straight = fit(step_fn, begin(), 9, tmp_path / "a", **quiet)
    fit(step_fn, begin(), 4, tmp_path / "b", **quiet)
    resumed = fit(step_fn, begin(), 9, tmp_path / "b", resume=True, **quiet)
    assert resumed["w"].is_cuda
    assert torch.equal(resumed["w"], straight["w"])


# --- checkpoints ---


def _two_checkpoints(folder: Path) -> list[Path]:
    return [checkpoint.save(folder, step, {"state": {"w": torch.full((50,), float(step))}}, {"step": step}) for step in (10, 20)]


def _damaged(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    if damage == "planted code":

        class Planted:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(path.parent / "planted"),)

        torch.save({"step": 20, "tensors": Planted()}, path)
    else:
        cut = {"empty": b"", "truncated": whole[: len(whole) // 2], "short by a byte": whole[:-1], "garbage": b"\x17" * 999}
        path.write_bytes(cut[damage])


@pytest.mark.parametrize("damage", ["empty", "truncated", "short by a byte", "garbage", "planted code"])
def test_a_checkpoint_that_cannot_be_read_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    _, newest = _two_checkpoints(tmp_path)
    _damaged(newest, damage)
    with pytest.warns(RuntimeWarning, match=r"step_00000020\.pt cannot be read \(\w+: .+\)\. Going back to step_00000010\.pt"):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, found.meta, found.tensors["state"]["w"][0].item()) == (10, {"step": 10}, 10.0)
    assert not (tmp_path / "planted").exists()
    # The run goes on from there; the broken one is out of the way and does not push out a good one.
    checkpoint.save(tmp_path, 15, {})
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step_00000010.pt", "step_00000015.pt"]


def test_a_checkpoint_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    path = _two_checkpoints(tmp_path)[1]
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            assert checkpoint.latest(tmp_path).step == 10  # type: ignore[union-attr]


def test_when_none_can_be_read_the_error_says_what_to_do(tmp_path: Path) -> None:
    for path in _two_checkpoints(tmp_path):
        _damaged(path, "truncated")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"No checkpoint .* can be read: step_00000020\.pt \(.*; step_00000010\.pt \(.*Put a good copy"
    ):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "elsewhere") is None


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    state = start()
    big = torch.randn(10_000)
    path = checkpoint.save(tmp_path, 3, {"state": tree.state_dict(state), "views": {"row": big[:5]}}, {"seed": 7, "names": ["a"]}, keep=1)
    assert path.stat().st_size < 5 * 10_000  # a view does not bring its storage along
    drawn = (torch.rand(2), random.random(), np.random.rand())  # noqa: NPY002
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.meta) == (path, 3, {"seed": 7, "names": ["a"]})
    restored = tree.load_state_dict(state, found.tensors["state"])
    assert isinstance(restored, Momentum)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tree.leaves(restored), tree.leaves(state), strict=True))
    environment.set_random_state(found.random_state)
    assert torch.equal(torch.rand(2), drawn[0])
    assert (random.random(), np.random.rand()) == drawn[1:]  # noqa: NPY002
    checkpoint.save(tmp_path, 4, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004.pt"]
    with pytest.raises(ValueError, match="`keep` should be at least 1"):
        checkpoint.save(tmp_path, 5, {}, keep=0)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fill_the_disk() -> None:
        with files.replacing(path) as file:
            file.write(b"ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


# --- logs, environment ---


def test_logs_tolerate_half_a_line_at_the_end_only(tmp_path: Path) -> None:
    file = tmp_path / logs.FILE
    file.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert logs.read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]
    with logs.Logs(tmp_path, first_step=1) as log:
        log.write(1, {"loss": 0.25})
    assert file.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.25}\n'
    file.write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .* is not JSON"):
        logs.read_metrics(tmp_path)
    assert logs.read_metrics(tmp_path / "elsewhere") == []


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert environment.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"`device` is 'cuda', but torch .* sees 0 CUDA devices here\. Use 'auto' or 'cpu'"):
        environment.resolve_device("cuda")
    with pytest.raises(ValueError, match=r"`device` should be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got 'gpu'"):
        environment.resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.resolve_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        environment.resolve_device("cuda:2")


def test_seeds_and_environment(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    environment.seed_everything(5)
    first = draw()
    environment.seed_everything(5)
    assert draw() == first
    environment.seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    with pytest.raises(ValueError, match=r"`seed` should be from 0 to 2\*\*32 - 1, got -1"):
        environment.seed_everything(-1)

    described = environment.write_environment(tmp_path / "run", seed=5, device="cpu")
    assert json.loads((tmp_path / "run" / environment.ENVIRONMENT).read_text()) == described
    assert (described["seed"], described["device"]) == (5, "cpu")
    assert described["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_commit_is_that_of_the_repository_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("x = 1\n")
    assert environment._git_commit(tracked) is None
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "first")
    untracked.write_text("")
    commit = git("rev-parse", "HEAD")
    assert environment._git_commit(tracked) == commit
    assert environment._git_commit(untracked) is None
    tracked.write_text("x = 2\n")
    assert environment._git_commit(tracked) == f"{commit}-dirty"


# --- the report ---


class Page(HTMLParser):
    """What a browser would see: tags, text, the table's cells by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.best: list[str] = []
        self.text = ""
        self._in_best = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "srcset")]
        self._in_best = tag == "td" and "best" in (dict(attrs).get("class") or "").split()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_best:
            self.best.append(data)


NASTY = "<script>alert('x')</script> & \"$\\frac$"


def test_a_report_is_one_file_that_shows_everything(tmp_path: Path) -> None:
    rows: list[dict[str, report.Cell]] = [
        {"method": "base", "accuracy": (0.912, 0.01), "seconds": 2.0, "views": 2, "conflicts": None},
        {"method": "TC²", "accuracy": (0.934, 0.02), "seconds": 3.5, "views": 4, "conflicts": 0.25},
        {"method": "diverged", "accuracy": float("nan"), "seconds": 2.0, "views": 4},
    ]
    rows.append({"method": f"row {NASTY}"})
    lines = {f"line {NASTY}": ([0, 1, 2], [3.0, 2.0, float("nan")]), "_hidden": ([0], [1.0])}
    conflict = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    shown = report.Report(
        title=f"Title {NASTY}",
        intro=[f"Intro {NASTY}"],
        tables=[report.Table(f"Table {NASTY}", rows, {"accuracy": "max", "seconds": "min"}, f"note {NASTY}")],
        curves=[pictures.Curves(f"Panel {NASTY}", lines, y_label=NASTY), pictures.Curves("nothing yet", {})],
        matrices=[pictures.Matrix("Conflict", conflict, x_label=NASTY), pictures.Matrix("zeros", np.zeros((3, 2)))],
        footnotes=[f"Seeds 1, 2, 3 {NASTY}"],
    )
    path = report.write(tmp_path / "new" / "report.html", shown)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(NASTY) == 11, "title twice, intro, table, row, note, panel, line, two labels, footnote"
    assert "_hidden" in page.text
    assert page.tags.count("svg") == 4
    assert page.best == ["2", "0.934 ± 0.02", "2"], "ties share the mark"
    assert "0.934 ± 0.02" in page.text
    assert "–" in page.text
    assert "-0.5" in page.text, "the matrix is annotated"
    assert [link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert "@import" not in text
    assert "url(http" not in text
    assert len(page.ids) == len(set(page.ids)), "ids of different pictures collide"
    assert "#010203" not in text
    assert "currentColor" in text


def test_equal_reports_are_equal_files(tmp_path: Path) -> None:
    same = report.Report("same", curves=[pictures.Curves("c", {"a": ([0, 1], [1.0, 2.0])})], matrices=[pictures.Matrix("m", np.eye(2))])
    assert report.write(tmp_path / "a.html", same).read_bytes() == report.write(tmp_path / "b.html", same).read_bytes()


def test_reports_refuse_what_they_cannot_show(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`best` of the table 'T' names 'acc', which is no column: accuracy"):
        report.write(tmp_path / "r.html", report.Report("r", tables=[report.Table("T", [{"accuracy": 1.0}], {"acc": "max"})]))
    with pytest.raises(ValueError, match=r"`values` of the matrix 'M' should have two dimensions, got shape \(3,\)"):
        report.write(tmp_path / "r.html", report.Report("r", matrices=[pictures.Matrix("M", [1.0, 2.0, 3.0])]))


# --- what a run draws, and for how long ---


NOTHING = data.Augmentation()
SMALL = train_config.Config(
    network=train_config.NetworkConfig(width=8, dim=8, d=8, hidden=8),
    tc2=train_config.TC2Config(calibrator=PCA(n_f=4)),
    train=train_config.TrainConfig(steps=3, batch_size=32, measure_every=2, threads=1),
    evaluate=train_config.EvaluateConfig(labels=200),
    device="cpu",
)


def changed(tc2: dict[str, Any], **over: Any) -> train_config.Config:
    return replace(SMALL, tc2=replace(SMALL.tc2, **tc2), **over)


def constant_images(name: str = "digits", size: int = 8, channels: int = 1, per_class: int = 30) -> data.Images:
    """Images of one value each, a tenth of their label."""
    labels = torch.arange(10).repeat(per_class)
    return data.Images((labels / 10)[:, None, None, None].expand(-1, channels, size, size).clone(), labels, name, num_classes=10)


def drawn_labels(config: train_config.Config, t: int) -> Tensor:
    """The labels [K, n] of iteration t's tasks."""
    x = sampling.sampler(replace(config, data=replace(config.data, augmentation=NOTHING)), constant_images())(t)
    assert x.shape == (32, 4, 1, 8, 8)
    labels = (10 * x).round()
    assert (labels == labels[:, :1, :1, :1, :1]).all()  # without augmentation all views are the image
    return labels[:, 0, 0, 0, 0].long().reshape(config.tc2.num_tasks, -1)


def test_every_batch_holds_as_many_samples_of_each_domain() -> None:
    by_default = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))  # ten classes in four runs
    for given, groups in (((), by_default), (((9, 0), (1,), (2, 3, 4), (5,)),) * 2):
        config = changed({"tasks": train_config.Domains(classes=given)})
        tasks = torch.cat([drawn_labels(config, t) for t in range(6)], 1)
        for group, found in zip(groups, tasks, strict=True):
            assert set(found.tolist()) == set(group)
    assert not torch.equal(drawn_labels(config, 0), drawn_labels(config, 1))
    assert torch.equal(drawn_labels(config, 1), drawn_labels(config, 1))


def test_domains_may_be_data_sets_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {"digits": (8, 1), "mnist": (28, 1), "cifar10": (32, 3)}
    value = {"digits": 0.1, "mnist": 0.5, "cifar10": 0.9}

    def load(name: str, *_: Any, **__: Any) -> data.Images:
        images = constant_images(name, *forms[name])
        return replace(images, images=torch.full_like(images.images, value[name]))

    monkeypatch.setattr(sampling, "load", load)
    sets = ("mnist", "digits", "cifar10", "mnist")
    config = changed({"tasks": train_config.Domains(sets=sets)}, data=train_config.DataConfig(augmentation=NOTHING))
    x = sampling.sampler(config, sampling.training_images(config))(3)
    assert x.shape == (32, 4, 1, 8, 8)
    expected = torch.tensor([value[name] for name in sets])
    torch.testing.assert_close(x.reshape(4, -1), expected[:, None].expand(4, 8 * 4 * 64), rtol=0, atol=0.01)  # grey, in 8 bits


def test_every_task_has_its_family_of_augmentations() -> None:
    chosen = (NOTHING, data.Augmentation(flip=1.0), data.Augmentation(brightness=0.5, jitter=1.0), NOTHING)
    images = data.load("digits", "train")

    def draw(kind: train_config.Tasks, **over: Any) -> Tensor:
        config = changed({"tasks": kind, **over}, data=train_config.DataConfig(augmentation=NOTHING))
        return sampling.sampler(config, images)(0).unflatten(0, (config.tc2.num_tasks, -1))

    plain, found = draw(train_config.Random()), draw(train_config.Augmentations(chosen))
    for k, expected in ((0, plain[0]), (1, plain[1].flip(-1)), (3, plain[3])):
        torch.testing.assert_close(found[k], expected)
    ratio = (found[2] / plain[2])[(plain[2] > 0) & (found[2] < 1)]
    assert ratio.std() > 0.1  # other brightness for every view
    by_default = draw(train_config.Augmentations())
    assert all(not torch.allclose(block[:, 0], block[:, 1]) for block in by_default)  # each family makes views that differ


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (train_config.Domains(classes=((0,), (1,))), r"`classes` should be one for each of the K = 4 tasks, got 2"),
        (train_config.Domains(sets=("digits",)), r"`sets` should be one for each of the K = 4 tasks, got 1"),
        (train_config.Domains(classes=((0,), (1,), (2,), (11,))), r"groups of at least n = 8 training images.*\[11\] has 0"),
        (train_config.Augmentations((NOTHING,)), r"`families` should be one for each of the K = 4 tasks, got 1"),
    ],
)
def test_tasks_that_are_not_k_are_refused(kind: train_config.Tasks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.sampler(changed({"tasks": kind}), constant_images())
    with pytest.raises(ValueError, match="pass one of the two"):
        train_config.Domains(classes=((0,),), sets=("digits",))
    with pytest.raises(ValueError, match=r"N = 32 samples do not make K = 5 equal tasks"):
        sampling.sampler(changed({"tasks": kind, "num_tasks": 5}), constant_images())


FOUR = (objectives.SimCLR(), objectives.BYOL(), objectives.VICReg(2.5, 2.5, 0.1), objectives.SimSiam())
KINDS = {
    "clusters": train_config.Clusters(),
    "domains": train_config.Domains(),
    "augmentations": train_config.Augmentations(),
    "objectives": train_config.Objectives(FOUR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_any_tasks_leaves_its_conflict_and_that_of_shuffled_tasks(kind: str, tmp_path: Path) -> None:
    config = changed({"tasks": KINDS[kind]})
    results = experiment.pretrain(config, tmp_path, progress=False)
    rows = [row for row in logs.read_metrics(tmp_path) if "conflict_rate" in row]
    assert [row["step"] for row in rows] == [1]
    assert {"conflict_rate", "conflict_severity", "resplit_conflict_rate", "resplit_conflict_severity"} <= rows[0].keys()
    pairs = torch.tensor([rows[0][f"cosine_{i}_{j}"] for i in range(1, 5) for j in range(i + 1, 5)])
    assert rows[0]["conflict_rate"] == pytest.approx((pairs < 0).double().mean().item())
    assert rows[0]["conflict_severity"] == pytest.approx(pairs.clamp(max=0).mean().item(), abs=1e-6)
    assert sum(name.startswith("cosine_") for name in rows[0]) == len(pairs)
    assert torch.tensor(results["cosines"]).shape == (4, 4)
    assert settings.load_config(tmp_path / "config.yaml") == config
    images = budget.images_per_step(config)
    assert images == {"clusters": 9, "domains": 8, "augmentations": 8, "objectives": 8 + 4}[kind] * 32  # BYOL's target counts


def test_the_last_measurement_is_the_mean_over_batches(tmp_path: Path) -> None:
    config = changed({}, train=replace(SMALL.train, measure_every=0, measure_batches=3))
    results = experiment.pretrain(config, tmp_path, progress=False)
    run, state = experiment.prepare(config), experiment.restore(config, tmp_path)
    each = [run.measured(state, 3 + i) for i in range(3)]
    assert not torch.allclose(each[0].cosines, each[1].cosines)
    cosines = torch.stack([m.cosines for m in each]).mean(0)
    torch.testing.assert_close(torch.tensor(results["cosines"]), cosines, rtol=1e-5, atol=1e-6)
    rate = sum(float(m.scalars["conflict_rate"]) for m in each) / 3
    assert results["measured"]["conflict_rate"] == pytest.approx(rate)
    with pytest.raises(ValueError, match="`measure_batches` should be at least 1, got 0"):
        replace(SMALL.train, measure_batches=0)


def test_scores_while_training_are_those_of_held_out_images_and_change_nothing(tmp_path: Path) -> None:
    config = changed({}, train=replace(SMALL.train, steps=4), evaluate=replace(SMALL.evaluate, online=120))
    experiment.pretrain(config, tmp_path / "watched", progress=False)
    experiment.pretrain(replace(config, evaluate=SMALL.evaluate), tmp_path / "plain", progress=False)
    watched, plain = (logs.read_metrics(tmp_path / name) for name in ("watched", "plain"))
    scores = {"online_probe", "online_knn", "rank_me", "dimension_std"}
    assert [row["step"] for row in watched if scores <= row.keys()] == [1, 3]
    ours = [{name: value for name, value in row.items() if name not in scores} for row in watched]
    assert ours == plain
    held_out = data.split_validation(data.load("digits", "train"), 0.1, seed=0)[1]
    assert len(held_out) > 120
    state = experiment.restore(config, tmp_path / "watched")
    expected = evaluate.online(build(config, 1)[0], state, at_most(held_out, 120))
    assert {name: watched[-1][name] for name in scores} == pytest.approx({name: float(value) for name, value in expected.items()})


def test_a_run_matched_by_seconds_keeps_its_steps_when_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed({"reading": "matched", "budget": "seconds"})
    clock = iter([{"paper": 5.0, "matched": 2.0}, {"paper": 9.0, "matched": 1.0}])
    monkeypatch.setattr(budget, "seconds_per_iteration", lambda both: next(clock))
    results = experiment.pretrain(config, tmp_path, progress=False)
    assert results["steps"] == round(3 * 2.5)
    assert results["matched_by"] == {"seconds": {"paper": 5.0, "matched": 2.0}}
    again = experiment.pretrain(config, tmp_path, resume=True, progress=False)
    assert {**again, "seconds_per_step": 0} == {**results, "seconds_per_step": 0}
    assert budget.budget(config)["steps"] == 27  # a new run measures anew


def test_iterations_are_timed_in_turns_and_leave_the_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    trial = budget._trial

    def counted(config: train_config.Config) -> Callable[[], object]:
        step = trial(config)
        return lambda: (turns.append(config.tc2.reading), step())

    monkeypatch.setattr(budget, "_trial", counted)
    before = torch.get_rng_state()
    both = {"paper": SMALL, "matched": changed({"reading": "base"})}
    seconds = budget.seconds_per_iteration(both, repeats=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert turns == ["paper", "base"] * 3
    assert seconds.keys() == both.keys()
    assert all(0 < value < 60 for value in seconds.values())


CONTROLS: dict[str, dict[str, Any]] = {  # of the paper's list; the packaged configuration and what it changes in TC²'s
    "base": {"tc2.reading": "base", "tc2.num_views": 2},
    "matched": {"tc2.reading": "matched"},
    "tasks": {"tc2.reading": "tasks"},
    "one_task": {"tc2.num_tasks": 1},
    "few_negatives": {
        "tc2.reading": "matched",
        "tc2.num_tasks": 1,
        "train.batch_size": 64,
        "train.steps": 800,
        "train.checkpoint_every": 400,
        "train.measure_every": 200,
    },
    "shared_norm": {"network.norm": "shared"},
    "group_norm": {"network.norm": "layer"},
    "base_group_norm": {"tc2.reading": "matched", "network.norm": "layer"},
    "pca": {"tc2.calibrator": PCA(n_f=32)},
    "pcgrad": {"tc2.reading": "pcgrad"},
    "upgrad": {"tc2.reading": "upgrad"},
    "split": {"tc2.reading": "split"},
    "matched_seconds": {"tc2.reading": "matched", "tc2.budget": "seconds"},
    "lookahead": {"tc2.reading": "lookahead"},
    "clusters": {"tc2.tasks": train_config.Clusters()},
    "domains": {"tc2.tasks": train_config.Domains()},
    "augmentations": {"tc2.tasks": train_config.Augmentations()},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_tc2_but_for_what_it_controls(name: str) -> None:
    expected = settings.packaged("tc2_fashion_mnist")
    for setting, value in CONTROLS[name].items():
        group, field = setting.split(".")
        expected = replace(expected, **{group: replace(getattr(expected, group), **{field: value})})
    assert settings.packaged(f"{name}_fashion_mnist") == expected


def test_the_controls_by_budget_see_as_many_images_as_tc2() -> None:
    def seen(name: str) -> int:
        config = settings.packaged(f"{name}_fashion_mnist")
        return budget.budget(config)["steps"] * budget.images_per_step(config)

    assert seen("tc2") == seen("matched") == seen("few_negatives") == seen("base_group_norm") == 200 * 8 * 256


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(Path(sys.argv[1]), int(sys.argv[2]))
