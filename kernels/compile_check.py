# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels ahead of time, without a GPU, and prints what the compiled code needs and uses.

    python kernels/compile_check.py                      # every case, for sm_90
    python kernels/compile_check.py --case tiers-j4 --kernel decode --arch 80 --asm FOLDER

Kernels are compiled through the launchers themselves, with the arguments that they pass: what is compiled here is what
is launched there. One line per kernel: registers per thread, spilled bytes, shared memory, tensor-core instructions,
widths in bits of the loads from global memory with how often each occurs, and instructions in all.
Exit status 1 if a kernel does not compile, spills, or takes more shared memory than the bar.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mkv_kernels.bases import LayerBases
from mkv_kernels.fused.table import LayerTable
from mkv_kernels.layout import GroupWidths, PageLayout

SHARED_MEMORY_BAR = 99 * 1024
WARP_SIZE = {"cuda": 32, "hip": 64}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A layer of some model at some budget: `widths` of its groups, and how many tokens and requests a step has."""

    widths: tuple[GroupWidths, ...]
    group_heads: int
    query_heads: int
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fold_up: bool = False
    fold_down: bool = True
    queries: int = 1
    """Per request in a decode step."""


def blocks(**counts: int) -> tuple[int, ...]:
    """Block widths from how many coordinates have 16, 8, 4 and 2 bits: b16, b8, b4, b2, and none: b0."""
    return tuple(w for w in (16, 8, 4, 2, 0) for _ in range(counts.get(f"b{w}", 0) // 16))


CASES = {
    # Llama-3.1-8B, budget 0.5 and 0.25 by ranks.
    "ranks-j1": Case(
        ((blocks(b16=80, b0=48), blocks(b16=64, b0=64)), (blocks(b16=16, b0=112), blocks(b16=112, b0=16))), 1, 4,
        fold_up=True,
    ),
    "ranks-j4": Case(
        ((blocks(b16=256, b0=256), blocks(b16=192, b0=320)), (blocks(b16=128, b0=384), blocks(b16=256, b0=256))), 4, 4
    ),
    # Llama-3.1-8B, budget 0.156 by tiers.
    "tiers-j1": Case(
        (
            (blocks(b8=16, b4=64, b2=32, b0=16), blocks(b4=64, b2=64)),
            (blocks(b4=96, b2=32), blocks(b8=16, b4=48, b2=32, b0=32)),
        ),
        1, 4, fold_up=True,
    ),
    "tiers-j4": Case(
        (
            (blocks(b16=16, b8=48, b4=224, b2=128, b0=96), blocks(b8=32, b4=192, b2=192, b0=96)),
            (blocks(b8=64, b4=256, b2=64, b0=128), blocks(b4=256, b2=128, b0=128)),
        ),
        4, 4,
    ),
    "tiers-j1-speculative": Case(
        ((blocks(b8=16, b4=64, b2=32, b0=16), blocks(b4=64, b2=64)),), 1, 4, fold_up=True, queries=8
    ),
    "tiers-j4-speculative": Case(
        ((blocks(b16=16, b8=48, b4=224, b2=128, b0=96), blocks(b8=32, b4=192, b2=192, b0=96)),), 4, 4, queries=4
    ),
    # Rows of a few bytes, beside little and beside much else.
    "narrow-tiers-j1": Case(((blocks(b16=16, b8=16, b4=16, b2=16, b0=64), blocks(b8=16, b4=16, b2=16, b0=80)),), 1, 4),
    "narrow-tiers-j4": Case(((blocks(b16=464, b8=16, b4=16, b2=16), blocks(b16=464, b8=16, b4=16, b2=16)),), 4, 4),
    "narrow-tiers-j8": Case(((blocks(b16=976, b8=16, b4=16, b2=16), blocks(b16=976, b8=16, b4=16, b2=16)),), 8, 4),
    # The most that a layer may ask for.
    "full-rank-j1": Case(((blocks(b16=128), blocks(b16=128)),), 1, 4),
    "full-rank-j4": Case(((blocks(b16=512), blocks(b16=512)),), 4, 4),
    "full-rank-j8": Case(((blocks(b16=1024), blocks(b16=1024)),), 8, 4, fold_down=False),
    "tiers-j8": Case(
        ((blocks(b16=16, b8=48, b4=320, b2=320, b0=320), blocks(b8=32, b4=320, b2=320, b0=352)),), 8, 4
    ),
}  # fmt: skip


class CompileOnly:
    """Stands in for Triton's driver: there is a device of this architecture, and nothing is ever run on it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_through(launch: Any, seen: list[Any]) -> None:
    """Runs a launcher with every kernel compiled, and noted in `seen`, in place of launched."""
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__.strip("_"), kernel, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_instead
    try:
        launch()
    finally:
        JITFunction.run = run


