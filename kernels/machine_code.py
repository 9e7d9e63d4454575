# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel's machine code says: registers, spills, instructions, and the widths of loads."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

from mkv_kernels.fused.exact import load_tiles
from mkv_kernels.fused.integer import load_words
from mkv_kernels.fused.tile import load_tile
from mkv_kernels.fused.warp import load_side

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA_MMA = ("HMMA", "IMMA", "HGMMA", "UTCHMMA")
AMD_LOADS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
AMD_LOAD = re.compile(rf"(?:global|buffer)_load_({'|'.join(AMD_LOADS)})")
NVIDIA_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]+)(?:.*`\((?P<to>\.L\w+)\))?"
)
AMD_LINE = re.compile(r"\s+(?P<opcode>[a-z]+_\w+)(?:\s+(?P<to>\.L\w+))?")
MOST_WAITING = 40
"""Instructions of a loop that waits: for a barrier of copies or products, or for other programs."""
SPILL_MOVES = ("LDL", "STL", "scratch_load", "scratch_store")


@dataclass
class Found:
    """What a kernel's compiled code says of itself.

    loop, moves: see `loops`.
    waits: for Hopper's products, beyond those that Triton asked for.
    loads: instructions that load keys and values, by bytes per thread.
    """

    registers: int
    spills: int
    mma: int
    code: int
    loop: int
    moves: int
    waits: int
    loads: dict[int, int]

    @property
    def loads_text(self) -> str:
        return " ".join(f"{width}x{count}" for width, count in sorted(self.loads.items(), reverse=True))


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
    # Where the assembler has too few registers, or products and other instructions write to the same ones, it has
    # every product waited for.
    waits = -kernel.asm["ptx"].count("wgmma.wait_group")
    for instruction, in_load_tile in nvidia_instructions(code):
        opcode, *modifiers = instruction.split(".")
        opcodes[opcode] += 1
        waits += instruction.startswith("WARPGROUP.DEPBAR")
        if in_load_tile and opcode in ("LDG", "LDGSTS"):
            bits = [int(m[1]) for modifier in modifiers if (m := re.fullmatch(r"[US]?(8|16|32|64|128)", modifier))]
            loads[bits[-1] // 8 if bits else 4] += 1
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    mma = sum(opcodes[name] for name in NVIDIA_MMA)
    return Found(registers, stack, mma, opcodes.total(), *loops(code, NVIDIA_LINE), waits, dict(loads)), code


def loops(code: str, line_of_code: re.Pattern[str]) -> tuple[int, int]:
    """Of loops with none inside: instructions of the longest, and how many move what registers do not hold, the most
    of all.

    A loop is from a label to the last branch back to it. One of a few instructions waits for something, and is none.
    Code that is behind the kernel's end and branches back into it looks like one that has loops inside.

    Args:
        line_of_code: of an instruction: its `opcode`, and `to`, the label that it branches to, if any.
    """
    begins: dict[str, int] = {}
    ends: dict[int, int] = {}
    opcodes: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            begins[label[1]] = len(opcodes)
        elif instruction := line_of_code.match(line):
            opcodes.append(instruction["opcode"])
            if instruction["to"] in begins:
                ends[begins[instruction["to"]]] = len(opcodes)
    spans = [(begin, end) for begin, end in ends.items() if end - begin > MOST_WAITING]
    innermost = [opcodes[begin:end] for begin, end in spans if not any(begin < other < end for other, _ in spans)]
    moves = (sum(opcode.startswith(SPILL_MOVES) for opcode in loop) for loop in innermost)
    return max(map(len, innermost), default=0), max(moves, default=0)


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
    return Found(registers, scratch, mma, count, *loops(code, AMD_LINE), 0, dict(loads)), code
