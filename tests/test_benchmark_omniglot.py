"""The few-shot benchmark: its characters, its episodes from start to end, and that a run keeps its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import omniglot
from metacal.data import Images


@pytest.fixture(autouse=True)
def _noise_for_omniglot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise with Omniglot's classes; an image's first pixel tells its character."""

    def load(name: str, part: str) -> Images:
        first, num_classes = (0, 964) if part == "train" else (964, 659)
        labels = torch.arange(num_classes).repeat_interleave(18)
        images = torch.rand(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(first))
        images[:, 0, 0, 0] = (first + labels) / 2000
        return Images(images, labels, name, num_classes)

    monkeypatch.setattr(omniglot, "load", load)
    monkeypatch.setattr(omniglot, "EPISODES", 20)


@pytest.mark.parametrize(("split", "sizes"), [("characters", (1100, 100, 423)), ("alphabets", (864, 100, 659))])
def test_training_validation_and_test_share_no_character(split: str, sizes: tuple[int, int, int]) -> None:
    parts = omniglot.characters(split)
    ids = [set((2000 * part.images[:, 0, 0, 0]).round().long().tolist()) for part in parts.values()]
    assert tuple(parts) == ("train", "validation", "test")
    assert tuple(map(len, ids)) == sizes
    assert len(set.union(*ids)) == 1623  # every character in one part only
    assert all(len(part) == 18 * size for part, size in zip(parts.values(), sizes, strict=True))
    if split == "alphabets":
        assert ids[2] == set(range(964, 1623))


@pytest.mark.parametrize("learner", omniglot.LEARNERS)
def test_a_run_is_trained_judged_and_keeps_its_settings(learner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--out", str(tmp_path), "--learner", learner, "--steps", "2", "--width", "8", "--num-tasks", "2", "--ways", "2"]
    omniglot.main(command)
    (path,) = tmp_path.glob("*/results.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["learner"], found["ways"], found["shots"], found["steps"], found["judge"]) == (learner, 2, 1, 2, "test")
    assert 0.3 < found["accuracy"] < 0.7  # of noise nothing can be learned
    omniglot.main(command)  # nothing is left to train: judged again
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == found["accuracy"]
    with pytest.raises(SystemExit, match="other settings"):
        omniglot.main([*command, "--lr", "0.1"])
    capsys.readouterr()
    omniglot.main(["table", "--out", str(tmp_path)])
    assert f"| {learner} | 2 ways, 1 shot | {100 * found['accuracy']:.2f}" in capsys.readouterr().out
