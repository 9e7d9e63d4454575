# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels ahead of time, without a GPU, and holds what the compiled code needs and uses against a bar.

    python kernels/compile_check.py                                  # every case, for every architecture
    python kernels/compile_check.py --quick --arch 90
    python kernels/compile_check.py --case tiers-j4 --launch decode --arch 80 --asm FOLDER

Kernels are compiled through the launchers themselves, with the arguments that they pass: what is compiled here is what
is launched there. One line per kernel:

    regs     registers per thread
    spills   bytes per thread that registers did not suffice for
    moves    instructions of the longest loop that store or load such bytes
    shared   bytes of shared memory per program
    mma      tensor-core instructions
    code     instructions in all
    loop     instructions of the longest loop: of attention, what a tile of tokens takes
    loads    global loads of keys and values, as bytes per thread x how many instructions load as many

The bar: no spills, shared memory that every GPU of the architecture has, tensor cores in decode and prefill, and keys
and values loaded 16 bytes at a time. `KNOWN` in compile_cases.py lists what is beyond it and why; anything else that
is, or does not compile, makes the exit status 1. Triton caches what it compiled: for timings, set
TRITON_ALWAYS_COMPILE=1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Triton decides when a kernel is decorated whether to compile or to interpret it.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from compile_cases import CASES, KNOWN, LAUNCHES, QUICK, Known, launcher
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mkv_kernels.fused.exact import load_tiles
from mkv_kernels.fused.integer import load_words
from mkv_kernels.fused.tile import load_tile
from mkv_kernels.fused.warp import load_side

