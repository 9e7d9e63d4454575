# SPDX-License-Identifier: Apache-2.0
"""What the commands do, and print: thin over the functions that Python calls. Each returns an exit status."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_mkv.adapter import Adapter


def fail(message: str) -> int:
    print(f"vllm-mkv: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


RUN_OPTIONS = ("context", "seed", "dtype", "device", "revision", "trust_remote_code")
"""What `_add_run_options` adds, as the functions behind the commands call it."""


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in RUN_OPTIONS}


def print_quality(adapter: Adapter) -> None:
    """What was measured of it, if anything was."""
    from rich.console import Console

    from vllm_mkv.evaluation.report import quality_rows

    if adapter.config.quality:
        Console().print(quality_rows(adapter.config.quality))


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
    print_quality(adapter)
    # The same windows have to be held out.
    same = [f"--{name} {value}" for name in ("context", "seed") if (value := getattr(args, name))]
    found = ["--text", *map(shlex.quote, args.text), *same, "--output", shlex.quote(args.output)]
    print(f"wrote {args.output}; next, find out who gets how many bits, without which small budgets cost far more:")
    print(f"  vllm-mkv search {shlex.quote(args.output)} {' '.join(found)}")
    print("or serve it as it is:")
    options = f'{{"mkv": {{"adapter": "{args.output}", "budget": {adapter.config.default_budget:g}}}}}'
    print(f"  vllm serve {args.model} --attention-backend mkv --additional-config '{options}'{cache_memory()}")
    return 0


def cache_memory() -> str:
    """An option of `vllm serve` without which vLLM takes almost all memory of a machine without a GPU."""
    import torch

    return "" if torch.cuda.is_available() else " --kv-cache-memory-bytes 268435456"


def train(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import Adapter, check_output, locate

    check_output(args.output)
    loaded = Adapter.load(locate(args.adapter, None))
    from accelerate import PartialState

    from vllm_mkv.fit.checkpoints import checkpoint_folder, complete_checkpoints
    from vllm_mkv.fit.train import train as distil

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "adapter", "json")}
    folder = checkpoint_folder(args.output, args.checkpoints)
    try:
        trained, log = distil(loaded, **given | {"budgets": tuple(args.budgets), "json_file": args.json})
    except KeyboardInterrupt:
        if (complete := complete_checkpoints(folder)) and PartialState().is_main_process:
            print(f"\nvllm-mkv: {complete[-1]} is complete; go on with --resume", file=sys.stderr)
        raise
    if not PartialState().is_main_process:
        return 0
    print_quality(trained)
    print(f"KL divergence of steps: {log[0]['kl']:.4f} at first, {log[-1]['kl']:.4f} at last")
    print(f"wrote {args.output}; find the path that suits it: vllm-mkv search {args.output} --output {args.output} ..")
    print(f"the checkpoints in {folder} are not needed any more")
    return 0


def search(args: argparse.Namespace) -> int:
    from vllm_mkv.adapter import Adapter, check_output, locate

    check_output(args.output)
    loaded = Adapter.load(locate(args.adapter, None))
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
    best = "the adapter's path stays" if found.exponent is None else f"rates to the power of {found.exponent:g}"
    print(
        f"{found.passes} forward passes of the calibration set: one probe per side of {layers} layers, and "
        f"{found.passes - 2 * layers} others; {best}"
    )
    print_quality(searched)
    print(f"wrote {args.output}: {len(searched.path.steps)} steps")
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

    folder: Path = locate(args.adapter, None)
    adapter = Adapter.load(folder)
    from vllm_mkv.fit.calibrate import longest_context
    from vllm_mkv.fit.check import TOLERANCE, full_rank_exactness, inverse_error
    from vllm_mkv.fit.model import Source

    source = Source(args.model, args.revision, args.trust_remote_code)
    adapter.check_model(source.fingerprint)
    longest = longest_context(source.config)
    if args.tokens > longest:
        raise ValueError(f"--tokens {args.tokens} is more than the model's longest context; use {longest} at most")
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
