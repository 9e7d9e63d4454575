# SPDX-License-Identifier: Apache-2.0
"""The engine with the Triton kernels, interpreted: what it does on a GPU but for the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
# Triton decides when its kernels are imported, so the engines run in a process of their own.
ENGINES = """
import json, sys
from vllm import SamplingParams
from vllm_mkv.serving.score import running_engine

sys.path += sys.argv[1:]
from conftest import hasten_starts
from interpreter import hasten

hasten()
for line in sys.stdin:
    runs, prompts, num_tokens = json.loads(line)
    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    results = []
    for settings in runs:
        hasten_starts()
        with running_engine(settings) as engine:
            outputs = [output.outputs[0] for output in engine.generate(prompts, parameters, use_tqdm=False)]
            logprobs = [[entry[t].logprob for t, entry in zip(o.token_ids, o.logprobs)] for o in outputs]
            results.append(([list(o.token_ids) for o in outputs], logprobs))
    print("RESULT", json.dumps(results), flush=True)
"""


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    """`generate(runs, prompts, num_tokens=6)`: tokens and log-probabilities per run and prompt."""
    said = tmp_path_factory.mktemp("engines") / "stderr.txt"
    own = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ENGINES, str(HERE), str(HERE.parent / "ops")]
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as engines,
    ):

        def run(runs, prompts, num_tokens=6):
            engines.stdin.write(json.dumps([runs, prompts, num_tokens]) + "\n")
            engines.stdin.flush()
            others = []
            for line in engines.stdout:
                if line.startswith("RESULT "):
                    return json.loads(line.removeprefix("RESULT "))
                others.append(line)
            raise AssertionError("".join(others)[-4000:] + said.read_text()[-4000:])

        yield run
        engines.stdin.close()


def with_kernels(serving, model, adapter, budget, kernels, **options):
    settings = serving.engine_settings(model, adapter, budget, max_num_seqs=4, **options)
    settings["additional_config"]["mkv"]["kernels"] = kernels
    return settings


@pytest.mark.parametrize("group_heads", [1, 2])
def test_ranks_give_what_pytorch_gives(group_heads, tiny_model, make_adapter, uneven_path, serving, generate):
    from vllm_mkv.adapter import Adapter

    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    shape = Adapter.load(make_adapter(model, group_heads=group_heads)).shape
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(shape))
    # Chunks of 64 tokens, so that steps mix requests that decode with parts of prompts.
    runs = [
        with_kernels(serving, model, adapter, 0.5, kernels, max_num_batched_tokens=64, enable_chunked_prefill=True)
        for kernels in ("torch", "triton")
    ]
    (tokens, logprobs), (triton_tokens, triton_logprobs) = generate(runs, serving.random_prompts((5, 90, 33, 1)))
    assert triton_tokens == tokens
    np.testing.assert_allclose(np.concatenate(triton_logprobs), np.concatenate(logprobs), atol=1e-3)


def test_tiers_give_what_pytorch_gives(tiny_model, make_searched, serving, generate):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    adapter = make_searched(model, 2)
    runs = [with_kernels(serving, model, adapter, 0.125, kernels) for kernels in ("torch", "triton")]
    (_, logprobs), (_, triton_logprobs) = generate(runs, serving.random_prompts((70, 20)), num_tokens=1)
    # A coordinate at the border of two levels may fall to either side.
    differ = np.abs(np.concatenate(triton_logprobs) - np.concatenate(logprobs))
    assert differ.max() < 0.3 and differ.mean() < 0.1


@pytest.mark.parametrize(("windowed", "group_heads"), [("mistral", 1), ("gemma2", 2)], indirect=["windowed"])
def test_windows_and_soft_caps_give_what_pytorch_gives(
    group_heads, windowed, tiny_model, make_adapter, uneven_path, serving, generate
):
    from vllm_mkv.adapter import Adapter

    architecture, settings = windowed
    model = tiny_model(architecture, **settings)
    shape = Adapter.load(make_adapter(model, group_heads=group_heads)).shape
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(shape))
    runs = [
        with_kernels(serving, model, adapter, 0.6, kernels, max_num_batched_tokens=64, enable_chunked_prefill=True)
        for kernels in ("torch", "triton")
    ]
    (tokens, logprobs), (triton_tokens, triton_logprobs) = generate(runs, serving.random_prompts((5, 90, 33, 1)))
    assert triton_tokens == tokens
    np.testing.assert_allclose(np.concatenate(triton_logprobs), np.concatenate(logprobs), atol=1e-3)


def test_drafts_are_decoded_together(tiny_model, make_adapter, serving, generate):
    model = tiny_model("llama")
    adapter = make_adapter(model)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    runs = [
        with_kernels(serving, model, adapter, 1.0, "torch"),
        with_kernels(serving, model, adapter, 1.0, "triton", speculative_config=drafts),
    ]
    repetitive = [{"prompt_token_ids": [7, 8, 9, 10] * 8}, {"prompt_token_ids": [20, 21] * 5}]
    (tokens, _), (drafted, _) = generate(runs, repetitive, num_tokens=12)
    assert drafted == tokens


def test_triton_without_a_gpu_is_refused(tiny_model, make_adapter, start_engine, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model("llama")
    adapter = str(make_adapter(model))
    with pytest.raises(NotImplementedError, match="Triton kernels need a GPU"):
        start_engine(
            model, additional_config={"mkv": {"adapter": adapter, "kernels": "triton"}}, attention_backend="mkv"
        )