ARCHITECTURES = ("80", "90", "100", "gfx942")
SHARED_BAR = {"cuda": 99 * 1024, "hip": 64 * 1024}
"""Bytes that a program can have on every GPU since 2020, and on AMD's of the 9th generation."""
LOAD_BAR = 16
ATTENTION = ("attend", "attend_codes", "prefill")
"""Kernels that load keys and values and multiply them."""
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA_MMA = ("HMMA", "IMMA", "HGMMA", "UTCHMMA")
AMD_LOADS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
AMD_LOAD = re.compile(rf"(?:global|buffer)_load_({'|'.join(AMD_LOADS)})")
NVIDIA_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]+)(?:.*`\((?P<to>\.L\w+)\))?"
)
AMD_LINE = re.compile(r"\s+(?P<opcode>[a-z]+_\w+)(?:\s+(?P<to>\.L\w+))?")
SPILL_MOVES = ("LDL", "STL", "scratch_load", "scratch_store")
WARP_SIZE = {"cuda": 32, "hip": 64}


@dataclass
class Found:
    """What a kernel's compiled code says of itself; `loads` counts the instructions by bytes per thread."""

    registers: int
    spills: int
    mma: int
    code: int
    loop: int
    moves: int
    loads: Counter[int]


@dataclass
class Row:
    case: str
    launch: str
    kernel: str
    arch: str
    warps: int
    shared: int
    registers: int
    spills: int
    mma: int
    code: int
    loop: int
    moves: int
    loads: dict[int, int]
    seconds: float
    beyond: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """Reasons of what else is beyond the bar."""

    @property
    def cells(self) -> tuple[str, ...]:
        loads = " ".join(f"{width}x{count}" for width, count in sorted(self.loads.items(), reverse=True))
        verdict = "; ".join(
            f"{word} {', '.join(which)}" for word, which in (("BEYOND", self.beyond), ("known", self.known)) if which
        )
        numbers = (self.warps, self.registers, self.spills, self.moves, self.shared, self.mma, self.code, self.loop)
        return (self.arch, self.case, self.launch, self.kernel, *map(str, numbers), loads, verdict or "ok")


HEAD = (
    "arch", "case", "launch", "kernel", "warps", "regs", "spills", "moves", "shared", "mma", "code", "loop", "loads",
    "verdict",
)  # fmt: skip
WIDTHS = (6, 18, 11, 7, 5, 4, 6, 5, 6, 4, 5, 4, 18, 0)


class CompileOnly:
    """Stands in for Triton's driver: there is a device of this architecture, and nothing is ever run on it."""

    def __init__(self, arch: str) -> None:
        backend = backend_of(arch)
        self.target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, WARP_SIZE[backend])
        # Triton keeps what it compiled by the device's number alone.
        self.device = ARCHITECTURES.index(arch)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def backend_of(arch: str) -> str:
    return "cuda" if arch.isdigit() else "hip"


def compiled_by(launch: Any) -> list[tuple[str, Any, float]]:
    """Runs a launcher with every kernel compiled in place of launched: their names, code, and seconds."""
    run, seen = JITFunction.run, []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__.strip("_").removesuffix("_kernel"), kernel, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_instead
    try:
        launch()
    finally:
        JITFunction.run = run
    return seen


@cache
def page_loaders() -> list[tuple[str, int, int]]:
    """Files, first lines and lines behind the last of the functions that load keys and values."""
    loaders = (("tile.py", load_tile), ("exact.py", load_tiles), ("warp.py", load_side), ("integer.py", load_words))
    sources = ((name, *inspect.getsourcelines(function.fn)) for name, function in loaders)
    return [(name, first, first + len(lines)) for name, lines, first in sources]


def loads_pages(file: str, line: int) -> bool:
    """Whether a line of the source is one that loads keys and values."""
    return any(file.endswith(name) and first <= line < end for name, first, end in page_loaders())


def read_nvidia(kernel: Any) -> tuple[Found, str]:
    """What the kernel's cubin says, and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [NVIDIA_TOOLS / tool, option, file.name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                check=True,
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-g"))
        )  # fmt: skip
    opcodes: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    for instruction, in_load_tile in nvidia_instructions(code):
        opcode, *modifiers = instruction.split(".")
        opcodes[opcode] += 1
        if in_load_tile and opcode in ("LDG", "LDGSTS"):
            bits = [int(m[1]) for modifier in modifiers if (m := re.fullmatch(r"[US]?(8|16|32|64|128)", modifier))]
            loads[bits[-1] // 8 if bits else 4] += 1
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    mma = sum(opcodes[name] for name in NVIDIA_MMA)
    return Found(registers, stack, mma, opcodes.total(), *longest_loop(code, NVIDIA_LINE), loads), code


def longest_loop(code: str, line_of_code: re.Pattern[str]) -> tuple[int, int]:
    """Instructions from a label to the last branch back to it, the most of all labels; and how many of them move what
    registers do not hold.

    Args:
        line_of_code: of an instruction: its `opcode`, and `to`, the label that it branches to, if any.
    """
    begins: dict[str, int] = {}
    opcodes: list[str] = []
    longest: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            begins[label[1]] = len(opcodes)
        elif instruction := line_of_code.match(line):
            opcodes.append(instruction["opcode"])
            if instruction["to"] in begins:
                longest = max(longest, opcodes[begins[instruction["to"]] :], key=len)
    return len(longest), sum(opcode.startswith(SPILL_MOVES) for opcode in longest)


def nvidia_instructions(code: str) -> Iterator[tuple[str, bool]]:
    """Opcodes with their modifiers, and whether they load keys and values."""
    in_load_tile, after_instruction = False, True
    for line in code.splitlines():
        if source := re.search(r'//## File "([^"]+)", line (\d+)', line):
            # Callers follow the line that was inlined into them.
            if after_instruction:
                in_load_tile = loads_pages(source[1], int(source[2]))
            after_instruction = False
        elif instruction := NVIDIA_LINE.match(line):
            after_instruction = True
            yield instruction["opcode"], in_load_tile


def read_amd(kernel: Any) -> tuple[Found, str]:
    code = kernel.asm["amdgcn"]
    files: dict[str, str] = {}
    in_load_tile = False
    mma, count = 0, 0
    loads: Counter[int] = Counter()
    for line in code.splitlines():
        if named := re.match(r'\s+\.file\s+(\d+)\s+.*"([^"]+)"', line):
            files[named[1]] = named[2]
        elif place := re.match(r"\s+\.loc\s+(\d+)\s+(\d+)", line):
            in_load_tile = loads_pages(files.get(place[1], ""), int(place[2]))
        elif instruction := AMD_LINE.match(line):
            count += 1
            mma += instruction["opcode"].startswith("v_mfma")
            if in_load_tile and (load := AMD_LOAD.match(instruction["opcode"])):
                loads[AMD_LOADS[load[1]]] += 1
    registers, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Found(registers, scratch, mma, count, *longest_loop(code, AMD_LINE), loads), code


def check(name: str, arch: str, launches: tuple[str, ...], asm: Path | None) -> list[Row]:
    """Compiles a case's kernels for an architecture."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    driver.set_active(CompileOnly(arch))
    rows = []
    for launch in CASES[name].launches:
        if launch not in launches:
            continue
        for kernel, compiled, seconds in compiled_by(launcher(CASES[name], launch)):
            found, code = (read_nvidia if backend_of(arch) == "cuda" else read_amd)(compiled)
            metadata = compiled.metadata
            rows.append(
                Row(
                    name, launch, kernel, arch, metadata.num_warps, metadata.shared, found.registers, found.spills,
                    found.mma, found.code, found.loop, found.moves, dict(found.loads), round(seconds, 1),
                )
            )  # fmt: skip
            if asm is not None:
                asm.mkdir(parents=True, exist_ok=True)
                stem = f"{arch}-{name}-{launch.replace(' ', '-')}-{kernel}"
                (asm / f"{stem}.asm").write_text(code)
                (asm / f"{stem}.ttgir").write_text(compiled.asm["ttgir"])
    return rows


def judge(row: Row, shared_bar: int | None) -> None:
    """Fills in what of a row is beyond the bar, and which of that is known."""
    shared = SHARED_BAR[backend_of(row.arch)] if shared_bar is None else shared_bar
    beyond = {}
    if row.spills > 0:
        beyond["spills"] = row.spills
        if row.moves > 0:
            beyond["moves"] = row.moves
    if row.shared > shared:
        beyond["shared"] = row.shared
    if row.kernel in ATTENTION:
        narrowest = min(row.loads, default=0)
        if narrowest < LOAD_BAR:
            beyond["loads"] = narrowest
        if row.mma == 0:
            beyond["mma"] = 0
    for measure, number in beyond.items():
        known = next((k for k in KNOWN if k.measure == measure and is_known(k, row, number)), None)
        if known is None:
            row.beyond.append(f"{measure} {number}")
        else:
            row.known[f"{measure} {number}"] = known.reason


def is_known(known: Known, row: Row, number: int) -> bool:
    within = number >= known.limit if known.measure in ("loads", "mma") else number <= known.limit
    return within and known.covers(row.case, row.kernel, row.arch)


def line_of(cells: tuple[str, ...]) -> str:
    return " ".join(
        cell.rjust(width) if 4 <= place <= 11 else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ).rstrip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="all of them by default")
    parser.add_argument("--case", action="append", choices=CASES, help="a layer's shape; all of them by default")
    parser.add_argument("--launch", action="append", choices=LAUNCHES, help="all by default")
    parser.add_argument("--quick", action="store_true", help=f"only the cases {', '.join(QUICK)}")
    parser.add_argument("--processes", type=int, default=2, help="that compile at once (default %(default)s)")
    parser.add_argument("--shared-bar", type=int, metavar="BYTES", help="in place of what the architecture has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON")
    parser.add_argument("--asm", type=Path, metavar="FOLDER", help="machine code and Triton's intermediate code")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    start = time.perf_counter()
    cases = args.case or (QUICK if args.quick else tuple(CASES))
    launches = tuple(args.launch or LAUNCHES)
    rows: list[Row] = []
    failures: list[str] = []
    print(f"triton {triton.__version__}", line_of(HEAD), sep="\n", flush=True)
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        started = [
            (case, arch, pool.submit(check, case, arch, launches, args.asm))
            for case in cases
            for arch in args.arch or ARCHITECTURES
            if backend_of(arch) == "cuda" or args.case or not CASES[case].nvidia_only
        ]
        for case, arch, future in started:
            try:
                found = future.result()
            except Exception as error:  # whatever a compiler may raise
                failures.append(f"{case} for {arch}: {reason_of(error)}")
                print(f"DOES NOT COMPILE: {failures[-1]}", flush=True)
                continue
            for row in found:
                judge(row, args.shared_bar)
                print(line_of(row.cells), flush=True)
            rows += found
    if args.json:
        report = {"triton": triton.__version__, "failures": failures, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return conclude(rows, failures, time.perf_counter() - start)


def reason_of(error: BaseException) -> str:
    """With what it was caused by: Triton's own error is at a call, its cause inside what is called."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # From another process, a cause may be the text of the traceback, with all causes in it.
    return "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)


def conclude(rows: list[Row], failures: list[str], seconds: float) -> int:
    """Prints what is known, and the verdict; returns the exit status."""
    for reason, count in Counter(reason for row in rows for reason in row.known.values()).items():
        print(f"known, {count} times: {reason}")
    beyond = [row for row in rows if row.beyond]
    for row in beyond:
        print(f"beyond the bar: {row.case} for {row.arch}, {row.launch}, {row.kernel}: {', '.join(row.beyond)}")
    for failure in failures:
        print(f"does not compile: {failure}")
    known = sum(bool(row.known) and not row.beyond for row in rows)
    print(
        f"{len(rows)} kernels in {seconds:.0f} s: {len(rows) - known - len(beyond)} within the bar, {known} known, "
        f"{len(beyond)} beyond, {len(failures)} cases that do not compile"
    )
    return int(bool(beyond or failures))


if __name__ == "__main__":
    sys.exit(main())
