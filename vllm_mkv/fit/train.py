# SPDX-License-Identifier: Apache-2.0
"""Matryoshka distillation: turns an adapter's bases until a model with a small cache predicts what it does without one.

Widths are drawn anew for every step, so that one set of bases gets good at all budgets (MatryoshkaKV, arXiv 2410.14731,
which draws ranks and turns per-head bases from a PCA).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_mkv.adapter import Adapter, check_output
from vllm_mkv.evaluation.card import model_card
from vllm_mkv.evaluation.losses import draw_losses
from vllm_mkv.evaluation.output import check_drawing, check_file, write_json
from vllm_mkv.fit.bases import TRAINED
from vllm_mkv.fit.calibrate import choose_context, draw_windows, how_made, with_quality
from vllm_mkv.fit.data import check_repeats, with_repeats
from vllm_mkv.fit.distil import Distillation
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.search import MEASURED_BUDGETS
from vllm_mkv.fit.student import Student
from vllm_mkv.fit.trainer import DistillationTrainer

DEFAULT_BUDGETS = (0.065, 0.25)
DEFAULT_EVAL_WINDOWS = 16
WARMUP_SHARE = 0.05
ARGUMENTS_FILE = "arguments.json"


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
    eval_windows: int = DEFAULT_EVAL_WINDOWS,
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
        resume: go on from the last checkpoint there.
        report_to: transformers' name of a logger, such as tensorboard or wandb.
        eval_windows: windows, none of them trained on, to measure quality on; 0 for none.
        seed: of windows and widths.
        json_file, plot: files to write the log to, and a drawing of it.
        model: folder or Hub repository; None for the one that the adapter was made for.
        dtype, device: see `vllm_mkv.fit.model.Source.load`; bases are float32 whatever the model is.
        revision, trust_remote_code: of the model's Hub repository.

    Returns:
        The new adapter, and the log: {"step", "kl", ..} in nats per token. Of processes that train together, the first
        measures and writes, and the log of each is of its own windows.

    Raises:
        ValueError: an argument or a text is wrong, or the loss is not finite; says which and what to do.
        NotImplementedError: the model's attention is of a kind that is not supported; names it.
    """
    if min(steps, batch_size, accumulate, save_steps) < 1:
        raise ValueError("steps, batch size, accumulation and save steps must be 1 at least")
    if not 0 < budgets[0] < budgets[1] <= 1:
        raise ValueError(f"budgets {budgets[0]:g} to {budgets[1]:g} are no range in (0, 1]; give the smaller one first")
    if not learning_rate > 0 or spread < 0 or cross_entropy < 0:
        raise ValueError("the learning rate must be above 0, spread and the weight of cross-entropy 0 at least")
    check_output(output)
    for file, check in ((json_file, check_file), (plot, check_drawing)):
        if file:
            check(file)
    student = Student(adapter, form)
    config = adapter.config
    source = Source(model or config.base_model_name_or_path, revision or config.revision, trust_remote_code)
    adapter.check_model(source.fingerprint)
    folder = Path(checkpoints or f"{str(output).rstrip('/')}.checkpoints")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP_SHARE * steps),
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, min(10, steps // 10)),
        save_steps=save_steps,
        save_total_limit=2,
        report_to=report_to,
        seed=seed,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
    )
    context = choose_context(source.config, context)
    check_repeats(repeats, context)
    given = {
        "adapter": config.weights_sha256,
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
        "processes": arguments.world_size,
        "context": context,
        "seed": seed,
    }
    last = _last_checkpoint(folder, given, resume)
    tokens = steps * batch_size * accumulate * arguments.world_size * context
    windows, held_out = draw_windows(source, text, tokens, eval_windows, context, seed, config.made)
    windows = with_repeats(windows, repeats, _plain_tokens(source), seed)
    network = source.load(dtype, str(arguments.device))
    task = Distillation(network, student, budgets, spread=spread, cross_entropy=cross_entropy)
    trainer = DistillationTrainer(
        model=task,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": windows}).with_format("torch"),
    )
    if arguments.process_index == 0 and last is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ARGUMENTS_FILE, given)
    trainer.train(resume_from_checkpoint=last)
    log = [
        {"step": row["step"], "kl": row["kl"], "learning_rate": row["learning_rate"]}
        for row in trainer.state.log_history
        if "kl" in row
    ]
    made = how_made("train", text, windows, eval_windows, seed, network, config.made) | {
        name: given[name]
        for name in ("steps", "form", "budgets", "spread", "cross_entropy", "repeats", "learning_rate")
    }
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


def _plain_tokens(source: Source) -> np.ndarray:
    """Token ids that stand for text."""
    tokenizer = source.tokenizer
    known = min(len(tokenizer), source.config.get_text_config(decoder=True).vocab_size)
    return np.setdiff1d(np.arange(known), tokenizer.all_special_ids)


def _last_checkpoint(folder: Path, given: dict[str, Any], resume: bool) -> str | None:
    """Of a run with the same arguments; None for a new run.

    Raises:
        ValueError: there is none to go on from, or it is of other arguments, or one is there and nobody asked for it.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if not resume:
        if last is not None:
            raise ValueError(f"{folder} has checkpoints; go on from them with --resume, or remove the folder")
        return None
    if last is None:
        raise ValueError(f"{folder} has no checkpoint to go on from; start without --resume")
    before = json.loads((folder / ARGUMENTS_FILE).read_text("utf-8"))
    changed = [name for name in given if given[name] != before.get(name)]
    if changed:
        what = ", ".join(f"{name} was {before.get(name)!r} and is {given[name]!r}" for name in changed)
        raise ValueError(f"{folder} is of another run: {what}; give what was given then, or remove the folder")
    return last
