# SPDX-License-Identifier: Apache-2.0
"""What the README shows, as a user runs it: real servers, a real client, processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment["COLUMNS"] = "120"
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )


def test_demo_serves_streams_and_compares():
    done = run("examples/demo.py", "--windows", "2", "--window", "128", "--max-tokens", "16", "--cache-mib", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    budget, kl = re.search(r"MKV, budget (\S+) .* (\S+) │$", done.stdout, re.MULTILINE).groups()
    (four_bit_kl,) = re.search(r"4 bits, not served .* (\S+) │$", done.stdout, re.MULTILINE).groups()
    assert float(budget) < 36 / 128, "4 bits and scales take that much"
    assert 0 < float(kl) < float(four_bit_kl)
    assert "MKV: stopped" in done.stdout


def test_demo_fails_where_mkv_cannot_be_served(tmp_path):
    done = run("examples/demo.py", "--windows", "1", "--window", "64", "--adapter", str(tmp_path))
    assert done.returncode == 1
    assert "no adapter" in done.stdout
    assert "MKV, budget" not in done.stdout


def test_offline_batch():
    done = run("examples/offline_batch.py", "--max-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
