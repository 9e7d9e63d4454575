# SPDX-License-Identifier: Apache-2.0
"""The loss of Matryoshka distillation: predictions with a small cache against those without one."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vllm_mkv.fit.attention import intercepted
from vllm_mkv.fit.quality import log_probabilities
from vllm_mkv.fit.student import Student, coordinate_widths

DRAWN_BUDGETS = 48
"""Budgets between the least and the most, at equal ratios, whose allocations are drawn from."""
LEAST_DIVERGENCE = 1e-4
"""Nats per token: what a step's loss is divided by at least, so that small budgets do not drown large ones."""
AVERAGED_STEPS = 50
"""About so many of the last steps are averaged."""


class Distillation(nn.Module):
    """The student, and the model that teaches and carries it: frozen, one copy for both, in no checkpoint."""

    widths: Tensor
    steps: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        student: Student,
        budgets: tuple[float, float],
        *,
        spread: float = 0.0,
        cross_entropy: float = 0.0,
    ) -> None:
        """Args:
            budgets: least and most that a step's budget is drawn between, evenly in its logarithm.
            spread: standard deviation of every layer's, group's and side's own budget around the step's, as a share of
                that range.
            cross_entropy: W in the loss, KL / stopgrad(KL) + W * the next token's cross-entropy: the first term is
                1 at every step, and its gradient that of log KL.

        Raises:
            ValueError: the student's allocation path does not reach a budget.
        """
        super().__init__()
        # No submodule: neither trained, nor saved, nor copied to other devices.
        object.__setattr__(self, "model", model.requires_grad_(False))
        self.student, self.spread, self.cross_entropy = student, spread, cross_entropy
        self.averages = nn.ParameterList(
            [nn.Parameter(x.detach().clone(), requires_grad=False) for x in student.parameters()]
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        path = student.adapter.path
        levels = np.geomspace(budgets[0], budgets[1], DRAWN_BUDGETS)
        widths = torch.stack([coordinate_widths(path.replay(float(budget))) for budget in levels])
        self.register_buffer("widths", widths, persistent=False)

    def draw(self) -> Tensor:
        """Widths of a step, [L, G, 2, n]: each side's are those that the allocation path has at some budget.

        Processes that train together draw theirs in one, so that each has others and all stay in step.
        """
        _, *sides, n = self.widths.shape
        last = DRAWN_BUDGETS - 1
        together = dist.is_available() and dist.is_initialized()
        processes, process = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        # Off the CPU's generator, which a trainer's checkpoints keep.
        budget, spread = torch.rand(processes)[process], torch.randn(processes, *sides)[process]
        levels = last * (budget + self.spread * spread)
        index = levels.round().long().clamp(0, last).to(self.widths.device)
        return self.widths.gather(0, index[None, ..., None].expand(1, *sides, n))[0]

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """On token ids [B, T]: `loss`, and `divergence` in nats per token."""
        model: PreTrainedModel = self.model  # type: ignore[assignment]
        with torch.no_grad():
            teacher = log_probabilities(model, input_ids)
        with intercepted(model, self.student.handler(self.draw())):
            log_p = log_probabilities(model, input_ids)
        divergence = F.kl_div(log_p, teacher, log_target=True, reduction="batchmean")
        loss = divergence / divergence.detach().clamp(min=LEAST_DIVERGENCE)
        if self.cross_entropy:
            loss = loss + self.cross_entropy * F.nll_loss(log_p, input_ids[:, 1:].flatten())
        return {"loss": loss, "divergence": divergence.detach()}

    @torch.no_grad()
    def update_averages(self) -> None:
        """After every step: a mean over all steps at first, then one that forgets."""
        self.steps += 1
        share = 1 / min(int(self.steps), AVERAGED_STEPS)
        for average, x in zip(self.averages, self.student.parameters(), strict=True):
            average.lerp_(x, share)

    @torch.no_grad()
    def averaged(self) -> Student:
        """The student, with the averages in place of its own."""
        for average, x in zip(self.averages, self.student.parameters(), strict=True):
            x.copy_(average)
        return self.student
