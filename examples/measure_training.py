# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a step of `vllm-mkv train`, beside a plain training step of all weights of the same model.

    python examples/measure_training.py examples/books-4m --batch-size 4 --context 512
    python examples/measure_training.py --shape 2,32,8,128,4096 --batch-size 1 --dtype bfloat16

Every kind of step runs in a process of its own, and they take turns, so that noise hits all alike. Memory is what a
process holds at most, less the most that it held until the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_mkv.adapter import Adapter
from vllm_mkv.evaluation.subject import Subject
from vllm_mkv.evaluation.synthetic import ModelShape, random_adapter
from vllm_mkv.fit.distil import Distillation
from vllm_mkv.fit.model import Source, choose_device
from vllm_mkv.fit.student import FORMS, Student

KINDS = ("plain", *FORMS)
"""A plain step, and a step of distillation for each form of turns."""


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def plain_step(model: PreTrainedModel) -> Callable[[torch.Tensor], None]:
    """Cross-entropy, gradients of all weights, AdamW."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(ids: torch.Tensor) -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def distillation_step(model: PreTrainedModel, adapter: Adapter, form: str) -> Callable[[torch.Tensor], None]:
    """As `vllm_mkv.fit.train` takes it, its averages included."""
    task = Distillation(model, Student(adapter, form), (0.1, 0.5), spread=0.1).to(model.device)
    optimiser = torch.optim.AdamW([x for x in task.parameters() if x.requires_grad], lr=1e-5)

    def step(ids: torch.Tensor) -> None:
        task(ids)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        task.update_averages()

    return step


def model_and_adapter(args: argparse.Namespace) -> tuple[PreTrainedModel, Adapter]:
    if args.shape is not None:
        with tempfile.TemporaryDirectory() as folder:
            args.shape.save(Path(folder), args.dtype)
            source = Source(folder)
            model = AutoModelForCausalLM.from_config(source.config, dtype=source.config.dtype)
            return model.to(choose_device(args.device)).eval(), random_adapter(folder, source.fingerprint)
    subject = Subject.find(args.subject, adapter=None, model=args.model, revision=None, trust_remote_code=False)
    if subject.adapter is None:
        raise ValueError(f"{args.subject} has no adapter; give an adapter's folder, or a model that has one in mkv/")
    return subject.source.load(args.dtype, args.device), subject.adapter


def worker(kind: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Answers True with the seconds of one step, and False, at last, with the memory."""
    torch.manual_seed(0)
    model, adapter = model_and_adapter(args)
    held = peak_bytes(model.device)
    step = plain_step(model) if kind == "plain" else distillation_step(model, adapter, kind)
    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.context), device=model.device)
    while pipe.recv():
        start = time.perf_counter()
        step(ids)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_bytes(model.device) - held)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of `args.steps` steps of every kind, after one that is not counted."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for kind in KINDS:
        here, there = context.Pipe()
        processes.append(context.Process(target=worker, args=(kind, args, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    seconds: list[list[float]] = [[] for _ in KINDS]
    for count in range(args.steps + 1):
        for pipe, of_kind in zip(pipes, seconds, strict=True):
            pipe.send(True)
            taken = pipe.recv()
            if count:
                of_kind.append(taken)
    tokens = args.batch_size * args.context
    rows = []
    for kind, pipe, of_kind in zip(KINDS, pipes, seconds, strict=True):
        pipe.send(False)
        rows.append({"step": kind, "tokens_per_second": tokens / statistics.median(of_kind), "peak_bytes": pipe.recv()})
    for process in processes:
        process.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="?", metavar="MODEL|ADAPTER", help="a folder or a Hub repository")
    parser.add_argument(
        "--shape", type=ModelShape.parse, metavar="L,HQ,HKV,D,W", help="in place of them: random weights and bases"
    )
    parser.add_argument("--model", help="folder or Hub repository (default: what ADAPTER was made for)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=9, help="that are timed (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    args = parser.parse_args()
    if (args.subject is None) == (args.shape is None):
        parser.error("give a model, an adapter or a --shape")
    rows = measure(args)
    table = Table(
        title=f"a step of {args.batch_size} x {args.context} tokens, {args.subject or args.shape}, {args.dtype}"
    )
    for column in ("step", "tokens/s", "of a plain one", "peak memory above the model, MB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        share = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        table.add_row(row["step"], f"{row['tokens_per_second']:.0f}", f"{share:.2f}", f"{row['peak_bytes'] / 1e6:.0f}")
    Console().print(table)
    print(json.dumps({"arguments": vars(args) | {"shape": args.shape and asdict(args.shape)}, "rows": rows}))


if __name__ == "__main__":
    main()
