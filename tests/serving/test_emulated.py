# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker and model runner with the Triton kernels, where there is no GPU.

The emulator makes NVML and torch report one H200, keeps "cuda" tensors in the CPU's memory, and starts vLLM's CUDA
build. Its mode `interpret` runs every Triton kernel in Triton's interpreter; its mode `compile` compiles every launch
for sm_90 in place of running it. It is no part of this project: the variable MKV_EMULATOR names a folder with
`bin/python`, an environment of vLLM's CUDA build, and `emulate.py`; without it these tests are skipped. CONTRIBUTING.md
says what is expected of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "books-4m"
BUDGET = 0.16
PROMPTS = ("It was a dark and", "The old man opened the door, and the wind came in, and with it the rain.")
SPILLS = 32
KERNELS = {
    "decode._attend_codes_kernel",
    "combine._combine_kernel",
    "combine._up_kernel",
    "expand._expand_kernel",
    "prefill._prefill_kernel",
    "store._store_kernel",
}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("MKV_EMULATOR" not in os.environ, reason="MKV_EMULATOR names no emulator of a GPU"),
]


@pytest.fixture
def emulate(tmp_path):
    """`emulate(*options)`: its last line, the lines before, and its log, of the tree that this file is in."""
    # vLLM finds the plugin by an installed distribution's entry points; the emulator need not have it installed.
    metadata = tmp_path / "site" / "vllm_mkv-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-mkv\nVersion: 0\n", "utf-8")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nmkv = vllm_mkv.plugin:register\n", "utf-8")
    path = os.pathsep.join(map(str, (metadata.parent, ROOT, ROOT / "kernels")))

    def run(*options: str) -> tuple[dict, list[str], str]:
        folder = Path(os.environ["MKV_EMULATOR"])
        # Its compile mode takes kernels one by one.
        own = {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_TRITON_JIT_WARMUP_NUM_THREADS": "1"}
        command = [folder / "bin" / "python", folder / "emulate.py", "--model", MODEL, "--attention-backend", "MKV"]
        command += ["--additional-config", json.dumps({"mkv": {"budget": BUDGET}}), *options]
        for prompt in PROMPTS:
            command += ["--prompt", prompt]
        ran = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=850)
        *lines, last = ran.stdout.splitlines() or [""]
        assert last.startswith("{"), ran.stdout[-2000:] + ran.stderr[-4000:]
        result = json.loads(last)
        assert result["attention_backends"] == ["MKV"]
        return result, lines, ran.stderr

    return run


# Decode over codes is by integers where a model has 16 bits.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_are_those_of_the_cpu(emulate, start_engine, serving, dtype):
    result, _, _ = emulate("--mode", "interpret", "--max-tokens", "6", "--dtype", dtype)
    # The GPU's pages, so that the budget buys the same.
    engine = start_engine(MODEL, MODEL / "mkv", BUDGET, max_model_len=128, block_size=16, dtype=dtype)
    expected = serving.greedy(engine, [{"prompt_token_ids": o["prompt_token_ids"]} for o in result["outputs"]], 6)
    assert [tuple(output["token_ids"]) for output in result["outputs"]] == expected


def test_every_launch_compiles_and_none_when_serving(emulate):
    # Not --enforce-eager, with which neither vLLM nor this plugin compiles kernels at the start.
    settings = {
        "enforce_eager": False,
        "jit_monitor_verbose": True,
        "compilation_config": {"mode": 0, "cudagraph_mode": "NONE", "custom_ops": ["none"]},
    }
    # A step of more tokens than any of vLLM's own warm-up.
    options = ("--max-tokens", "20", "--prompt", "The rain " * 40, "--engine-kwargs", json.dumps(settings))
    result, lines, log = emulate("--mode", "compile", *options)
    assert result["failed"] == [], "\n".join(lines)
    ours = {m[1]: line for line in lines if (m := re.match(r"ok +mkv_kernels\.fused\.(\S+):", line))}
    assert set(ours) == KERNELS
    for line in ours.values():
        # Registers that spill lie on the stack; `compile_cases.KNOWN` says of which layers, and how many.
        assert (stack := re.search(r", (\d+) bytes of stack", line)) and int(stack[1]) <= SPILLS, line
    assert "Triton kernels compiled or loaded" in log
    # vLLM watches for what is compiled after it said that it is ready.
    assert "Kernel JIT monitor activated" in log
    late = [line for line in log.splitlines() if "JIT compilation during inference" in line]
    assert not [line for line in late if any(kernel.split(".")[1] in line for kernel in KERNELS)], late
