# SPDX-License-Identifier: Apache-2.0
"""transformers' trainer for a `Distillation`: its checkpoints hold the student, its averages and all random states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vllm_mkv.fit.distil import Distillation


class DistillationTrainer(Trainer):
    """Logs the divergence since the last line of the log as `kl`, nats per token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, callbacks=[_Averaging()])
        self._divergences: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Raises ValueError where the loss is not finite."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is not finite; go on from the last checkpoint with "
                "--resume and a smaller --learning-rate, or compute in another dtype: --dtype float32"
            )
        self._divergences.append(outputs["divergence"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._divergences:
            logs["kl"] = float(torch.stack(self._divergences).mean())
            self._divergences.clear()
        super().log(logs, *args, **kwargs)


class _Averaging(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        task: Distillation = getattr(model, "module", model)
        task.update_averages()
