# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode tokens/s through the real engine, MKV beside the stock backend, in one process and one run.

    python kernels/benchmarks/bench_engine_cpu.py --contexts 512 4096 --budgets 0.5 0.25

The model has random weights and few layers, so that attention is most of the work: 32 query heads on 8 KV heads of 128.
First the tokens at full rank are checked against the stock backend's, in float32. Runs alternate between the backends;
the medians are printed as a table, and as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """A Llama configuration and an adapter of random orthogonal bases for it; the weights are vLLM's dummies."""
    from transformers import LlamaConfig

    from vllm_mkv.adapter import Adapter, AdapterConfig, LayerBases
    from vllm_mkv.allocation import AllocationPath, CacheShape
    from vllm_mkv.fingerprint import ModelFingerprint

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=4096,
        max_position_embeddings=16384,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    groups, n = 8 // args.group_heads, 128 * args.group_heads
    rng = np.random.default_rng(0)

    def orthogonal() -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(groups, n, n)))[0].astype(np.float32)

    bases = []
    for _ in range(args.layers):
        U, V, zero = orthogonal(), orthogonal(), np.zeros((groups, n), np.float32)
        bases.append(LayerBases(U, U, V, np.ascontiguousarray(V.swapaxes(1, 2)), zero, zero))
    Adapter(
        AdapterConfig(
            base_model_name_or_path=str(folder),
            model=ModelFingerprint.of(config),
            basis="random",
            group_heads=args.group_heads,
            layers=list(range(args.layers)),
            default_budget=0.5,
        ),
        tuple(bases),
        AllocationPath.uniform(CacheShape(args.layers, groups, n)),
    ).save(folder / "mkv", "Random bases, to measure speed with.\n")


class Engine:
    """One engine of the run; several live side by side."""

    def __init__(self, folder: Path, budget: float | None, args: argparse.Namespace, dtype: str) -> None:
        from vllm import LLM

        mkv: dict[str, Any] = (
            {}
            if budget is None
            else {
                "attention_backend": "mkv",
                "additional_config": {"mkv": {"budget": budget}},
            }
        )
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max(args.contexts) + args.decode + 1,
            max_num_seqs=args.batch,
            seed=0,
            block_size=128,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=args.cache_bytes,
            **mkv,
        )

    def run(self, context: int, batch: int, num_tokens: int) -> tuple[float, list[tuple[int, ...]]]:
        """Seconds and tokens: `num_tokens` greedy tokens after `context` tokens, for each of `batch` requests."""
        from vllm import SamplingParams

        rng = np.random.default_rng(context)
        prompts = [{"prompt_token_ids": rng.integers(2, 4000, context).tolist()} for _ in range(batch)]
        start = time.perf_counter()
        outputs = self.llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return time.perf_counter() - start, [tuple(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def check_full_rank(folder: Path, args: argparse.Namespace) -> None:
    """Raises RuntimeError unless full rank gives the stock backend's tokens."""
    found = []
    for budget in (None, 1.0):
        engine = Engine(folder, budget, args, "float32")
        found.append(engine.run(min(args.contexts), args.batch, 8)[1])
        engine.close()
    if found[0] != found[1]:
        raise RuntimeError("full rank does not give the stock backend's tokens in float32; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--group-heads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode per request")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=1 << 28)
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, args)
        check_full_rank(folder, args)
        budgets = [None, 1.0, *args.budgets]
        rows: list[dict[str, Any]] = []
        for context in args.contexts:
            seconds: dict[tuple[float | None, str], list[float]] = {}
            for _ in range(args.repeats):
                for budget in budgets:
                    engine = Engine(folder, budget, args, args.dtype)
                    engine.run(64, args.batch, 2)
                    prefill, _ = engine.run(context, args.batch, 1)
                    # From now on the prompt's pages are in the cache, so that the difference is decoding alone.
                    one, _ = engine.run(context, args.batch, 1)
                    more, _ = engine.run(context, args.batch, 1 + args.decode)
                    seconds.setdefault((budget, "prefill"), []).append(prefill)
                    seconds.setdefault((budget, "decode"), []).append(more - one)
                    engine.close()
            for phase, tokens in (("prefill", context), ("decode", args.decode)):
                stock = statistics.median(seconds[None, phase])
                for budget in budgets:
                    median = statistics.median(seconds[budget, phase])
                    rows.append(
                        {
                            "context": context,
                            "phase": phase,
                            "cache": "stock" if budget is None else f"mkv {budget:g}",
                            "tokens_per_second": round(args.batch * tokens / median, 1),
                            "ratio_to_stock": round(stock / median, 3),
                        }
                    )
    table = Table("context", "phase", "cache", "tokens/s", "ratio to stock")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    hardware = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(json.dumps({"hardware": hardware, "arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
