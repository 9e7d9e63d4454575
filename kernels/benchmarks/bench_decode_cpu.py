# SPDX-License-Identifier: Apache-2.0
"""Decode attention on a CPU: compiled kernels and their PyTorch twin beside vLLM's own operator at full size.

    OMP_NUM_THREADS=2 python kernels/benchmarks/bench_decode_cpu.py
    OMP_NUM_THREADS=1 python kernels/benchmarks/bench_decode_cpu.py --cpu-time    # on a machine that has more to do

Every kernel is checked against the twin in float32 before it is timed. Caches take turns, one call each, so that every
call finds the processor's caches full of another one's pages, as a model of many layers does, and all suffer alike from
what else the machine does: ratios count, times do not. `layer` rows are a whole step of a layer, with the projection
and storing of the step's tokens, against stock's attention and storing.

`vllm heads of R` is vLLM's operator on a cache of heads of R coordinates: what heads grouped by rank would cost, if all
ranks were a head size that it has, as keys' and values'; its result is not what MKV's pages need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.cases import GEOMETRIES, Spec
from benchmarks.layer import Layer, Requests, Setting, Shape
from benchmarks.verify import check_attention
from mkv_kernels.attend import attend
from mkv_kernels.compiled.decode import DecodeScratch, LayerDecode, kind_of
from mkv_kernels.compiled.store import LayerStore, StoreScratch
from mkv_kernels.compiled.vector import BFLOAT16, PAIRS
from mkv_kernels.pages import view_pages
from mkv_kernels.schedule import make_buckets, split_decodes
from mkv_kernels.store import project_and_store

Run = Callable[[], Any]
STOCK, STOCK_LAYER = "vllm", "vllm, layer"
BUDGETS = (("ranks", 0.5), ("ranks", 0.375), ("tiers", 0.156))
TWIN_REPEATS = 3
VLLM_BLOCK = 128
"""Tokens per page of vLLM's own cache on CPUs."""


