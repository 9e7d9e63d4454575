# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-mkv`. Neither torch nor vLLM is imported before a command needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mkv_kernels.layout import WIDTHS
from vllm_mkv import __version__

INTERRUPTED = 130


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
        return fail(f"{error.name} is not installed; install the tools: pip install 'vllm-mkv[fit]'")
    except (ValueError, NotImplementedError, OSError, ImportError, SafetensorError) as error:
        return fail(str(error) or type(error).__name__)


def fail(message: str) -> int:
    print(f"vllm-mkv: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vllm-mkv", description="Prepare and inspect adapters for a projected KV cache.")
    top.add_argument("--version", action="version", version=f"vllm-mkv {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_calibrate(commands)
    _add_search(commands)
    _add_eval(commands)
    _add_bench(commands)
    _add_info(commands)
    _add_check(commands)
    return top


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "make an adapter for a model from text"
    sub = commands.add_parser("calibrate", help=about, description=about)
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
    sub.set_defaults(run=calibrate)


def _add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "find the order in which an adapter's coordinates lose bits where that costs least"
    sub = commands.add_parser("search", help=about, description=about)
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
    sub.set_defaults(run=search)


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


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "measure what budgets of an adapter, and other caches, cost a model"
    sub = commands.add_parser("eval", help=about, description=about)
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
    sub.set_defaults(run=evaluate)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "time decode steps of the real engine over the context, with stock caches and with MKV"
    sub = commands.add_parser("bench", help=about, description=about)
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
    add("--one-at-a-time", action="store_true", help="no two engines side by side, as always on GPUs")
    add("--mkv-kernels", choices=("auto", "triton", "numba", "torch"), default="auto", help="(default: %(default)s)")
    add("--json", metavar="FILE.json", help="write the figures")
    add("--plot", metavar="FILE.png", help="draw latency against context")
    add("--revision", help="of the model's Hub repository")
    add("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    sub.set_defaults(run=bench)


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(","))


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "print what an adapter is, its bytes per token and its bits by layer and side"
    sub = commands.add_parser("info", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument("--budget", type=float, metavar="B", help="share of the own cache (default: the adapter's)")
    sub.add_argument("--plot", metavar="FILE.png", help="draw the widths as a heatmap")
    sub.set_defaults(run=info)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "say whether an adapter fits a model and whether full rank is exact; no engine is started"
    sub = commands.add_parser("check", help=about, description=about)
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or a Hub repository")
    sub.add_argument("model", metavar="MODEL", help="a folder or a Hub repository")
    sub.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="random ones to compare on (default: %(default)s)"
    )
    _add_model_options(sub)
    sub.set_defaults(run=check)


def _add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, .. (default: %(default)s)")
    sub.add_argument("--revision", help="of the model's Hub repository")
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")


RUN_OPTIONS = ("context", "seed", "dtype", "device", "revision", "trust_remote_code")
"""What `_add_run_options` adds, as the functions behind the commands call it."""


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in RUN_OPTIONS}


def calibrate(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import check_output

    check_output(args.output)
    from vllm_mkv.fit.calibrate import calibrate as make

    adapter = make(
        args.model,
        args.text,
        tokens=args.tokens,
        output=args.output,
        basis=args.basis,
        group_heads=args.group_heads,
        eval_windows=args.eval_windows,
        **run_options(args),
    )
    from rich.console import Console

    from vllm_mkv.evaluation.report import quality_rows

    if adapter.config.quality:
        Console().print(quality_rows(adapter.config.quality))
    print(f"wrote {args.output}; serve it with:")
    options = f'{{"mkv": {{"adapter": "{args.output}", "budget": {adapter.config.default_budget:g}}}}}'
    print(f"  vllm serve {args.model} --attention-backend mkv --additional-config '{options}'")
    return 0


def search(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import Adapter, check_output, locate

    check_output(args.output)
    loaded = Adapter.load(locate(args.adapter, None))
    from rich.console import Console

    from vllm_mkv.evaluation.report import quality_rows
    from vllm_mkv.fit.search import search as find

    searched, found = find(
        loaded,
        args.text,
        output=args.output,
        widths=args.widths,
        shards=args.shards,
        tokens=args.tokens,
        eval_windows=args.eval_windows,
        model=args.model,
        **run_options(args),
    )
    layers = searched.shape.num_layers
    print(
        f"{found.passes} forward passes of the calibration set: one probe per side of {layers} layers, and "
        f"{found.passes - 2 * layers} others; rates to the power of {found.exponent:g}"
    )
    if searched.config.quality:
        Console().print(quality_rows(searched.config.quality))
    print(f"wrote {args.output}: {len(searched.path.steps)} steps, one for each block of 16 coordinates and width")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_mkv.evaluation.evaluate import evaluate as measure
    from vllm_mkv.evaluation.evaluate import evaluation_table

    found = measure(
        args.subject,
        args.text,
        budgets=args.budgets,
        against=args.against,
        engine=args.engine,
        adapter=args.adapter,
        model=args.model,
        allocation=args.allocation,
        num_windows=args.windows,
        **run_options(args),
        json_file=args.json,
        plot=args.plot,
    )
    Console().print(evaluation_table(found))
    for file in (args.json, args.plot):
        if file:
            print(f"wrote {file}")
    return 0


def bench(args: argparse.Namespace) -> int:
    from vllm_mkv.evaluation.bench import benchmark

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "json")}
    found = benchmark(**given, json_file=args.json)
    from rich.console import Console

    from vllm_mkv.evaluation.latency import print_latency

    print_latency(found, Console())
    for file in (args.json, args.plot):
        if file:
            print(f"wrote {file}")
    return 0


def info(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import locate
    from vllm_mkv.evaluation.report import print_info

    print_info(locate(args.adapter, None), args.budget, args.plot)
    return 0


def check(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import Adapter, locate

    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens} leaves nothing to compare on; use at least 1")
    folder: Path = locate(args.adapter, None)
    adapter = Adapter.load(folder)
    from vllm_mkv.fit.check import TOLERANCE, full_rank_exactness, inverse_error
    from vllm_mkv.fit.model import Source

    source = Source(args.model, args.revision, args.trust_remote_code)
    adapter.check_model(source.fingerprint)
    print(f"fits: {args.model} has the attention that {folder} was made for")
    print(f"inverse: bases and their inverses are off by {inverse_error(adapter):.1e} at most")
    found = full_rank_exactness(source.load("float32", args.device), adapter, tokens=args.tokens)
    print(
        f"full rank: logits differ by {found.logit_difference:.1e} at most, of {found.logit_scale:.3g}; the most "
        f"likely token is the same at {found.agreement:.1%} of {args.tokens} positions"
    )
    if not found.exact:
        return fail(
            f"full rank is not exact within {TOLERANCE:g} of the largest logit; make the adapter again for this model: "
            f"vllm-mkv calibrate {args.model} --text FILE --output ADAPTER"
        )
    print("exact: full rank equals the model's own attention up to float32 rounding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
