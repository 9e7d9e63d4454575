# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels ahead of time, without a GPU, and holds what the compiled code needs and uses against a bar.

    python kernels/compile_check.py                                  # every case, for every architecture
    python kernels/compile_check.py --quick --arch 90
    python kernels/compile_check.py --changed                        # what compile_table.csv does not have
    python kernels/compile_check.py --case tiers-j4 --launch decode --arch 80 --asm FOLDER

Kernels are compiled through the launchers themselves, with the arguments that they pass: what is compiled here is what
is launched there. One line per kernel:

    regs     registers per thread
    spills   bytes per thread that registers did not suffice for
    moves    instructions of a loop that store or load such bytes, the most of all loops
    waits    for Hopper's products, more than Triton asks for: where the assembler has it wait for each, few overlap
    shared   bytes of shared memory per program
    mma      tensor-core instructions
    code     instructions in all
    loop     instructions of the longest loop with none inside: of attention, what a tile of tokens takes
    loads    global loads of keys and values, as bytes per thread x how many instructions load as many

The bar: no spills, no such waits, shared memory that every GPU of the architecture has, tensor cores in decode and
prefill, and keys and values loaded 16 bytes at a time. `KNOWN` in compile_cases.py lists what is beyond it and why;
anything else that is, or does not compile, makes the exit status 1. compile_table.csv has what every kernel came to
when it was last compiled; a row that --changed takes from it in place of compiling is marked "recorded". Triton caches
what it compiled: for timings, set TRITON_ALWAYS_COMPILE=1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path

# Triton decides when a kernel is decorated whether to compile or to interpret it.
os.environ.pop("TRITON_INTERPRET", None)

import compile_table
import triton
from compile_cases import CASES, KNOWN, LAUNCHES, QUICK, launcher
from compile_only import ARCHITECTURES, Compiled, CompileOnly, backend_of, compiled_by
from compile_table import Recorded
from machine_code import Found, read_amd, read_nvidia
from triton.runtime.driver import driver

SHARED_BAR = {"cuda": 99 * 1024, "hip": 64 * 1024}
"""Bytes that a program can have on every GPU since 2020, and on AMD's of the 9th generation."""
LOAD_BAR = 16
ATTENTION = ("attend", "attend_codes", "prefill")
"""Kernels that load keys and values and multiply them."""


@dataclass
class Row(Found):
    case: str
    launch: str
    kernel: str
    arch: str
    warps: int
    shared: int
    seconds: float
    key: str
    recorded: bool
    """Whether the numbers are those of `compile_table.csv`, and nothing was compiled."""
    beyond: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """Reasons of what else is beyond the bar."""

    @property
    def cells(self) -> tuple[str, ...]:
        verdict = "; ".join(
            f"{word} {', '.join(which)}" for word, which in (("BEYOND", self.beyond), ("known", self.known)) if which
        )
        numbers = (
            self.warps, self.registers, self.spills, self.moves, self.waits, self.shared, self.mma, self.code,
            self.loop,
        )  # fmt: skip
        origin = ", recorded" if self.recorded else ""
        return (
            self.arch,
            self.case,
            self.launch,
            self.kernel,
            *map(str, numbers),
            self.loads_text,
            (verdict or "ok") + origin,
        )


HEAD = (
    "arch", "case", "launch", "kernel", "warps", "regs", "spills", "moves", "waits", "shared", "mma", "code", "loop",
    "loads", "verdict",
)  # fmt: skip
WIDTHS = (6, 18, 11, 7, 5, 4, 6, 5, 5, 6, 4, 5, 4, 18, 0)


