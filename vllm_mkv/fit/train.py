# SPDX-License-Identifier: Apache-2.0
"""Matryoshka distillation: turns an adapter's bases until a model with a small cache predicts what it does without one.

Widths are drawn anew for every step, so that one set of bases gets good at all budgets (MatryoshkaKV, arXiv 2410.14731,
which draws ranks and turns per-head bases from a PCA).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments

from vllm_mkv.adapter import Adapter, check_output
from vllm_mkv.fit.bases import TRAINED
from vllm_mkv.fit.calibrate import choose_context, draw_windows, how_made, with_quality
from vllm_mkv.fit.card import model_card
from vllm_mkv.fit.checkpoints import check_arguments, checkpoint_folder, choose_checkpoint, write_arguments
from vllm_mkv.fit.data import check_repeats, with_repeats
from vllm_mkv.fit.distil import Distillation
from vllm_mkv.fit.held_out import HELD_OUT, num_held_out
from vllm_mkv.fit.losses import draw_losses
from vllm_mkv.fit.model import Source, choose_device
from vllm_mkv.fit.search import MEASURED_BUDGETS
from vllm_mkv.fit.student import Student
from vllm_mkv.fit.trainer import DistillationTrainer
from vllm_mkv.output import check_drawing, check_file, write_json

DEFAULT_BUDGETS = (0.065, 0.25)
WARMUP_SHARE = 0.05
TOLD = ("steps", "form", "budgets", "spread", "cross_entropy", "repeats", "learning_rate")
"""Of its arguments, those that a trained adapter tells of."""


def train(
    adapter: Adapter,
    text: Sequence[str],
    *,
    steps: int,
    output: str | Path,
    form: str = "free",
    budgets: tuple[float, float] = DEFAULT_BUDGETS,
    spread: float = 0.1,
    cross_entropy: float = 0.0,
    repeats: float = 0.25,
    learning_rate: float = 5e-4,
    batch_size: int = 4,
    accumulate: int = 1,
    context: int | None = None,
    checkpoints: str | Path | None = None,
    save_steps: int = 100,
    resume: bool = False,
    report_to: str = "none",
    eval_windows: int = HELD_OUT,
    seed: int = 0,
    json_file: str | Path | None = None,
    plot: str | Path | None = None,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Adapter, list[dict[str, float]]]:
    """Trains an adapter's bases and writes the new adapter to the folder `output`, whole or not at all.

    Its allocation path stays that of the old one; `search` finds the one that is best for the new bases.

    Args:
        text: files, folders or datasets; see `vllm_mkv.fit.data.token_windows`.
        steps: of the optimiser.
        output: a folder that is new, empty or an adapter.
        form: of the turns that are trained, one of `student.FORMS`.
        budgets: least and most that steps draw from.
        spread: see `distil.Distillation`.
        cross_entropy: likewise.
        repeats: share of windows in which passages of random tokens stand twice; see `data.with_repeats`.
        learning_rate: at its peak, after a warm-up and before a cosine.
        batch_size: windows of a step on one device, `accumulate` times.
        context: tokens per window; None for 1024 or the model's longest, whichever is shorter.
        checkpoints: folder of the trainer's checkpoints; None for `output` with `.checkpoints` behind it.
        save_steps: between two checkpoints.
        resume: go on from the last complete checkpoint there.
        report_to: transformers' name of a logger, such as tensorboard or wandb.
        eval_windows: windows, none of them trained on, to measure quality on; 0 for none.
        seed: of windows and widths.
        json_file, plot: files to write the log to, and a drawing of it.
        model: folder or Hub repository; None for the one that the adapter was made for.
        dtype, device: see `vllm_mkv.fit.model.Source.load`; bases are float32 whatever the model is. Of several GPUs,
            CUDA_VISIBLE_DEVICES chooses.
        revision, trust_remote_code: of the model's Hub repository.

    Returns:
        The new adapter, and the log: {"step", "kl", ..} in nats per token. Of processes that train together, the first
        measures and writes, and the log of each is of its own windows.

    Raises:
        ValueError: an argument or a text is wrong, or the loss is not finite; says which and what to do.
        NotImplementedError: the model's attention is of a kind that is not supported; names it.
    """
    check_output(output)
    for file, check in ((json_file, check_file), (plot, check_drawing)):
        if file:
            check(file)
    student = Student(adapter, form)
    config = adapter.config
    source = Source.of_adapter(config, model, revision, trust_remote_code)
    adapter.check_model(source.fingerprint)
    folder = checkpoint_folder(output, checkpoints)
    given = {
        "adapter": config.weights_sha256,
        "model": source.name,
        "revision": source.revision,
        "dtype": dtype,
        "text": [str(name) for name in text],
        "steps": steps,
        "form": form,
        "budgets": list(budgets),
        "spread": spread,
        "cross_entropy": cross_entropy,
        "repeats": repeats,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "context": choose_context(source.config, context),
        "held_out": num_held_out(eval_windows),
        "seed": seed,
    }
    _check(given, save_steps)
    arguments = _training_arguments(folder, given, save_steps, report_to, device)
    given["processes"] = arguments.world_size
    last = choose_checkpoint(folder, given, resume)
    windows, held_out = _windows(source, given, eval_windows, config.made)
    given["windows"] = f"{zlib.crc32(windows.tobytes()):08x}"
    if last is not None:
        # The same names may be of other text by now.
        check_arguments(folder, given)
    network = source.load(dtype, str(arguments.device))
    task = Distillation(network, student, budgets, spread=spread, cross_entropy=cross_entropy)
    if arguments.process_index == 0 and last is None:
        write_arguments(folder, given)
    log = _distil(task, arguments, windows, last)
    made = how_made("train", text, windows, eval_windows, seed, network, config.made)
    made |= {name: given[name] for name in TOLD}
    config = config.model_copy(update={"basis": TRAINED, "made": {**config.made, "train": made}, "quality": []})
    trained = Adapter(config, task.averaged().bases(), adapter.path)
    if arguments.process_index:
        return trained, log
    if eval_windows:
        trained = with_quality(trained, network, held_out, MEASURED_BUDGETS, source.itemsize)
    trained.save(output, model_card(trained.config))
    if json_file:
        write_json(json_file, {"arguments": given, "log": log})
    if plot:
        draw_losses(log, plot)
    return trained, log


def _check(given: dict[str, Any], save_steps: int) -> None:
    """Raises ValueError naming the number that is out of its range."""
    if min(given["steps"], given["batch_size"], given["accumulate"], save_steps) < 1:
        raise ValueError("steps, batch size, accumulation and save steps must be 1 at least")
    least, most = given["budgets"]
    if not 0 < least < most <= 1:
        raise ValueError(f"budgets {least:g} to {most:g} are no range in (0, 1]; give the smaller one first")
    if not 0 < given["learning_rate"] < math.inf:
        raise ValueError(f"a learning rate of {given['learning_rate']:g}; the learning rate must be above 0 and finite")
    for name in ("spread", "cross_entropy"):
        if not 0 <= given[name] < math.inf:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {given[name]:g} is not a number that is 0 at least and finite; give one")
    check_repeats(given["repeats"], given["context"])


def _training_arguments(
    folder: Path, given: dict[str, Any], save_steps: int, report_to: str, device: str
) -> TrainingArguments:
    """Raises ValueError where transformers would train on another device, or on several in one process."""
    asked = torch.device(choose_device(device))
    steps = given["steps"]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=given["batch_size"],
        gradient_accumulation_steps=given["accumulate"],
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP_SHARE * steps),
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, min(10, steps // 10)),
        save_steps=save_steps,
        report_to=report_to,
        seed=given["seed"],
        use_cpu=asked.type == "cpu",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
    )
    used = arguments.device
    if asked.type != used.type or asked.index not in (None, used.index or 0):
        raise ValueError(
            f"device {device!r} is not the one that this process trains on, {used}; leave --device out, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible; start with torchrun --nproc-per-node {arguments.n_gpu}, or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    return arguments


def _windows(
    source: Source, given: dict[str, Any], eval_windows: int, before: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """To train on, some with passages that stand twice, and to measure on; int64 [windows, context]."""
    context, seed = given["context"], given["seed"]
    tokens = given["steps"] * given["batch_size"] * given["accumulate"] * given["processes"] * context
    windows, held_out = draw_windows(source, given["text"], tokens, eval_windows, context, seed, before)
    return with_repeats(windows, given["repeats"], _plain_tokens(source), seed), held_out


def _distil(
    task: Distillation, arguments: TrainingArguments, windows: np.ndarray, last: Path | None
) -> list[dict[str, float]]:
    """Trains, from a checkpoint on where there is one, and returns the log, with what came before it."""
    trainer = DistillationTrainer(
        model=task,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": windows}).with_format("torch"),
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return [
        {"step": row["step"], "kl": row["kl"], "learning_rate": row["learning_rate"]}
        for row in trainer.state.log_history
        if "kl" in row
    ]


def _plain_tokens(source: Source) -> np.ndarray:
    """Token ids that stand for text."""
    tokenizer = source.tokenizer
    known = min(len(tokenizer), source.config.get_text_config(decoder=True).vocab_size)
    return np.setdiff1d(np.arange(known), tokenizer.all_special_ids)
