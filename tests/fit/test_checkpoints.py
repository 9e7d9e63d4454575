# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: what they hold, which count, and what a run goes on from."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from transformers import Trainer

from vllm_mkv.adapter import Adapter
from vllm_mkv.cli import main
from vllm_mkv.fit.checkpoints import complete_checkpoints, finish_checkpoint, remove_others
from vllm_mkv.fit.train import train
from vllm_mkv.fit.trainer import DistillationTrainer

SETTINGS = {"context": 64, "batch_size": 2, "eval_windows": 0, "budgets": (0.07, 0.25), "repeats": 0.0}
RESUMED = SETTINGS | {"steps": 6, "save_steps": 2, "learning_rate": 1e-2, "spread": 0.2}


@pytest.fixture
def searched(tiny_model, make_searched):
    return Adapter.load(make_searched(tiny_model("llama"), 2))


def assert_same_bases(one, other):
    for a, b in zip(one.bases, other.bases, strict=True):
        for name in ("A", "B", "C", "D"):
            assert np.array_equal(getattr(a, name), getattr(b, name))


def fake_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_bytes(bytes(100))
    return checkpoint


def test_resumed_runs_end_in_the_same_bytes(searched, text_file, tmp_path):
    settings = SETTINGS | {"steps": 6, "save_steps": 3, "learning_rate": 1e-2, "spread": 0.2}
    whole, _ = train(searched, [str(text_file)], output=tmp_path / "whole", **settings)
    checkpoints = tmp_path / "whole.checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-6")
    resumed, _ = train(
        searched, [str(text_file)], output=tmp_path / "resumed", checkpoints=checkpoints, resume=True, **settings
    )
    for a, b in zip(whole.bases, resumed.bases, strict=True):
        for name in ("A", "B", "C", "D"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(whole.bases[0].A, searched.bases[0].A)


def test_checkpoints_hold_what_is_trained_alone(searched, text_file, tmp_path):
    train(searched, [str(text_file)], steps=2, output=tmp_path / "trained", **SETTINGS)
    checkpoint = tmp_path / "trained.checkpoints" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    shape = searched.shape
    turns = 2 * shape.num_layers * shape.num_groups * shape.group_width**2 * 4
    # The turns, their averages, and two moments of the optimiser's.
    assert 4 * turns < size < 4 * turns + 100_000


def test_runs_are_not_mixed_up(searched, text_file, tmp_path):
    settings = SETTINGS | {"output": tmp_path / "out", "steps": 2}
    text = [str(shutil.copy(text_file, tmp_path / "text.txt"))]
    train(searched, text, **settings)
    with pytest.raises(ValueError, match=r"has checkpoints; go on from them with --resume"):
        train(searched, text, **settings)
    model = shutil.copytree(searched.config.base_model_name_or_path, tmp_path / "model")
    for changed, message in (
        ({"learning_rate": 0.1}, "learning_rate was 0.0005 and is 0.1"),
        ({"model": str(model)}, f"model was .* and is '{model}'"),
        ({"revision": "other"}, "revision was None and is 'other'"),
        ({"dtype": "bfloat16"}, "dtype was 'auto' and is 'bfloat16'"),
        ({"eval_windows": 17}, "held_out was 16 and is 17"),
    ):
        with pytest.raises(ValueError, match=f"of another run: {message}; give what"):
            train(searched, text, **settings | changed, resume=True)
    (tmp_path / "text.txt").write_text(text_file.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ValueError, match=r"of another run: windows was '[0-9a-f]{8}' and is '[0-9a-f]{8}'; give what"):
        train(searched, text, **settings, resume=True)
    (tmp_path / "out.checkpoints" / "arguments.json").unlink()
    with pytest.raises(ValueError, match=r"has no arguments.json .* remove the folder"):
        train(searched, text, **settings, resume=True)


def killed(self, *args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_that_was_killed_in_a_checkpoint_goes_on_from_the_one_before(
    part, searched, text_file, tmp_path, monkeypatch, caplog
):
    whole, _ = train(searched, [str(text_file)], output=tmp_path / "whole", **RESUMED)
    folder, write = tmp_path / "out.checkpoints", getattr(Trainer, part)

    def killed_at_step_4(self, *args, **kwargs):
        if self.state.global_step == 4:
            (folder / "checkpoint-4").mkdir(exist_ok=True)
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, part, killed_at_step_4)
        train(searched, [str(text_file)], output=tmp_path / "out", **RESUMED)
    resumed, log = train(searched, [str(text_file)], output=tmp_path / "out", resume=True, **RESUMED)
    assert "checkpoint-4 incomplete and skipped; going on from checkpoint-2" in caplog.text
    assert_same_bases(resumed, whole)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.name for checkpoint in complete_checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]


def test_a_run_without_a_complete_checkpoint_starts_anew(searched, text_file, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_save_rng_state", killed)
        train(searched, [str(text_file)], output=tmp_path / "out", **RESUMED)
    again, _ = train(searched, [str(text_file)], output=tmp_path / "out", resume=True, **RESUMED)
    assert "checkpoint-2 incomplete and skipped; starting anew" in caplog.text
    assert_same_bases(again, train(searched, [str(text_file)], output=tmp_path / "whole", **RESUMED)[0])


def test_a_run_that_was_at_its_end_is_written_again(searched, text_file, tmp_path):
    whole, log = train(searched, [str(text_file)], output=tmp_path / "out", **RESUMED)
    again, log_again = train(searched, [str(text_file)], output=tmp_path / "out", resume=True, **RESUMED)
    assert_same_bases(again, whole)
    assert log_again == log


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "complete.json"])
def test_a_checkpoint_that_lacks_a_file_or_a_part_of_one_does_not_count(name, tmp_path):
    checkpoint = fake_checkpoint(tmp_path, 9)
    assert complete_checkpoints(tmp_path) == []
    finish_checkpoint(checkpoint)
    assert complete_checkpoints(tmp_path) == [checkpoint]
    if name != "complete.json":
        (checkpoint / name).write_bytes(bytes(99))
        assert complete_checkpoints(tmp_path) == []
    (checkpoint / name).unlink()
    assert complete_checkpoints(tmp_path) == []


def test_the_last_complete_checkpoints_stay_and_no_others(tmp_path):
    for step in (9, 100, 11, 120):
        finish_checkpoint(fake_checkpoint(tmp_path, step))
    for step in (10, 130):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-of-mine").mkdir()
    remove_others(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100", "checkpoint-120", "checkpoint-of-mine"}


@pytest.mark.parametrize("steps_before", [1, 3])
def test_an_interruption_says_how_to_go_on_where_that_is_possible(
    steps_before, tiny_model, make_searched, text_file, tmp_path, monkeypatch, capsys
):
    compute = DistillationTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == steps_before:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)
    arguments = [str(make_searched(tiny_model("llama"), 2)), "--text", str(text_file), "--steps", "4"]
    options = ["--context", "128", "--batch-size", "1", "--repeats", "0", "--budgets", "0.07", "0.25"]
    assert main(["train", *arguments, *options, "--save-steps", "2", "--output", str(tmp_path / "out")]) == 130
    printed = capsys.readouterr().err
    assert "vllm-mkv: interrupted\n" in printed
    assert ("checkpoint-2 is complete; go on with --resume" in printed) == (steps_before == 3)