def check(name: str, arch: str, launches: tuple[str, ...], asm: Path | None, table: dict[str, Recorded]) -> list[Row]:
    """Compiles a case's kernels for an architecture, but for those that the table has."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    # Compilers' objects have no cycles; looking for some in all of torch takes 5 % of the time.
    gc.disable()
    driver.set_active(CompileOnly(arch))
    rows = []
    for launch in CASES[name].launches:
        if launch not in launches:
            continue
        for kernel in compiled_by(launcher(CASES[name], launch), arch, table.__contains__):
            recorded = table.get(kernel.key) or read(kernel, arch, f"{arch}-{name}-{launch.replace(' ', '-')}", asm)
            rows.append(
                Row(
                    **vars(recorded.found), case=name, launch=launch, kernel=kernel.name, arch=arch,
                    warps=recorded.warps, shared=recorded.shared, seconds=round(kernel.seconds, 1), key=kernel.key,
                    recorded=kernel.key in table,
                )
            )  # fmt: skip
    return rows


def read(kernel: Compiled, arch: str, stem: str, asm: Path | None) -> Recorded:
    """What a kernel came to; writes its code to files of the folder `asm`, if there is to be one."""
    found, code = (read_nvidia if backend_of(arch) == "cuda" else read_amd)(kernel.code)
    if asm is not None:
        asm.mkdir(parents=True, exist_ok=True)
        (asm / f"{stem}-{kernel.name}.asm").write_text(code)
        (asm / f"{stem}-{kernel.name}.ttgir").write_text(kernel.code.asm["ttgir"])
    return Recorded(found, kernel.code.metadata.num_warps, kernel.code.metadata.shared)


def judge(row: Row, shared_bar: int | None) -> None:
    """Fills in what of a row is beyond the bar, and which of that is known."""
    shared = SHARED_BAR[backend_of(row.arch)] if shared_bar is None else shared_bar
    beyond = {}
    if row.spills > 0:
        beyond["spills"] = row.spills
        if row.moves > 0:
            beyond["moves"] = row.moves
    if row.waits > 0:
        beyond["waits"] = row.waits
    if row.shared > shared:
        beyond["shared"] = row.shared
    if row.kernel in ATTENTION:
        narrowest = min(row.loads, default=0)
        if narrowest < LOAD_BAR:
            beyond["loads"] = narrowest
        if row.mma == 0:
            beyond["mma"] = 0
    for measure, number in beyond.items():
        covering = (known for known in KNOWN if known.covers(row.case, row.kernel, row.arch))
        known = next((known for known in covering if known.allows(measure, number)), None)
        if known is None:
            row.beyond.append(f"{measure} {number}")
        else:
            row.known[f"{measure} {number}"] = known.reason


def line_of(cells: tuple[str, ...]) -> str:
    return " ".join(
        cell.rjust(width) if 4 <= place <= 12 else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ).rstrip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="all of them by default")
    parser.add_argument("--case", action="append", choices=CASES, help="a layer's shape; all of them by default")
    parser.add_argument("--launch", action="append", choices=LAUNCHES, help="all by default")
    parser.add_argument("--quick", action="store_true", help=f"only the cases {', '.join(QUICK)}")
    parser.add_argument(
        "--changed", action="store_true", help=f"compile only what {compile_table.PATH.name} does not have"
    )
    parser.add_argument("--record", action="store_true", help=f"write {compile_table.PATH.name}; takes the whole gate")
    parser.add_argument("--processes", type=int, default=2, help="that compile at once (default %(default)s)")
    parser.add_argument("--shared-bar", type=int, metavar="BYTES", help="in place of what the architecture has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON")
    parser.add_argument("--asm", type=Path, metavar="FOLDER", help="machine code and Triton's intermediate code")
    args = parser.parse_args()
    if args.record and (args.arch or args.case or args.launch or args.quick):
        parser.error("--record writes the table of all kernels: leave --arch, --case, --launch and --quick out")
    if args.changed and args.asm:
        parser.error("--changed compiles nothing that the table has, so there is no code for --asm: leave one out")
    return args


def main() -> int:
    args = arguments()
    start = time.perf_counter()
    table = compile_table.read(triton.__version__)
    cases = args.case or (QUICK if args.quick else tuple(CASES))
    launches = tuple(args.launch or LAUNCHES)
    rows: list[Row] = []
    failures: list[str] = []
    print(f"triton {triton.__version__}", flush=True)
    if args.changed and not table:
        print(f"{compile_table.PATH.name} has nothing of this version: all is compiled", flush=True)
    print(line_of(HEAD), flush=True)
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        started = [
            (case, arch, pool.submit(check, case, arch, launches, args.asm, table if args.changed else {}))
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
    if args.record and not failures:
        compile_table.write(triton.__version__, rows)
    elif table and (changed := sum(table.get(row.key) != as_recorded(row) for row in rows)):
        print(f"{changed} kernels are not as {compile_table.PATH.name} has them: write it anew by --record")
    return conclude(rows, failures, time.perf_counter() - start)


def as_recorded(row: Row) -> Recorded:
    return Recorded(Found(**{each.name: getattr(row, each.name) for each in fields(Found)}), row.warps, row.shared)


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
    recorded = sum(row.recorded for row in rows)
    print(
        f"{len(rows)} kernels in {seconds:.0f} s: {len(rows) - known - len(beyond)} within the bar, {known} known, "
        f"{len(beyond)} beyond, {len(failures)} cases that do not compile; {recorded} as recorded"
    )
    return int(bool(beyond or failures))


if __name__ == "__main__":
    sys.exit(main())
