# SPDX-License-Identifier: Apache-2.0
"""What `compile_check.py` compiles: layers of some model at some budget, each with the launches that it may see.

Every property that a kernel is compiled for occurs in some case: 1, 2, 4 and 8 KV heads per latent group; heads of 64,
96, 128 and 256; ranks and tiers; bfloat16 and float16; C and D folded into the weights or not; small and large blocks;
windows and soft-caps.
All of their combinations would take hours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from mkv_kernels.bases import LayerBases
from mkv_kernels.fused.decode import DecodeWorkspace, decode
from mkv_kernels.fused.expand import Expansion, expand
from mkv_kernels.fused.prefill import prefill
from mkv_kernels.fused.store import FEW_TOKENS, StoreWorkspace, project_and_store
from mkv_kernels.fused.table import LayerTable
from mkv_kernels.layout import GroupWidths, PageLayout

LAUNCHES = ("store few", "store many", "decode", "speculative", "prefill")


@dataclass(frozen=True)
class Case:
    """A layer, and what is launched for it.

    widths: of its latent groups' blocks, see `layout`.
    window, soft_cap: as `decode` and `prefill` take them.
    speculative: queries per request in a launch of that name.
    nvidia_only: left out for AMD's, whose compiler takes long for it, unless it is asked for by name.
    long: whether prefill over pages as they lie is compiled beside that over expanded ones: what layers with a window,
        and contexts that there is no room to expand, are served with.
    """

    widths: tuple[GroupWidths, ...]
    group_heads: int
    query_heads: int
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fold_up: bool = False
    fold_down: bool = True
    window: int = 0
    soft_cap: float = 0.0
    speculative: int = 4
    launches: tuple[str, ...] = ("decode", "prefill")
    nvidia_only: bool = False
    long: bool = True


def blocks(**counts: int) -> tuple[int, ...]:
    """Block widths from how many coordinates have 16, 8, 4 and 2 bits: b16, b8, b4, b2, and none: b0."""
    return tuple(w for w in (16, 8, 4, 2, 0) for _ in range(counts.get(f"b{w}", 0) // 16))


# The slowest to compile come first, so that no process ends long after the others.
CASES = {
    # The most that a layer may ask for, as ranks and beside tiers of a few bytes.
    "full-rank-j8": Case(((blocks(b16=1024), blocks(b16=1024)),), 8, 4, fold_down=False, long=False),
    "narrow-tiers-j8": Case(
        ((blocks(b16=976, b8=16, b4=16, b2=16), blocks(b16=976, b8=16, b4=16, b2=16)),), 8, 2,
        nvidia_only=True, long=False,
    ),
    "tiers-j8": Case(
        ((blocks(b16=16, b8=48, b4=320, b2=320, b0=320), blocks(b8=32, b4=320, b2=320, b0=352)),), 8, 2,
        nvidia_only=True, long=False,
    ),
    "narrow-tiers-j4": Case(
        ((blocks(b16=464, b8=16, b4=16, b2=16), blocks(b16=464, b8=16, b4=16, b2=16)),), 4, 4, long=False,
    ),
    "full-rank-j4": Case(((blocks(b16=512), blocks(b16=512)),), 4, 4),
    # Llama-3.1-8B, budget 0.156 by tiers.
    "tiers-j4": Case(
        (
            (blocks(b16=16, b8=48, b4=224, b2=128, b0=96), blocks(b8=32, b4=192, b2=192, b0=96)),
            (blocks(b8=64, b4=256, b2=64, b0=128), blocks(b4=256, b2=128, b0=128)),
        ),
        4, 4, launches=LAUNCHES, long=False,
    ),
    # The same with rows of any length, as a search leaves them.
    "tiers-j4-uneven": Case(
        (
            (blocks(b16=16, b8=48, b4=208, b2=144, b0=96), blocks(b8=32, b4=176, b2=208, b0=96)),
            (blocks(b8=80, b4=240, b2=80, b0=112), blocks(b8=16, b4=240, b2=144, b0=112)),
        ),
        4, 4, nvidia_only=True, long=False,
    ),
    "tiers-j1-uneven": Case(
        (
            (blocks(b8=16, b4=48, b2=48, b0=16), blocks(b4=80, b2=48)),
            (blocks(b4=80, b2=16, b0=32), blocks(b8=16, b4=48, b2=16, b0=48)),
        ),
        1, 4, fold_up=True, nvidia_only=True, long=False,
    ),
    "tiers-j1": Case(
        (
            (blocks(b8=16, b4=64, b2=32, b0=16), blocks(b4=64, b2=64)),
            (blocks(b4=96, b2=32), blocks(b8=16, b4=48, b2=32, b0=32)),
        ),
        1, 4, fold_up=True, speculative=8, launches=LAUNCHES,
    ),
    # The same with 0.25 and 0.5 by ranks.
    "ranks-j4": Case(
        ((blocks(b16=256, b0=256), blocks(b16=192, b0=320)), (blocks(b16=128, b0=384), blocks(b16=256, b0=256))), 4, 4,
        block_size=64, launches=("decode", "speculative", "prefill"),
    ),
    "ranks-j1": Case(
        ((blocks(b16=80, b0=48), blocks(b16=64, b0=64)), (blocks(b16=16, b0=112), blocks(b16=112, b0=16))), 1, 4,
        fold_up=True, launches=LAUNCHES,
    ),
    # Of a Mistral and of a Gemma 2, whose scores are capped too where a layer has no window.
    "tiers-j4-window": Case(
        ((blocks(b16=16, b8=48, b4=224, b2=128, b0=96), blocks(b8=32, b4=192, b2=192, b0=96)),), 4, 4, window=4096,
        nvidia_only=True,
    ),
    "ranks-j4-soft-cap": Case(
        ((blocks(b16=256, b0=256), blocks(b16=256, b0=256)),), 4, 2, window=4096, soft_cap=50.0,
        launches=("decode", "speculative", "prefill"),
    ),
    "ranks-j1-window": Case(
        ((blocks(b16=80, b0=48), blocks(b16=64, b0=64)), (blocks(b16=16, b0=112), blocks(b16=112, b0=16))), 1, 2,
        fold_up=True, window=1024, nvidia_only=True,
    ),
    "narrow-tiers-j1": Case(
        ((blocks(b16=16, b8=16, b4=16, b2=16, b0=64), blocks(b8=16, b4=16, b2=16, b0=80)),), 1, 4,
        nvidia_only=True, long=False,
    ),
    "full-rank-j1": Case(((blocks(b16=128), blocks(b16=128)),), 1, 4, fold_up=True),
    # Heads of other sizes.
    "tiers-j2-head-64": Case(
        ((blocks(b16=16, b4=64, b2=32, b0=16), blocks(b4=64, b2=64)),), 2, 4, head_size=64, block_size=32,
        dtype=torch.float16, speculative=2, launches=("decode", "speculative", "prefill"),
    ),
    "ranks-j2-head-96": Case(
        ((blocks(b16=96, b0=96), blocks(b16=112, b0=80)),), 2, 1, head_size=96, dtype=torch.float16, fold_down=False,
        launches=("store few", "store many", "decode", "prefill"),
    ),
    "tiers-j1-head-256": Case(
        ((blocks(b8=32, b4=128, b2=64, b0=32), blocks(b4=128, b2=128)),), 1, 2, head_size=256, block_size=128,
        fold_up=True,
    ),
    "full-rank-head-256": Case(((blocks(b16=256), blocks(b16=256)),), 1, 2, head_size=256),
}  # fmt: skip
QUICK = ("tiers-j4-window", "tiers-j1", "ranks-j4", "ranks-j4-soft-cap", "narrow-tiers-j1")
"""Of `compile_check.py --quick`."""


@dataclass(frozen=True)
class Known:
    """What is beyond the bar and stays there: measures of `compile_check`, in their units, with limits.

    case, kernel, arch: patterns as of file names.
    spills, moves, waits: at most so many.
    loads: at least so many bytes; None where loads are to meet the bar.
    """

    case: str
    kernel: str
    arch: str
    reason: str
    spills: int = 0
    moves: int = 0
    waits: int = 0
    loads: int | None = None

    def covers(self, case: str, kernel: str, arch: str) -> bool:
        return fnmatch(case, self.case) and fnmatch(kernel, self.kernel) and fnmatch(arch, self.arch)

    def allows(self, measure: str, number: int) -> bool:
        if measure == "loads":
            return self.loads is not None and number >= self.loads
        return measure in ("spills", "moves", "waits") and number <= getattr(self, measure)


NARROW = "a tile of 16 coordinates or words has fewer than 16 bytes for each of 256 threads"
ACROSS = "numbers of the thread, from before the loop to behind it"
CAPPED = "128 registers at most, so that 16 programs share a multiprocessor"
HOPPER = "accumulators, scores and powers of 128 rows of 4 warps leave 30 registers for all else"
MANY = "5 or 6 tiers, and more than 700 columns of values"
WARP = "accumulators of one warp, and what its loops have in common, take all registers of a thread"
SUMS = "a product over 1024 coordinates that is not a loop"
KNOWN = (
    Known("*tiers-j8", "*", "*", NARROW, loads=2),
    Known("narrow-tiers-j4", "*", "*", NARROW, loads=4),
    Known("*tiers-*", "*", "gfx942", "of 32 tokens, threads load 4 or 8 bytes each; 64 spill", loads=4),
    Known("tiers-j1-head-256", "attend_codes", "80", ACROSS, spills=8),
    Known("narrow-tiers-j1", "attend_codes", "100", CAPPED, spills=16, moves=1),
    Known("narrow-tiers-j1", "prefill", "80", ACROSS, spills=16),
    Known("ranks-j4", "prefill", "80", ACROSS, spills=8),
    Known("narrow-tiers-j4", "attend", "100", ACROSS, spills=8),
    Known("*", "prefill", "100", ACROSS, spills=24, moves=1),
    Known("*", "prefill", "90", HOPPER, spills=152, moves=19),
    Known("*-window", "prefill", "90", "CUDA 13.3's assembler (Triton 3.9) has such code wait", waits=132),
    Known("tiers-j1", "prefill", "*0", WARP, spills=96, moves=46),
    Known("ranks-j1*", "attend", "100", WARP, spills=16, moves=3),
    Known("*tiers-j[12]*", "attend", "*0*", WARP, spills=72, moves=14),
    Known("*tiers-j8", "attend", "*0*", MANY, spills=80, moves=17),
    Known("full-rank-j8", "expand", "100", SUMS, spills=8, moves=1),
)
"""With Triton 3.7 to 3.9, whose compilers differ in what they spill. What vLLM has is `make env`'s."""


