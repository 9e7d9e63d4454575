# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mkv`. Neither torch nor vLLM is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from mkv_kernels.layout import WIDTHS
from vllm_mkv import __version__, commands
from vllm_mkv.commands import fail

INTERRUPTED = 130


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; give one such as '{{\"mode\": 0}}'")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    args = parser().parse_args(argv)
    try:
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
    _add_text_option(sub)
    sub.add_argument("--tokens", type=int, default=100_000, metavar="N", help="to fit on (default: %(default)s)")
    sub.add_argument("--basis", choices=("query", "pca"), default="query", help="(default: %(default)s)")
    sub.add_argument(
        "--group-heads",
        type=int,
        metavar="J",
        help="KV heads that share a basis (default: the most whose query heads are 16 at most)",
    )
    sub.add_argument("--output", required=True, metavar="ADAPTER", help="the folder to write")
    _add_window_options(sub, "windows to measure quality on, none of which is fitted on")
    sub.set_defaults(run=commands.calibrate)


def _add_train(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "train an adapter's bases: with a small cache, predict what the model does without one"
    sub = subparsers.add_parser("train", help=about, description=about)
    add = sub.add_argument
    add("adapter", metavar="ADAPTER", help="a folder or a Hub repository; one that was searched")
    _add_text_option(sub)
    add("--steps", type=int, required=True, metavar="N", help="of the optimiser")
    add("--output", required=True, metavar="ADAPTER", help="the folder to write")
    add(
        "--budgets",
        nargs=2,
        type=float,
        default=(0.065, 0.25),
        metavar=("LEAST", "MOST"),
        help="that steps draw (default: 0.065 0.25)",
    )
    add(
        "--spread",
        type=float,
        default=0.1,
        metavar="S",
        help="deviation of sides' budgets around a step's, as a share of the range of --budgets (default: %(default)s)",
    )
    add("--form", choices=("free", "orthogonal"), default="free", help="of what is trained (default: %(default)s)")
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
        help="of windows in which passages of random tokens stand twice (default: %(default)s)",
    )
    add("--learning-rate", type=float, default=5e-4, metavar="LR", help="at its peak (default: %(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="windows on a device at once (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step (default: %(default)s)")
    add("--checkpoints", metavar="DIR", help="of the trainer (default: ADAPTER.checkpoints)")
    add("--save-steps", type=int, default=100, metavar="N", help="between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last complete checkpoint")
    add("--report-to", default="none", metavar="NAME", help="tensorboard, wandb, .. (default: %(default)s)")
    add("--plot", metavar="FILE.png", help="draw the loss")
    add("--json", metavar="FILE.json", help="write the loss")
    add("--model", help="folder or Hub repository (default: what the adapter was made for)")
    _add_window_options(sub, "windows to measure quality on, none of which is trained on")
    sub.set_defaults(run=commands.train)


def _add_search(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "find the order in which an adapter's coordinates lose bits where that costs least"
    sub = subparsers.add_parser("search", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    _add_text_option(sub)
    sub.add_argument("--output", required=True, metavar="ADAPTER", help="the folder to write; may be the same")
    sub.add_argument(
        "--widths",
        type=_widths,
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
    sub.add_argument("--tokens", type=int, default=32_768, metavar="N", help="to probe on (default: %(default)s)")
    sub.add_argument("--model", help="folder or Hub repository (default: what the adapter was made for)")
    _add_window_options(sub, "windows to measure quality on, none of which is probed on")
    sub.set_defaults(run=commands.search)


def _widths(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no list of bits such as 16,8,4,2,0") from None


def _add_text_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE|DATASET",
        help="UTF-8 files, folders of .txt files, or datasets as NAME[:CONFIG[:SPLIT]]",
    )


def _add_window_options(sub: argparse.ArgumentParser, eval_windows: str) -> None:
    sub.add_argument(
        "--eval-windows", type=int, default=16, metavar="N", help=f"{eval_windows}; 0 for none (default: %(default)s)"
    )
    _add_run_options(sub)


def _add_run_options(sub: argparse.ArgumentParser, dtype: str | None = None) -> None:
    sub.add_argument("--context", type=int, metavar="N", help="tokens per window (default: 1024 or the longest)")
    sub.add_argument("--seed", type=int, default=0, help="of the choice of windows (default: %(default)s)")
    sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=dtype)
    _add_model_options(sub)


def _add_eval(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "measure what budgets of an adapter, and other caches, cost a model"
    sub = subparsers.add_parser("eval", help=about, description=about)
    sub.add_argument("subject", metavar="MODEL|ADAPTER", help="a folder or a Hub repository, or an adapter's folder")
    _add_text_option(sub)
    sub.add_argument(
        "--budgets", nargs="+", type=float, metavar="B", help="shares of the own cache (default: the adapter's)"
    )
    sub.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="vllm measures through the real engine (default: %(default)s)",
    )
    sub.add_argument(
        "--against",
        type=_names,
        default=(),
        metavar="NAME,..",
        help="caches to compare with: fp8, int8, int4, int3, int2, turboquant4, turboquant3, turboquant2; the last "
        "three also with vLLM's norm correction: turboquant4_nc, ..",
    )
    sub.add_argument("--allocation", choices=("path", "uniform"), default="path", help="(default: %(default)s)")
    sub.add_argument("--adapter", help="folder or Hub repository (default: MODEL/mkv, if there is one)")
    sub.add_argument("--model", help="folder or Hub repository (default: what ADAPTER was made for)")
    sub.add_argument("--json", metavar="FILE.json", help="write the figures")
    sub.add_argument("--plot", metavar="FILE.png", help="draw KL divergence against bytes per token")
    sub.add_argument("--windows", type=int, default=64, metavar="N", help="of text (default: %(default)s)")
    _add_run_options(
        sub, "to compute in; bytes and budgets stay those of the dtype that the model is stored in (default: that)"
    )
    sub.set_defaults(run=commands.evaluate)


def _add_bench(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "time decode steps of the real engine over the context, with stock caches and with MKV"
    sub = subparsers.add_parser("bench", help=about, description=about)
    add = sub.add_argument
    add("name", nargs="?", metavar="MODEL|ADAPTER", help="a folder or a Hub repository, or an adapter's folder")
    add("--shape", metavar="L,HQ,HKV,D,W", help="in place of MODEL: layers, query heads, KV heads, head size, hidden")
    add("--adapter", help="folder or Hub repository (default: MODEL/mkv, or else a random one)")
    add("--budgets", nargs="+", type=float, metavar="B", help="shares of the own cache (default: the adapter's)")
    add("--allocation", choices=("path", "uniform"), default="path", help="(default: %(default)s)")
    add("--group-heads", type=int, metavar="J", help="of a random adapter (default: as calibrate)")
    add("--widths", type=_widths, metavar="16,8,4,2,0", help="of a random adapter (default: %(metavar)s)")
    add("--contexts", nargs="+", type=int, metavar="N", help="tokens per request (default: 512 1024 2048 4096)")
    add("--batch", type=int, default=4, metavar="N", help="requests at once (default: %(default)s)")
    add("--output-len", type=int, default=16, metavar="N", help="tokens that are timed at once (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="of that, per context (default: %(default)s)")
    add("--warmup", type=int, default=1, metavar="N", help="repeats before, not counted (default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts and random bases (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="to compute in")
    add("--eager", action="store_true", help="without compilation and CUDA graphs, as always on the CPU")
    add(
        "--compilation-config",
        type=_json_object,
        metavar="JSON",
        help='of vLLM; on GPUs, {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} starts in seconds',
    )
    add("--one-at-a-time", action="store_true", help="no two engines side by side, as always on GPUs")
    add("--mkv-kernels", choices=("auto", "triton", "numba", "torch"), default="auto", help="(default: %(default)s)")
    add("--json", metavar="FILE.json", help="write the figures")
    add("--plot", metavar="FILE.png", help="draw latency against context")
    add("--revision", help="of the model's Hub repository")
    add("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    sub.set_defaults(run=commands.bench)


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(","))


def _add_info(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "print what an adapter is, its bytes per token and its bits by layer and side"
    sub = subparsers.add_parser("info", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument("--budget", type=float, metavar="B", help="share of the own cache (default: the adapter's)")
    sub.add_argument("--plot", metavar="FILE.png", help="draw the widths as a heatmap")
    sub.set_defaults(run=commands.info)


def _add_check(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "say whether an adapter fits a model and whether full rank is exact; no engine is started"
    sub = subparsers.add_parser("check", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument("model", metavar="MODEL", help="a folder or a Hub repository")
    sub.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="random ones to compare on (default: %(default)s)"
    )
    _add_model_options(sub)
    sub.set_defaults(run=commands.check)


def _add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, .. (default: %(default)s)")
    sub.add_argument("--revision", help="of the model's Hub repository")
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")


if __name__ == "__main__":
    sys.exit(main())
