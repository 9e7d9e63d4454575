# SPDX-License-Identifier: Apache-2.0
"""Training from end to end: what gradients go through, what is learnt, resumed and refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainingArguments

from mkv_kernels.codes import round_trip
from mkv_kernels.layout import WIDTHS
from vllm_mkv.adapter import Adapter
from vllm_mkv.cli import main
from vllm_mkv.fit.attention import intercepted
from vllm_mkv.fit.calibrate import calibrate, draw_windows
from vllm_mkv.fit.check import full_rank_exactness, inverse_error
from vllm_mkv.fit.data import with_repeats
from vllm_mkv.fit.distil import Distillation
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.quality import measure, projected_caches
from vllm_mkv.fit.search import TRIED_BUDGETS, probe, search
from vllm_mkv.fit.student import FORMS, Student, cayley, coordinate_widths, straight_through
from vllm_mkv.fit.train import train
from vllm_mkv.fit.trainer import DistillationTrainer
from vllm_mkv.fit.truncation import truncated

SETTINGS = {"context": 64, "batch_size": 2, "eval_windows": 0, "budgets": (0.07, 0.25), "repeats": 0.0}


def random_student(adapter, form):
    student = Student(adapter, form)
    torch.manual_seed(0)
    for x in student.parameters():
        torch.nn.init.normal_(x, std=0.02)
    return student


def test_codes_are_those_of_the_cache():
    torch.manual_seed(0)
    rows = [(16, 16, 8, 4, 2, 0), (4, 4, 4, 4, 4, 4), (16,) * 6, (0,) * 6, (8, 2, 2, 2, 0, 0)]
    x = torch.randn(2, len(rows), 7, 96) * torch.rand(2, len(rows), 7, 1) * 3
    widths = torch.tensor(rows).repeat_interleave(16, dim=-1)[:, None]
    found = straight_through(x, widths)
    for group, row in enumerate(rows):
        torch.testing.assert_close(found[:, group], round_trip(x[:, group], row), rtol=1e-5, atol=1e-5)


def test_gradients_pass_what_is_stored_and_nothing_else():
    x = torch.randn(1, 1, 3, 80, requires_grad=True)
    widths = torch.tensor([WIDTHS]).repeat_interleave(16, dim=-1)[:, None]
    straight_through(x, widths).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x) * (torch.arange(80) < 64))


def test_cayley_is_orthogonal_and_starts_at_the_identity():
    torch.manual_seed(0)
    turn = cayley(torch.randn(3, 32, 32, dtype=torch.float64))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(32, dtype=torch.float64).expand(3, -1, -1))
    assert torch.equal(cayley(torch.zeros(2, 8, 8)), torch.eye(8).expand(2, -1, -1))


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.125])
def test_a_student_starts_as_the_adapter(budget, searched, model):
    ids = torch.randint(2, 290, (2, 40))
    allocation = searched.path.replay(budget)
    student = Student(searched)
    with torch.inference_mode():
        with truncated(model, searched, allocation):
            expected = model(input_ids=ids).logits
        with intercepted(model, student.handler(coordinate_widths(allocation))):
            found = model(input_ids=ids).logits
    # A coordinate at the border of two levels may fall to either side.
    assert (found - expected).abs().mean() < (1e-5 if budget == 1 else 5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_stays_exact_however_bases_were_turned(form, searched, model):
    student = random_student(searched, form)
    turned = Adapter(searched.config, student.bases(), searched.path)
    assert np.abs(turned.bases[0].A - searched.bases[0].A).max() > 0.01
    assert inverse_error(turned) < 1e-4
    assert full_rank_exactness(model, turned, tokens=40).exact


@pytest.mark.parametrize("form", FORMS)
def test_bases_are_what_the_student_attends_with(form, searched, model):
    student, allocation = random_student(searched, form), searched.path.replay(0.5)
    turned = Adapter(searched.config, student.bases(), searched.path)
    ids = torch.randint(2, 290, (2, 40))
    with torch.inference_mode():
        with truncated(model, turned, allocation):
            expected = model(input_ids=ids).logits
        with intercepted(model, student.handler(coordinate_widths(allocation))):
            found = model(input_ids=ids).logits
    assert (found - expected).abs().mean() < 5e-3 * expected.abs().mean()


@pytest.mark.parametrize("form", FORMS)
def test_training_brings_predictions_closer(form, tmp_path):
    """The bundled model: a random one has nothing to learn."""
    examples = Path(__file__).parents[2] / "examples"
    source = Source(str(examples / "books-4m"))
    bundled = Adapter.load(examples / "books-4m" / "mkv")
    text = [str(examples / "data" / "the_time_machine.txt")]
    settings = {"context": 128, "eval_windows": 4, "model": source.name, "dtype": "float32"}
    # The bundled bases were trained before; their path serves new ones too.
    made = {"tokens": 8192, "group_heads": 2, "context": 128, "eval_windows": 0, "dtype": "float32"}
    adapter = replace(calibrate(source.name, text, output=tmp_path / "calibrated", **made), path=bundled.path)
    trained, log = train(
        adapter, text, steps=40, output=tmp_path / "trained", budgets=(0.07, 0.1), learning_rate=1e-3, **settings
    )
    assert [row["step"] for row in log] == list(range(4, 41, 4))
    windows, _ = draw_windows(source, text, 16 * 128, 0, 128, seed=9)
    network = source.load("float32", "cpu")
    caches = [projected_caches(found, [adapter.path.replay(0.08)], 2)[0] for found in (adapter, trained)]
    before, after = (row["kl"] for row in measure(network, windows, caches, stock_bytes=2048)[1:])
    assert after < 0.95 * before
    assert trained.config.basis == "trained"
    assert [row["budget"] <= 1 for row in trained.config.quality].count(True) == 9
    assert full_rank_exactness(network, Adapter.load(tmp_path / "trained"), tokens=40).exact


def test_passages_that_stand_twice():
    windows, plain = np.zeros((200, 400), dtype=np.int64), np.arange(5, 300)
    found = with_repeats(windows, 0.3, plain, seed=1)
    assert not windows.any()
    changed = found[found.any(1)]
    assert 40 < len(changed) < 80
    for window in changed:
        starts = [at for at in range(1, 400, 32) if window[at]]
        passages = {tuple(window[at : at + 32]) for at in starts}
        assert len(starts) == 2
        assert len(passages) == 1
        assert np.isin(window[window > 0], plain).all()
    assert (changed[:, 0] == 0).all()
    assert with_repeats(windows, 0.0, plain, seed=1) is windows


def test_a_trained_adapter_is_searched_as_any(searched, text_file, tmp_path):
    trained, _ = train(searched, [str(text_file)], steps=4, output=tmp_path / "trained", **SETTINGS)
    found, _ = search(trained, [str(text_file)], output=tmp_path / "found", tokens=512, context=64, eval_windows=0)
    assert set(found.config.made) >= {"train", "search"}
    found.path.replay(0.1)
    # Turned inside of their blocks, coordinates would lose some of what training won.
    for before, after in zip(trained.bases, found.bases, strict=True):
        assert np.array_equal(before.A, after.A) and np.array_equal(before.D, after.D)
    assert inverse_error(found) < 1e-4


def test_a_search_of_trained_bases_finds_no_worse_path_than_theirs(searched, model, text_file, tmp_path):
    trained, _ = train(searched, [str(text_file)], steps=4, output=tmp_path / "trained", **SETTINGS)
    windows, _ = draw_windows(Source(searched.config.base_model_name_or_path), [str(text_file)], 512, 0, 64, seed=0)
    found = probe(model, trained, windows)
    allocations = [path.replay(budget) for path in (found.path, trained.path) for budget in TRIED_BUDGETS]
    rows = measure(model, windows, projected_caches(trained, allocations, 2), stock_bytes=1)[1:]
    ours, theirs = np.log([row["kl"] for row in rows]).reshape(2, -1).mean(1)
    assert ours <= theirs + 1e-6
    assert (found.exponent is None) == np.array_equal(found.path.steps, trained.path.steps)
    ranks = probe(model, trained, windows, (16, 0))
    assert ranks.exponent is not None
    assert ranks.path.widths == (16, 0)


def test_a_path_that_is_best_stays(searched, model, text_file, tmp_path, monkeypatch):
    trained, _ = train(searched, [str(text_file)], steps=1, output=tmp_path / "trained", **SETTINGS)
    # The others then follow from the errors alone, without what they cost.
    monkeypatch.setattr("vllm_mkv.fit.search.EXPONENTS", (-1.0,))
    windows, _ = draw_windows(Source(searched.config.base_model_name_or_path), [str(text_file)], 512, 0, 64, seed=0)
    found = probe(model, trained, windows)
    assert found.exponent is None
    assert found.path is trained.path


def test_processes_train_one_adapter_on_windows_and_widths_of_their_own(tiny_model, make_searched, text_file, tmp_path):
    adapter, output = make_searched(tiny_model("llama"), 2), tmp_path / "trained"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vllm_mkv.cli", "train", str(adapter), "--text", str(text_file), "--output", str(output)]
    command += ["--steps", "3", "--batch-size", "2", "--context", "96", "--eval-windows", "2", "--device", "cpu"]
    done = subprocess.run([*command, "--budgets", "0.07", "0.25"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    sizes = json.loads((tmp_path / "trained.checkpoints" / "checkpoint-3" / "complete.json").read_text("utf-8"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(sizes)
    trained = Adapter.load(output)
    assert trained.config.made["train"]["tokens"] == 3 * 2 * 2 * 96
    assert not np.array_equal(trained.bases[0].A, Adapter.load(adapter).bases[0].A)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_mend(searched, text_file, tmp_path, monkeypatch):
    forward, calls = Distillation.forward, []

    def failing(self, input_ids):
        calls.append(1)
        outputs = forward(self, input_ids)
        return outputs | {"loss": outputs["loss"] * float("nan")} if len(calls) == 3 else outputs

    monkeypatch.setattr(Distillation, "forward", failing)
    with pytest.raises(ValueError, match=r"loss of step 3 is not finite; remove .* --learning-rate"):
        train(searched, [str(text_file)], steps=5, output=tmp_path / "trained", **SETTINGS)
    assert not (tmp_path / "trained").exists()


def test_what_is_written_is_the_mean_of_the_steps(searched, text_file, tmp_path, monkeypatch):
    update, seen = Distillation.update_averages, []

    def watched(self):
        seen.append([x.detach().clone() for x in self.student.parameters()])
        update(self)

    monkeypatch.setattr(Distillation, "update_averages", watched)
    train(searched, [str(text_file)], steps=3, output=tmp_path / "out", **SETTINGS | {"learning_rate": 1e-2})
    written, student = Adapter.load(tmp_path / "out"), Student(searched, "free")
    assert len(seen) == 3
    for steps, close in ((seen, True), (seen[-1:], False)):
        with torch.no_grad():
            for x, *values in zip(student.parameters(), *steps, strict=True):
                x.copy_(sum(values) / len(values))
        for found, expected in zip(written.bases, student.bases(), strict=True):
            assert np.allclose(found.A, expected.A, rtol=1e-4, atol=1e-5) == close


def test_the_log_tells_of_its_own_steps_alone(searched, text_file, tmp_path, monkeypatch, capsys):
    forward, seen = Distillation.forward, []

    def watched(self, input_ids):
        outputs = forward(self, input_ids)
        seen.append(float(outputs["divergence"]))
        return outputs

    monkeypatch.setattr(Distillation, "forward", watched)
    _, log = train(searched, [str(text_file)], steps=21, accumulate=2, output=tmp_path / "out", **SETTINGS)
    assert [row["step"] for row in log] == list(range(2, 21, 2))
    assert [row["kl"] for row in log] == pytest.approx(np.reshape(seen[:40], (10, 4)).mean(1), rel=1e-5)
    # 2 steps of warm-up; a step is logged with the rate that it was taken with.
    rates = [2.5e-4 * (1 + math.cos(math.pi * (row["step"] - 3) / 19)) for row in log[1:]]
    assert [row["learning_rate"] for row in log] == pytest.approx([2.5e-4, *rates])
    printed = capsys.readouterr().out
    assert "'kl'" in printed
    assert "loss'" not in printed


def test_a_loss_that_says_more_than_kl_is_logged(searched, text_file, tmp_path, capsys):
    train(searched, [str(text_file)], steps=1, cross_entropy=1.0, output=tmp_path / "out", **SETTINGS)
    printed = capsys.readouterr().out
    assert "{'loss': " in printed
    assert "'train_loss': " in printed


def test_gradients_are_clipped_to_a_norm_of_1(searched, text_file, tmp_path):
    norms = []

    def watch(optimizer, *_):
        gradients = [x.grad.norm() for group in optimizer.param_groups for x in group["params"]]
        norms.append(float(torch.stack(gradients).norm()))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        # So much cross-entropy that every step's is longer.
        train(searched, [str(text_file)], steps=3, cross_entropy=1e4, output=tmp_path / "out", **SETTINGS)
    finally:
        handle.remove()
    assert norms == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("repeats", [0.0, 0.5])
def test_passages_stand_twice_in_what_is_trained_on(repeats, searched, text_file, tmp_path, monkeypatch):
    settings, seen = SETTINGS | {"context": 96, "repeats": repeats}, []

    class Stopped(DistillationTrainer):
        def train(self, *args, **kwargs):
            seen.append(np.array(self.train_dataset["input_ids"]))
            raise KeyboardInterrupt

    monkeypatch.setattr("vllm_mkv.fit.train.DistillationTrainer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        train(searched, [str(text_file)], steps=10, output=tmp_path / "out", **settings)
    source = Source(searched.config.base_model_name_or_path)
    windows, _ = draw_windows(source, [str(text_file)], 20 * 96, 0, 96, seed=0)
    changed = (seen[0] != windows).any(1)
    assert (4 < changed.sum() < 16) == bool(repeats)
    assert np.array_equal(seen[0][changed, 1:33], seen[0][changed, 33:65])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "must be 1 at least"),
        ({"budgets": (0.5, 0.2)}, "the smaller one first"),
        ({"budgets": (0.001, 0.2)}, "smaller than the smallest that this adapter's allocation path reaches"),
        ({"budgets": (0.1, math.nan)}, "no range"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"learning_rate": math.nan}, "learning rate must be above 0 and finite"),
        ({"learning_rate": math.inf}, "learning rate must be above 0 and finite"),
        ({"spread": math.nan}, "--spread nan is not a number that is 0 at least and finite"),
        ({"spread": -0.1}, "--spread -0.1 is not"),
        ({"cross_entropy": math.nan}, "--cross-entropy nan is not"),
        ({"cross_entropy": math.inf}, "--cross-entropy inf is not"),
        ({"repeats": math.nan}, r"give one in \[0, 1\]"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"device": "meta"}, "device 'meta' is not the one that this process trains on, cpu"),
        ({"device": "cpu:1"}, "device 'cpu:1' is not the one .* CUDA_VISIBLE_DEVICES"),
        ({"form": "loose"}, "not one of orthogonal, free"),
        ({"plot": "no/such/folder.png"}, "there is no folder"),
        ({"repeats": 1.5}, r"give one in \[0, 1\]"),
        ({"repeats": 0.5}, "use a longer --context, or --repeats 0"),
        ({"resume": True}, "no checkpoint to go on from"),
        ({"steps": 10_000}, "windows of 64 tokens"),
    ],
)
def test_bad_input_is_refused(wrong, message, searched, text_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(searched, [str(text_file)], **{"steps": 2, "output": tmp_path / "out", **SETTINGS, **wrong})
    assert not (tmp_path / "out").exists()


def test_several_gpus_in_one_process_are_refused(searched, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="2 GPUs are visible; start with torchrun --nproc-per-node 2, or set CUDA_VIS"):
        train(searched, [str(text_file)], steps=1, output=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out.checkpoints").exists()


def test_the_command(tiny_model, make_searched, text_file, tmp_path, capsys):
    model = tiny_model("llama")
    output, figures, plot = tmp_path / "trained", tmp_path / "log.json", tmp_path / "log.png"
    arguments = [str(make_searched(model, 2)), "--text", str(text_file), "--steps", "2", "--output", str(output)]
    options = ["--context", "128", "--batch-size", "1", "--eval-windows", "2", "--budgets", "0.07", "0.25"]
    assert main(["train", *arguments, *options, "--json", str(figures), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "KL divergence of steps" in printed
    assert printed.endswith(f"the checkpoints in {output}.checkpoints are not needed any more\n")
    assert [row["step"] for row in json.loads(figures.read_text())["log"]] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert Adapter.load(output).config.made["train"]["steps"] == 2
