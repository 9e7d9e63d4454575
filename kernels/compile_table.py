# SPDX-License-Identifier: Apache-2.0
"""What kernels came to when they were last compiled, in `compile_table.csv`: only what changed need be compiled again.

A kernel is known by what Triton makes of its source before it knows of any GPU, without the lines of the source: what
is the same there, compiled by the same Triton for the same architecture, is the same code.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from machine_code import Found

PATH = Path(__file__).with_name("compile_table.csv")
NAMES = ("arch", "case", "launch", "kernel", "warps", "shared")
OPTIONS = (
    "num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "waves_per_eu", "matrix_instr_nonkdim", "kpack",
)  # fmt: skip
"""Of a launch, as far as the architecture has them: what decides beside a kernel's source."""
PLACE = re.compile(r"^#loc.*\n| ?loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", re.MULTILINE)


@dataclass(frozen=True)
class Recorded:
    """A row of the table."""

    found: Found
    warps: int
    shared: int


def key_of(ttir: str, arch: str, options: Any) -> str:
    """Names what is compiled, given Triton's first intermediate code and the launch's options."""
    chosen = [(name, getattr(options, name, None)) for name in OPTIONS]
    return hashlib.sha256(f"{arch} {chosen} {PLACE.sub('', ttir)}".encode()).hexdigest()[:16]


def read(triton_version: str, path: Path = PATH) -> dict[str, Recorded]:
    """The table by keys; empty where there is none, or where another version of Triton compiled.

    Raises:
        ValueError: the file is not such a table.
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        version = file.readline().strip().removeprefix("# triton ")
        lines = list(csv.DictReader(file))
    if version != triton_version:
        return {}
    try:
        return {line["key"]: _recorded(line) for line in lines}
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path.name} is no table of compiled kernels ({error!r}); write it anew by --record"
        ) from error


def _recorded(line: dict[str, str]) -> Recorded:
    numbers = {name: int(line[name]) for name in _counts()}
    loads = {int(width): int(count) for width, count in (load.split("x") for load in line["loads"].split())}
    return Recorded(Found(**numbers, loads=loads), int(line["warps"]), int(line["shared"]))


def _counts() -> list[str]:
    return [field.name for field in fields(Found) if field.name != "loads"]


def write(triton_version: str, rows: Iterable[Any], path: Path = PATH) -> None:
    """Replaces the table by `compile_check`'s rows."""
    names = (*NAMES, *_counts(), "loads", "key")
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# triton {triton_version}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([row.loads_text if name == "loads" else getattr(row, name) for name in names])