def vllm_runs(shape: Shape, setting: Setting, head_size: int) -> tuple[Run, Run]:
    """vLLM's operator on a cache of its own, and the same with the storing of the step's tokens before it."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    geometry, dtype = setting.geometry, setting.dtype
    # Those of this processor: others' have instructions that it may not know.
    current_platform.import_kernels()
    isa = _get_attn_isa(dtype, VLLM_BLOCK, head_size)
    own = Setting(geometry, setting.device, dtype, VLLM_BLOCK)
    requests = Requests.make(shape, own)
    num_blocks = shape.num_blocks(VLLM_BLOCK)
    cache = torch.randn(num_blocks, geometry.kv_heads, 2 * VLLM_BLOCK, head_size).to(dtype)
    keys, values = cache.chunk(2, dim=2)
    query = torch.randn(shape.batch, geometry.query_heads, head_size).to(dtype)
    key, value = torch.randn(2, shape.batch, geometry.kv_heads, head_size).to(dtype)
    output = torch.empty_like(query)
    slots = requests.block_table[:, -1].long() * VLLM_BLOCK + VLLM_BLOCK - 1
    scheduled = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=geometry.query_heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=head_size,
        seq_lens=requests.seq_lens,
        dtype=dtype,
        query_start_loc=requests.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def run() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=requests.query_start_loc,
            seq_lens=requests.seq_lens,
            scale=setting.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=requests.block_table,
            softcap=0.0,
            scheduler_metadata=scheduled,
            s_aux=None,
        )

    def layer() -> None:
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
        run()

    return run, layer


def mkv_runs(name: str, layer: Layer, shape: Shape, rows: list[dict[str, Any]]) -> dict[str, Run]:
    """Compiled kernels and their twin, once they are checked; errors go to `rows`."""
    setting, table = layer.setting, Requests.make(shape, layer.setting)
    cache, query = layer.filled_cache(shape.num_blocks(setting.block_size)), layer.new_queries(shape.batch)
    pages, by_run = view_pages(cache, layer.layout), tuple(q.contiguous() for q in layer.by_run(query))
    arguments = (table.query_start_loc, table.seq_lens, table.block_table)
    decodes = split_decodes(*arguments, max_queries=1)[0]
    assert decodes is not None
    buckets = make_buckets(*arguments, setting.block_size, setting.dtype)
    output = layer.new_output(shape.batch)
    runs: dict[str, Run] = {}
    kinds: dict[str, int | None] = {"compiled": None}
    if kind_of(setting.dtype) == PAIRS:
        kinds["compiled, no bf16 products"] = BFLOAT16
    kernels = {
        kernel: LayerDecode(layer.bases, setting.scale, layer.num_heads, setting.dtype, DecodeScratch(), kind=kind)
        for kernel, kind in kinds.items()
    }
    for kernel, decode in kernels.items():
        output.fill_(float("nan"))
        decode(by_run, cache, decodes, output)
        errors = check_attention(layer, table, query, cache, output)
        if not errors.passed:
            raise SystemExit(f"{name}, {kernel}: not what the twin computes: {errors}")
        rows.append({"cache": name, "kernel": kernel, "error": errors.mean, "twin_error": errors.twin_mean})
        runs[kernel] = partial(decode, by_run, cache, decodes, output)
    runs["twin"] = lambda: attend(by_run, pages, layer.bases, buckets, setting.scale, output)
    q, k, v, _ = layer.new_inputs(shape.batch)
    slots = table.block_table[:, -1].long() * setting.block_size + setting.block_size - 1

    store = LayerStore(layer.bases, layer.num_heads, setting.dtype, StoreScratch())
    runs["compiled, layer"] = lambda: kernels["compiled"](store(q, k, v, cache, slots), cache, decodes, output)
    runs["twin's store, layer"] = lambda: kernels["compiled"](
        project_and_store(q, k, v, pages, layer.bases, slots, None), cache, decodes, output
    )
    return runs


def measure(runs: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Medians in milliseconds; runs take turns, the twin, which takes longest, in the first few only."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if name == "twin" and turn > TWIN_REPEATS:
                continue
            start = clock()
            run()
            if turn:  # the first is for warming up
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--group-heads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="with one thread: what others on the machine take aside"
    )
    args = parser.parse_args()
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("threads that wait for each other take time too; set OMP_NUM_THREADS=1 with --cpu-time")
    clock = time.process_time if args.cpu_time else time.perf_counter
    device, rows = torch.device("cpu"), []
    setting = Setting(GEOMETRIES["llama-3.1-8b"], device, torch.bfloat16, args.block_size)
    for context in args.contexts:
        shape = Shape(args.batch, context)
        stock = vllm_runs(shape, setting, setting.geometry.head_size)
        for J in args.group_heads:
            for kind, budget in BUDGETS:
                spec = Spec(kind, budget, J)
                found: list[dict[str, Any]] = []
                runs = {STOCK: stock[0], STOCK_LAYER: stock[1]}
                runs |= mkv_runs(spec.label, Layer(setting, spec), shape, found)
                if kind == "ranks" and J == 1 and (rank := round(budget * setting.geometry.head_size)) == 64:
                    runs[f"vllm heads of {rank}"] = vllm_runs(shape, setting, rank)[0]
                medians = measure(runs, args.repeats, clock)
                errors = {row["kernel"]: row for row in found}
                for kernel, milliseconds in medians.items():
                    peer = medians[STOCK_LAYER if kernel.endswith("layer") else STOCK]
                    row = {"context": context, "cache": spec.label, "kernel": kernel, "ms": round(milliseconds, 3)}
                    row["x stock"] = round(peer / milliseconds, 2)
                    row["error (twin's)"] = ""
                    if kernel in errors:
                        e = errors[kernel]
                        row["error (twin's)"] = f"{e['error']:.2g} ({e['twin_error']:.2g})"
                    rows.append(row)
                print(f"{context} {spec.label}: {medians}", file=sys.stderr)
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = Console(width=120)
    threads = f"{torch.get_num_threads()} threads"
    console.print(f"{report.hardware(device)}; {threads}; {report.versions()}; batch {args.batch}, bfloat16")
    console.print(table)
    print(
        json.dumps(
            {
                "hardware": report.hardware(device),
                "threads": threads,
                "versions": report.versions(),
                "arguments": vars(args),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
