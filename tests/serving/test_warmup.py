# SPDX-License-Identifier: Apache-2.0
"""What an engine compiles while it starts is all that its steps launch later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

# In a process of its own, where Triton compiles. Nothing is compiled, though, and nothing runs: its hook is told of
# every kernel that is to be compiled or launched, and prevents it. Tokens are arbitrary; steps are real.
RECORD = """
import json, os, random, sys

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mkv_kernels.fused import decode, expand, prefill, store


class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


seen = set()


def hook(key, fn, **others):
    seen.add((fn.name, key))
    return True


driver.set_active(NoGPU())
triton.knobs.runtime.jit_cache_hook = hook
# The engine's CPU platform asks for it; the kernels are imported already.
os.environ["TRITON_INTERPRET"] = "1"

from vllm import SamplingParams
from vllm_mkv.serving import compat
from vllm_mkv.serving.score import running_engine

runs, batches = json.loads(sys.argv[1])
compat.warm_up_threads = lambda vllm_config: 1
parameters = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def take():
    global seen
    variants, seen = [[name.rsplit(".", 1)[-1], key] for name, key in seen], set()
    return variants


results = []
for settings in runs:
    with running_engine(settings) as engine:
        started = take()
        # The GPU's worker does it at every start, the CPU's only where a model is compiled.
        engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.profile_run()
        profiled = take()
        for lengths in batches:
            prompts = [{"prompt_token_ids": [7 + i % 5 for i in range(length)]} for length in lengths]
            engine.generate(prompts, parameters, use_tqdm=False)
        results.append((started, profiled, take()))
print("RESULT", json.dumps(results))
"""
LAUNCHED = [
    "_attend_codes_kernel",
    "_combine_kernel",
    "_expand_kernel",
    "_prefill_kernel",
    "_store_kernel",
]
BATCHES = (
    [1],
    [5, 17, 16],
    # More tokens per step than the small tiles of the store and of the kernel that combines splits are for.
    [2] * 150,
    # Prompts in chunks, beside requests that decode; contexts long enough to be split.
    [1900, 3, 700, 64, 65],
    [2700],
    [1],
)


def record(runs, batches=BATCHES):
    """Kernels by name and what they are compiled for, by run: those met before profiling, by it, and by all batches."""
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RECORD, json.dumps([runs, batches])]
    ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    results = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, ran.stdout[-4000:] + ran.stderr[-4000:]
    return [[{tuple(v) for v in phase} for phase in run] for run in json.loads(results[0].removeprefix("RESULT "))]


def names(variants):
    return sorted({name for name, _ in variants})


@pytest.mark.engine
def test_no_step_meets_a_new_kernel(tiny_model, make_adapter, uneven_path, serving):
    from vllm_mkv.adapter import Adapter

    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192)
    # Every layer has ranks and tiers of its own.
    adapter = make_adapter(model, path=uneven_path(Adapter.load(make_adapter(model)).shape, (16, 4, 0)))
    # Of one request, more splits than are combined at once, of the most fewer.
    options = {"max_num_seqs": 160, "max_num_batched_tokens": 512, "max_model_len": 8192, "dtype": "bfloat16"}
    settings = serving.engine_settings(model, adapter, 0.4, **options)
    settings["additional_config"]["mkv"]["kernels"] = "triton"
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    # With drafts, more query rows than products of integers are for.
    launched = LAUNCHED, LAUNCHED, LAUNCHED, sorted([*LAUNCHED, "_attend_kernel"])
    # The second has fewer rows at most than large tiles of the product with D are for; the third more splits than are
    # combined at once, but for short contexts.
    fewer = [settings | {"max_num_seqs": most} for most in (100, 1)]
    runs = record([settings, *fewer, settings | {"speculative_config": drafts}])
    for (started, profiled, served), expected in zip(runs, launched, strict=True):
        assert not started
        assert names(profiled) == expected
        assert served <= profiled, names(served - profiled)
        # And nothing is compiled in vain.
        assert profiled <= served, names(profiled - served)


def test_eager_and_interpreted_engines_start_at_once(monkeypatch):
    from vllm_mkv.serving import compat

    def config(enabled: bool) -> SimpleNamespace:
        return SimpleNamespace(
            kernel_config=SimpleNamespace(enable_jit_warmup=enabled),
            model_config=SimpleNamespace(enforce_eager=not enabled),
        )

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compat.warm_up_threads(config(True)) >= 1
    assert compat.warm_up_threads(config(False)) == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compat.warm_up_threads(config(True)) == 0
