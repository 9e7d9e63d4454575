# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mkv`. Neither torch nor vLLM is imported before a command needs it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mkv_kernels.layout import WIDTHS
from vllm_mkv import __version__, commands
from vllm_mkv.arguments import AGAINST, check_arguments
from vllm_mkv.commands import fail
from vllm_mkv.options import (
    add_allocation_option,
    add_dtype_option,
    add_model_options,
    add_repository_options,
    add_run_options,
    add_text_option,
    add_window_options,
    json_object,
    names,
    widths,
)

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    args = parser().parse_args(argv)
    try:
        check_arguments(vars(args))
        with warnings.catch_warnings():
            warnings.showwarning = partial(show_warning, warnings.showwarning)
            return args.run(args)
    except KeyboardInterrupt:
        print("vllm-mkv: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("vllm_mkv", "mkv_kernels"):
            raise
        return fail(f"{error.name} is not installed; install the tools: pip install '.[fit]' in a clone of vllm-mkv")
    except (ValueError, NotImplementedError, OSError, ImportError, SafetensorError) as error:
        return fail(str(error) or type(error).__name__)


def show_warning(others: Callable[..., None], message: Any, category: type, filename: str, *rest: Any) -> None:
    """Our own warnings are for the user of a command: without the line of code that they come from."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        print(f"vllm-mkv: warning: {message}", file=sys.stderr)
    else:
        others(message, category, filename, *rest)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vllm-mkv", description="Prepare and inspect adapters for a projected KV cache.")
    top.add_argument("--version", action="version", version=f"vllm-mkv {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_calibrate(subparsers)
    _add_train(subparsers)
    _add_search(subparsers)
    _add_eval(subparsers)
    _add_bench(subparsers)
    _add_info(subparsers)
    _add_check(subparsers)
    return top


def _add_calibrate(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "make an adapter for a model from text"
    sub = subparsers.add_parser("calibrate", help=about, description=about)
    sub.add_argument("model", metavar="MODEL", help="a folder or a Hub repository")
    add_text_option(sub)
    sub.add_argument("--tokens", type=int, default=100_000, metavar="N", help="tokens to fit on (default: %(default)s)")
    sub.add_argument(
        "--basis",
        choices=("query", "pca"),
        default="query",
        help="query keeps what queries look at, pca what keys and values vary in (default: %(default)s)",
    )
    sub.add_argument(
        "--group-heads",
        type=int,
        metavar="J",
        help="KV heads that share a basis and a cached vector (default: the most that have 16 query heads together)",
    )
    sub.add_argument("--output", required=True, metavar="ADAPTER", help="the folder to write the adapter to")
    add_window_options(sub)
    sub.set_defaults(run=commands.calibrate)


def _add_train(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "train an adapter's bases: with a small cache, predict what the model does without one"
    sub = subparsers.add_parser("train", help=about, description=about)
    add = sub.add_argument
    add("adapter", metavar="ADAPTER", help="a folder or a Hub repository; one that was searched")
    add_text_option(sub)
    add("--steps", type=int, required=True, metavar="N", help="steps of the optimiser; no default")
    add("--output", required=True, metavar="ADAPTER", help="the folder to write the new adapter to")
    add(
        "--budgets",
        nargs=2,
        type=float,
        default=(0.065, 0.25),
        metavar=("LEAST", "MOST"),
        help="range that every step draws its budget from, as shares of the own cache (default: 0.065 0.25)",
    )
    add(
        "--spread",
        type=float,
        default=0.1,
        metavar="S",
        help="standard deviation of the budgets of single layers, latent groups and sides around the step's, as a "
        "share of the range of --budgets (default: %(default)s)",
    )
    add(
        "--form",
        choices=("free", "orthogonal"),
        default="free",
        help="turns that are trained: any, or such as keep the coordinates' sizes (default: %(default)s)",
    )
    add(
        "--cross-entropy",
        type=float,
        default=0.0,
        metavar="W",
        help="in the loss, KL / stopgrad(KL) + W * that of the next token (default: %(default)s)",
    )
    add(
        "--repeats",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of windows in which passages of random tokens stand twice, from 0 to 1 (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=float,
        default=5e-4,
        metavar="LR",
        help="peak learning rate (default: %(default)s)",
    )
    add("--batch-size", type=int, default=4, metavar="N", help="windows at once on a device (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per device and step (default: %(default)s)")
    add("--checkpoints", metavar="DIR", help="folder of the trainer's checkpoints (default: OUTPUT.checkpoints)")
    add("--save-steps", type=int, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add(
        "--resume",
        action="store_true",
        help="go on from the last complete checkpoint (default: refuse where there is one)",
    )
    add("--report-to", default="none", metavar="NAME", help="logger: tensorboard, wandb, .. (default: %(default)s)")
    add("--plot", metavar="FILE.png", help="file to draw the loss over the steps to (default: none)")
    add("--json", metavar="FILE.json", help="file to write the loss over the steps to (default: none)")
    add("--model", help="folder or Hub repository of the model (default: what the adapter was made for)")
    add_window_options(sub)
    sub.set_defaults(run=commands.train)


def _add_search(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "find the order in which an adapter's coordinates lose bits where that costs least"
    sub = subparsers.add_parser("search", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    add_text_option(sub)
    sub.add_argument("--output", required=True, metavar="ADAPTER", help="the folder to write; ADAPTER itself will do")
    sub.add_argument(
        "--widths",
        type=widths,
        default=WIDTHS,
        metavar="16,8,4,2,0",
        help="bits that a coordinate may have; 16,0 searches ranks alone (default: %(metavar)s)",
    )
    sub.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel ranks that get equal bytes at every budget (default: %(default)s)",
    )
    sub.add_argument(
        "--tokens", type=int, default=32_768, metavar="N", help="tokens to probe on (default: %(default)s)"
    )
    sub.add_argument("--model", help="folder or Hub repository of the model (default: what the adapter was made for)")
    add_window_options(sub)
    sub.set_defaults(run=commands.search)


def _add_eval(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "measure what budgets of an adapter, and other caches, cost a model"
    sub = subparsers.add_parser("eval", help=about, description=about)
    sub.add_argument("subject", metavar="MODEL|ADAPTER", help="a folder or a Hub repository, or an adapter's folder")
    add_text_option(sub)
    sub.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        metavar="B",
        help="shares of the model's own cache, in (0, 1] (default: the adapter's default)",
    )
    sub.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="vllm measures through the real engine, stock and MKV (default: %(default)s)",
    )
    sub.add_argument(
        "--against",
        type=names,
        default=(),
        metavar="NAME,..",
        help=f"caches to compare with, by commas: {', '.join(AGAINST)}; _nc is vLLM's norm correction (default: none)",
    )
    add_allocation_option(sub)
    sub.add_argument("--adapter", help="folder or Hub repository of MODEL's adapter (default: MODEL/mkv, if any)")
    sub.add_argument("--model", help="folder or Hub repository of ADAPTER's model (default: what it was made for)")
    sub.add_argument("--json", metavar="FILE.json", help="file to write the figures to (default: none)")
    sub.add_argument(
        "--plot", metavar="FILE.png", help="file to draw KL divergence against bytes per token to (default: none)"
    )
    sub.add_argument(
        "--windows", type=int, default=64, metavar="N", help="windows of text to measure on (default: %(default)s)"
    )
    add_run_options(sub)
    sub.set_defaults(run=commands.evaluate)


def _add_bench(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "time decode steps of the real engine over the context, with stock caches and with MKV"
    sub = subparsers.add_parser("bench", help=about, description=about)
    add = sub.add_argument
    add("name", nargs="?", metavar="MODEL|ADAPTER", help="a folder or a Hub repository, or an adapter's folder")
    add(
        "--shape",
        metavar="L,HQ,HKV,D,W",
        help="a Llama model without content in place of MODEL: layers, query heads, KV heads, head size, hidden size",
    )
    add("--adapter", help="folder or Hub repository of MODEL's adapter (default: MODEL/mkv, or else a random one)")
    add(
        "--budgets",
        nargs="+",
        type=float,
        metavar="B",
        help="shares of the model's own cache, in (0, 1] (default: the adapter's default)",
    )
    add_allocation_option(sub)
    add(
        "--group-heads",
        type=int,
        metavar="J",
        help="KV heads per latent group of a random adapter (default: as calibrate)",
    )
    add(
        "--widths",
        type=widths,
        metavar="16,8,4,2,0",
        help="bits that a coordinate of a random adapter may have (default: %(metavar)s)",
    )
    add(
        "--contexts",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens per request, two or more (default: those of 512 1024 2048 4096 that the model takes)",
    )
    add("--batch", type=int, default=4, metavar="N", help="requests at once (default: %(default)s)")
    add("--output-len", type=int, default=16, metavar="N", help="tokens that are timed at once (default: %(default)s)")
    add(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="times that they are timed, per context (default: %(default)s)",
    )
    add(
        "--warmup",
        type=int,
        default=1,
        metavar="N",
        help="times before, which do not count (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of prompts and random bases (default: %(default)s)",
    )
    add_dtype_option(sub, "what the model is stored in, and bfloat16 for a shape")
    add("--eager", action="store_true", help="no compilation and no CUDA graphs, as always on the CPU (default: both)")
    add(
        "--compilation-config",
        type=json_object,
        metavar="JSON",
        help='vLLM\'s; on GPUs, {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} starts in seconds (default: vLLM\'s)',
    )
    add(
        "--one-at-a-time",
        action="store_true",
        help="no two engines side by side, as always on GPUs (default: all, in turns)",
    )
    add(
        "--mkv-kernels",
        choices=("auto", "triton", "numba", "torch"),
        default="auto",
        help="kernels of MKV: triton needs a GPU, numba a CPU, torch is slow and runs on both; auto takes the fastest "
        "that runs (default: %(default)s)",
    )
    add("--json", metavar="FILE.json", help="file to write the figures to (default: none)")
    add("--plot", metavar="FILE.png", help="file to draw latency against context to (default: none)")
    add_repository_options(sub)
    sub.set_defaults(run=commands.bench)


def _add_info(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "print what an adapter is, its bytes per token and its bits by layer and side"
    sub = subparsers.add_parser("info", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument(
        "--budget", type=float, metavar="B", help="share of the model's own cache, in (0, 1] (default: the adapter's)"
    )
    sub.add_argument("--plot", metavar="FILE.png", help="file to draw the bits to, by layer and side (default: none)")
    sub.set_defaults(run=commands.info)


def _add_check(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "say whether an adapter fits a model and whether full rank is exact; no engine is started"
    sub = subparsers.add_parser("check", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument("model", metavar="MODEL", help="a folder or a Hub repository")
    sub.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="random tokens to compare on (default: %(default)s)"
    )
    add_model_options(sub)
    sub.set_defaults(run=commands.check)


if __name__ == "__main__":
    sys.exit(main())
