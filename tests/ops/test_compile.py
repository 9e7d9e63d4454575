# SPDX-License-Identifier: Apache-2.0
"""The compile gate: kernels compile for a GPU that is not there, and what is beyond the bar is told."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECK = Path(__file__).resolve().parents[2] / "kernels" / "compile_check.py"


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # In a process of its own: in this one, Triton interprets.
    pytest.importorskip("triton.backends.nvidia")
    command = [sys.executable, CHECK, "--arch", "90", "--processes", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernels as recorded for the Triton that is installed."""
    monkeypatch.syspath_prepend(CHECK.parent)
    return importlib.import_module("compile_table").read(importlib.metadata.version("triton"))


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("ranks-j1", ["attend", "combine", "prefill"]),
        ("tiers-j4-window", ["attend", "combine", "up", "prefill"]),
        ("tiers-j4-uneven", ["attend", "combine", "up", "expand", "prefill"]),
    ],
)
def test_decode_and_prefill_meet_the_bar(
    case: str, kernels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = check("--case", case, "--launch", "decode", "--launch", "prefill", "--json", tmp_path / "rows.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]
    assert [row["kernel"] for row in rows] == kernels
    # What the table says is what the compiler made; without a row in it, the table is out of date.
    recorded = table(monkeypatch)
    for row in rows if recorded else ():
        assert row["key"] in recorded, "write the table anew: make compile-check COMPILE_ARGS='--changed --record'"
        was = recorded[row["key"]]
        now = {name: row[name] for name in vars(was.found) if name != "loads"}
        assert {**now, "loads": {int(width): count for width, count in row["loads"].items()}} == vars(was.found)
        assert (row["warps"], row["shared"]) == (was.warps, was.shared)
    for row in rows:
        assert row["shared"] <= 99 * 1024 and row["waits"] == 0 and not row["beyond"]
        assert row["spills"] == 0 or any(known.startswith("spills") for known in row["known"])
        if row["kernel"] in ("attend", "prefill"):
            assert row["mma"] > 0 and set(row["loads"]) == {"16"} and 0 < row["loop"] < row["code"]


def test_loops_are_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CHECK.parent)
    machine_code = importlib.import_module("machine_code")
    waiting = [".L_x_1:", " /*0020*/ LDL R1, [R2] ;", " /*0030*/ @P0 BRA `(.L_x_1) ;"]
    inner = [".L_x_2:", *waiting, *[" /*0040*/ FADD R1, R1, R2 ;"] * 50, " /*0080*/ BRA `(.L_x_2) ;"]
    outer = [".L_x_0:", *[" /*0000*/ STL [R1], R2 ;"] * 60, *inner, " /*00a0*/ BRA `(.L_x_0) ;"]
    line = machine_code.NVIDIA_LINE
    assert machine_code.loops("\n".join(outer), line) == (53, 1)
    assert machine_code.loops("\n".join(waiting), line) == (0, 0)


def test_what_is_beyond_the_bar_fails() -> None:
    ran = check("--case", "ranks-j1", "--launch", "decode", "--shared-bar", "1024")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "beyond the bar: ranks-j1 for 90, decode, attend: shared" in ran.stdout
    assert "1 beyond" in ran.stdout


def test_what_is_recorded_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--case", "ranks-j1", "--case", "full-rank-j1", "--launch", "decode", "--changed")
    ran = check(*arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if table(monkeypatch):
        assert ran.stdout.count(", recorded") == 4 and "4 as recorded" in ran.stdout
    else:
        assert "has nothing of this version: all is compiled" in ran.stdout and "0 as recorded" in ran.stdout
    # What is taken from the table is held against the bar all the same.
    ran = check(*arguments, "--shared-bar", "1024")
    assert ran.returncode == 1 and "beyond the bar: full-rank-j1 for 90, decode, attend: shared 34816" in ran.stdout


def test_tables_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch)
    compile_table = importlib.import_module("compile_table")
    path = tmp_path / "table.csv"
    assert compile_table.read("3.8.0", path) == {}
    path.write_text("# triton 3.8.0\nkey,registers\nabc,12\n", encoding="utf-8")
    assert compile_table.read("3.9.0", path) == {}
    with pytest.raises(ValueError, match=r"write it anew by --record"):
        compile_table.read("3.8.0", path)
    places = '#loc1 = loc("a.py":1:2)\n%q_1 = tt.load %at : tensor<4xbf16> loc(#loc{})\n'
    keys = {compile_table.key_of(places.format(n), "90", None) for n in (1, 2)}
    assert len(keys) == 1 and compile_table.key_of(places.format(1), "80", None) not in keys
    assert compile_table.key_of(places.replace("4xbf16", "8xbf16"), "90", None) not in keys