def launches(case: Case, kind: str) -> Any:
    """A function that calls the launcher of that kind with tensors of the case's shapes."""
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
    requests, queries = 2, {"decode": case.queries, "prefill": 100, "store": 100}[kind]
    tokens = requests * queries
    query = torch.zeros(tokens, G, J, M, table.rank_k, dtype=case.dtype)
    output = torch.zeros(tokens, G * J * M, d, dtype=case.dtype)
    integers = {"dtype": torch.int32}
    step = (
        torch.zeros(requests, 64, **integers),  # type: ignore[call-overload]
        torch.full((requests,), 128, **integers),  # type: ignore[call-overload]
        torch.arange(0, tokens + 1, queries, **integers),  # type: ignore[call-overload]
    )
    if kind == "decode":
        from mkv_kernels.fused.decode import DecodeWorkspace, decode

        workspace = DecodeWorkspace.make(table, tokens, G * J * M, 4)
        return lambda: decode(query, cache, table, *step, 0.1, output, workspace, max_queries=queries, num_splits=4)
    if kind == "store":
        from mkv_kernels.fused.store import StoreWorkspace, project_and_store

        q, k, v = (torch.zeros(tokens, G * J * heads, d, dtype=case.dtype) for heads in (M, 1, 1))
        slots, scratch = torch.zeros(tokens, dtype=torch.int64), StoreWorkspace.make(table, tokens)

        def store_few_and_many() -> None:
            for part in (slice(2), slice(None)):
                project_and_store(q[part], k[part], v[part], cache, table, slots[part], query[part], scratch)

        return store_few_and_many
    from mkv_kernels.fused.prefill import prefill

    return lambda: prefill(query, cache, table, *step, 0.1, output)


def describe(kernel: Any, folder: Path | None, name: str) -> dict[str, Any]:
    """What the compiled code says of itself; empty for what the architecture's tools do not tell."""
    found: dict[str, Any] = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    binary = kernel.asm.get("cubin")
    if binary is None:
        return found | describe_amd(kernel.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = (
            subprocess.run(
                [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
            + ""
        )
        code = subprocess.run(
            [BIN / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found["registers"] = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    found["spills"] = int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code)
    opcodes = Counter(line.partition(".")[0] for line in lines)
    found["mma"] = sum(count for opcode, count in opcodes.items() if opcode in ("HMMA", "HGMMA", "UTCHMMA"))
    loads = Counter()  # type: ignore[var-annotated]
    for line in lines:
        opcode, *modifiers = line.split(".")
        if opcode in ("LDG", "LDGSTS"):
            widths = [m for m in modifiers if re.fullmatch(r"U?S?(8|16|32|64|128)", m) and m not in ("32",)]
            loads[f"{opcode}.{widths[-1] if widths else 32}"] += 1
    found["loads"] = " ".join(f"{key}x{count}" for key, count in sorted(loads.items()))
    found["code"] = len(lines)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.sass").write_text(code)
        (folder / f"{name}.ptx").write_text(kernel.asm["ptx"])
        (folder / f"{name}.ttgir").write_text(kernel.asm["ttgir"])
    return found


def describe_amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))  # type: ignore[union-attr]

    lines = [line.split()[0] for line in code.splitlines() if re.match(r"\s+[a-z]+_\w+", line)]
    loads = Counter(line for line in lines if re.match(r"(global|buffer)_load", line))
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "mma": sum(line.startswith("v_mfma") for line in lines),
        "loads": " ".join(f"{key}x{count}" for key, count in sorted(loads.items())),
        "code": len(lines),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="a layer's shape; all of them by default")
    parser.add_argument("--kernel", action="append", choices=("store", "decode", "prefill"), help="all by default")
    parser.add_argument("--arch", default="90", help="80, 90, 100, or gfx942 (default %(default)s)")
    parser.add_argument("--asm", type=Path, help="a folder for SASS, PTX and Triton's intermediate code")
    args = parser.parse_args()
    backend = "cuda" if args.arch.isdigit() else "hip"
    driver.set_active(
        CompileOnly(GPUTarget(backend, int(args.arch) if backend == "cuda" else args.arch, WARP_SIZE[backend]))
    )
    failed = False
    print(f"triton {triton.__version__}, {args.arch}")
    for case in args.case or CASES:
        for kind in args.kernel or ("store", "decode", "prefill"):
            seen: list[Any] = []
            compile_through(launches(CASES[case], kind), seen)
            for name, kernel, seconds in seen:
                found = describe(kernel, args.asm, f"{case}-{kind}-{name}")
                bad = found.get("spills", 0) > 0 or found["shared"] > SHARED_MEMORY_BAR
                failed |= bad
                print(
                    f"{case:10} {name:16} "
                    + " ".join(f"{key} {value}" for key, value in found.items())
                    + f" ({seconds:.0f} s)"
                    + (" BEYOND THE BAR" if bad else ""),
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
