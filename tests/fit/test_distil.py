# SPDX-License-Identifier: Apache-2.0
"""A step's widths, its loss, and the averages over steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vllm_mkv.fit import distil
from vllm_mkv.fit.attention import intercepted
from vllm_mkv.fit.distil import Distillation
from vllm_mkv.fit.student import Student, coordinate_widths


def test_budgets_lie_at_equal_ratios(searched, model):
    task = Distillation(model, Student(searched), (0.07, 0.25))
    ratio = 0.25 / 0.07
    for level in (0, 12, 24, 47):
        allocation = searched.path.replay(0.07 * math.exp(math.log(ratio) * level / 47))
        assert torch.equal(task.widths[level], coordinate_widths(allocation))


def test_every_side_draws_a_budget_of_its_own(searched, model):
    task = Distillation(model, Student(searched), (0.07, 0.25), spread=0.3)
    allowed = {tuple(widths) for widths in task.widths[:, 0, 0, 1].tolist()}
    torch.manual_seed(0)
    drawn = [task.draw() for _ in range(20)]
    assert {tuple(widths[0, 0, 1].tolist()) for widths in drawn} <= allowed
    assert len({widths.float().mean().item() for widths in drawn}) > 5
    alike = Distillation(model, Student(searched), (0.07, 0.25))
    levels = [(alike.widths == alike.draw()).flatten(1).all(1) for _ in range(5)]
    assert all(level.any() for level in levels)


def test_no_two_processes_draw_alike(searched, model, monkeypatch):
    task = Distillation(model, Student(searched), (0.07, 0.25), spread=0.3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    drawn, states = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        drawn.append(task.draw())
        states.append(torch.get_rng_state())
    assert not torch.equal(*drawn)
    assert torch.equal(*states)


@pytest.mark.parametrize("cross_entropy", [0.0, 1.0, 3.0])
def test_the_loss_is_kl_over_itself_and_weighted_cross_entropy(cross_entropy, searched, model):
    student = Student(searched)
    task = Distillation(model, student, (0.07, 0.25), spread=0.1, cross_entropy=cross_entropy)
    ids = torch.randint(2, 290, (2, 40))
    torch.manual_seed(0)
    found = task(ids)
    torch.manual_seed(0)
    with torch.no_grad():
        teacher = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    with intercepted(model, student.handler(task.draw())):
        log_p = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    kl = (teacher.exp() * (teacher - log_p)).sum(-1).mean()
    expected = kl / kl.item() + cross_entropy * F.cross_entropy(log_p, ids[:, 1:].flatten())
    torch.testing.assert_close(found["divergence"], kl.detach())
    torch.testing.assert_close(found["loss"], expected)
    parameters = list(student.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (found["loss"], expected))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_averages_are_a_mean_that_forgets(searched, model, monkeypatch):
    monkeypatch.setattr(distil, "AVERAGED_STEPS", 2)
    task = Distillation(model, Student(searched), (0.07, 0.25))
    for value in (1.0, 3.0, 7.0):
        for x in task.student.parameters():
            torch.nn.init.constant_(x, value)
        task.update_averages()
    # 1, then the mean of 1 and 3, then of that and 7.
    assert all((x == 4.5).all() for x in task.averaged().parameters())