def launcher(case: Case, launch: str) -> Callable[[], None]:
    """A function that calls the launcher with tensors of the case's shapes, on the CPU."""
    layout = PageLayout(case.widths, case.block_size, case.dtype.itemsize)
    G, J, M, d = len(case.widths), case.group_heads, case.query_heads, case.head_size
    n = J * d
    eye = torch.eye(n).expand(G, n, n)
    bases = LayerBases.cut(
        layout, A=eye, B=eye, C=eye, D=eye, key_mean=torch.zeros(G, n), value_mean=torch.zeros(G, n), head_size=d,
        fold_down=case.fold_down, fold_up=case.fold_up,
    )  # fmt: skip
    table = LayerTable.build(bases)
    elements = layout.bytes_per_token // layout.itemsize
    cache = torch.zeros(4, 1, case.block_size, elements, dtype=case.dtype)
    requests = 2
    queries = {"decode": 1, "speculative": case.speculative, "prefill": 100, "store few": 1}.get(launch, FEW_TOKENS)
    T = requests * queries
    projected = torch.zeros(T, G, J, M, table.rank_k, dtype=case.dtype)
    if launch.startswith("store"):
        query, key, value = (torch.zeros(T, G * J * heads, d, dtype=case.dtype) for heads in (M, 1, 1))
        slots, scratch = torch.zeros(T, dtype=torch.int64), StoreWorkspace.make(table, T)
        return lambda: project_and_store(query, key, value, cache, table, slots, projected, scratch)
    output = torch.zeros(T, G * J * M, d, dtype=case.dtype)
    step = (
        torch.zeros(requests, 64, dtype=torch.int32),
        torch.full((requests,), 128, dtype=torch.int32),
        torch.arange(0, T + 1, queries, dtype=torch.int32),
    )
    if launch == "prefill":
        scores: dict[str, Any] = {"window": case.window, "soft_cap": case.soft_cap}

        def run() -> None:
            expansion = None if case.window else Expansion.of(table)
            if expansion is None or case.long:
                prefill(projected, cache, table, *step, 0.1, output, **scores)
            if expansion is not None:
                numbers = expansion.numbers_per_block() // case.block_size
                expanded = torch.zeros(4, 1, case.block_size, numbers, dtype=case.dtype)
                expand(cache, table, expansion, *step[:2], expanded, step[0], max_seq_len=128)
                own = torch.zeros(T, G * J, 1, M, d, dtype=case.dtype) if expansion.own_queries else projected
                prefill(own, expanded, expansion.table, *step, 0.1, output, **scores)

        return run
    workspace = DecodeWorkspace.make(table, T, G * J * M, 4)
    return lambda: decode(
        projected, cache, table, *step, 0.1, output, workspace, max_queries=queries, num_splits=4,
        window=case.window, soft_cap=case.soft_cap,
    )  # fmt: skip
