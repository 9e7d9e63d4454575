# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmarks run with this backend as they are: throughput, latency, and a running server."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

PROMPTS, INPUT, OUTPUT = 4, 32, 8
SERVER_SECONDS = 300
# Starts in half the time; the server has an engine process of its own.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MKV_LINE = re.compile(r"MKV: adapter .* budget 0\.5 asked and 0\.\d+ reached")


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    # `vllm bench latency` draws its tokens from 10,000, whatever the vocabulary of the model.
    return tiny_model("llama", vocab_size=10_240)


@pytest.fixture(scope="module")
def options(model, make_adapter) -> list[str]:
    """Of a small engine with MKV."""
    config = {"mkv": {"adapter": str(make_adapter(model, 2)), "budget": 0.5}}
    return [
        *("--attention-backend", "mkv", "--additional-config", json.dumps(config)),
        *("--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26)),
    ]


def random_dataset() -> list[str]:
    lengths = ["--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)]
    return ["--dataset-name", "random", "--num-prompts", str(PROMPTS), *lengths]


def test_throughput_and_latency(start_command, model, options, tmp_path):
    throughput = start_command(
        *("vllm", "bench", "throughput", "--model", str(model), *options, *random_dataset()),
        *("--output-json", str(tmp_path / "throughput.json")),
        **IN_PROCESS,
    )
    latency = start_command(
        *("vllm", "bench", "latency", "--model", str(model), *options),
        *("--input-len", str(INPUT), "--output-len", str(OUTPUT), "--batch-size", "2"),
        *("--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(tmp_path / "latency.json")),
        **IN_PROCESS,
    )
    said = throughput.finish()
    assert MKV_LINE.search(said)
    (rates,) = re.findall(r"Throughput: ([\d.]+) requests/s, ([\d.]+) total tokens/s, ([\d.]+) output tokens/s", said)
    assert all(float(rate) > 0 for rate in rates)
    assert re.search(rf"Total num output tokens: +{PROMPTS * OUTPUT}\b", said)
    found = json.loads((tmp_path / "throughput.json").read_text("utf-8"))
    assert found["num_requests"] == PROMPTS
    assert found["tokens_per_second"] > 0

    said = latency.finish()
    assert MKV_LINE.search(said)
    (average,) = re.findall(r"Avg latency: ([\d.]+) seconds", said)
    found = json.loads((tmp_path / "latency.json").read_text("utf-8"))
    assert found["avg_latency"] == pytest.approx(float(average)) and float(average) > 0
    assert len(found["latencies"]) == 3


def test_serve(start_command, model, options, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    server = start_command("vllm", "serve", str(model), *address, *options)
    wait_until_up(server, f"http://127.0.0.1:{port}/health")
    said = start_command(
        *("vllm", "bench", "serve", "--model", str(model), *address, *random_dataset(), "--ignore-eos"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "serve.json"),
    ).finish()
    assert server.process.poll() is None, server.said
    assert MKV_LINE.search(server.said)
    assert re.search(rf"Successful requests: +{PROMPTS}\b", said)
    found = json.loads((tmp_path / "serve.json").read_text("utf-8"))
    assert (found["completed"], found["total_output_tokens"]) == (PROMPTS, PROMPTS * OUTPUT)
    assert found["output_throughput"] > 0


def wait_until_up(server, url: str) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.said
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server after {SERVER_SECONDS} s:\n{server.said}")
