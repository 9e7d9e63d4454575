# SPDX-License-Identifier: Apache-2.0
"""transformers' trainer for a `Distillation`: its checkpoints hold the student, its averages and all random states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vllm_mkv.fit.checkpoints import finish_checkpoint, remove_others
from vllm_mkv.fit.distil import Distillation


class DistillationTrainer(Trainer):
    """Logs the divergence since the last line of the log as `kl`, nats per token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, callbacks=[_Averaging(), _Finishing()])
        self._divergences: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Raises ValueError where the loss is not finite."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is not finite; remove {self.args.output_dir} and train "
                "with a smaller --learning-rate, or compute in another dtype: --dtype float32"
            )
        self._divergences.append(outputs["divergence"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._divergences:
            logs["kl"] = float(torch.stack(self._divergences).mean())
            self._divergences.clear()
        if not self.model.cross_entropy:
            # The divergence over itself is 1 at every step.
            logs.pop("loss", None)
            logs.pop("train_loss", None)
        super().log(logs, *args, **kwargs)


class _Averaging(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        task: Distillation = getattr(model, "module", model)
        task.update_averages()


class _Finishing(TrainerCallback):
    """In place of transformers' own removal, which may leave no complete checkpoint for a while."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            remove_others(Path(args.output_dir))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process writes its random state.
        PartialState().wait_for_everyone()
        if args.should_save:
            finish_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            remove_others(Path(args.output_dir))
