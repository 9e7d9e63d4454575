# SPDX-License-Identifier: Apache-2.0
"""Kernels that are compiled ahead are loaded, not launched, and found by the launches that follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

# In a process of its own, where Triton compiles; what a GPU's driver would load and launch is counted.
COMPILE = """
import json, os, sys
from collections import Counter

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from compile_cases import CASES, launcher
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mkv_kernels.fused.ahead import compile_ahead

counts = Counter()


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, code, shared, device):
        counts["loaded"] += 1
        return 1, 1, 32, 0, 1024


class Driver:
    utils = Utils()

    def launcher_cls(self, source, metadata):
        return lambda *arguments: counts.update(["launched"])

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = lambda **kernel: counts.update(["compiled"])
# Two of a kind, as layers of a model are.
launches = [launcher(CASES["ranks-j1"], name) for name in ("store few", "decode", "store few", "decode")]


def launch_all():
    for launch in launches:
        launch()


phases = []
for step in (lambda: compile_ahead(launch_all, int(sys.argv[1])), launch_all):
    counts.clear()
    phases.append([step(), dict(counts)])
print("RESULT", json.dumps(phases))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_launches_find_what_was_compiled(threads, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    own = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KERNELS), own.get("PYTHONPATH")]))
    command = [sys.executable, "-c", COMPILE, str(threads)]
    ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    ahead, launched = json.loads(ran.stdout.splitlines()[-1].removeprefix("RESULT "))
    # The store, the kernel that attends, and the one that combines its splits.
    assert ahead == [3, {"compiled": 3, "loaded": 3}]
    assert launched == [None, {"launched": 6}]


def test_nothing_is_launched(make_layer):
    from mkv_kernels.fused.ahead import compile_ahead
    from mkv_kernels.fused.decode import DecodeWorkspace, decode

    layer = make_layer(("16x2", "16x2"))
    step = layer.step([5], [1])
    output = step.query.new_full((1, layer.num_heads, layer.d), 7)
    workspace = DecodeWorkspace.make(layer.table, 1, layer.num_heads, 1)

    def launch_all():
        decode(
            step.query, layer.cache, layer.table, *step.integers, 1.0, output, workspace, max_queries=1, num_splits=1
        )

    # Interpreted kernels are not compiled.
    assert compile_ahead(launch_all, 2) == (3 if torch.cuda.is_available() else 0)
    assert bool((output == 7).all())
