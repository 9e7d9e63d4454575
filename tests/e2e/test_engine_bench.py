# SPDX-License-Identifier: Apache-2.0
"""`vllm-mkv bench` as a user starts it."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.engine


def test_bench_times_every_cache(start_command, tiny_model, make_adapter, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, 2)
    figures, plot = tmp_path / "figures.json", tmp_path / "latency.png"
    said = start_command(
        *("vllm-mkv", "bench", str(model), "--adapter", str(adapter), "--budgets", "0.5", "--dtype", "bfloat16"),
        *("--compilation-config", '{"mode": 0}'),
        *("--contexts", "64", "256", "512", "--batch", "2", "--output-len", "4", "--repeats", "2"),
        *("--json", str(figures), "--plot", str(plot)),
    ).finish()
    assert said.splitlines()[-2:] == [f"wrote {figures}", f"wrote {plot}"]
    found = json.loads(figures.read_text("utf-8"))
    assert (found["model"], found["contexts"]) == (str(model), [64, 256, 512])
    assert len(found["adapter_digest"]) == 16
    stock, fp8, mkv = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["stock", "fp8", "mkv"]
    assert [row["bytes_per_token"] for row in found["rows"]] == [1536, 768, 768]
    for row in (stock, mkv, *([] if fp8["refused"] else [fp8])):
        assert [point["context"] for point in row["contexts"]] == [64, 256, 512]
        for point in row["contexts"]:
            assert 0 < point["least_ms"] <= point["inter_token_ms"] <= point["most_ms"]
            assert point["tokens_per_second"] == pytest.approx(2e3 / point["inter_token_ms"])
        assert row["intercept_ms"] > 0
    if fp8["refused"]:
        assert f"refuses it here: {fp8['refused']}"[:60] in " ".join(said.split())
    assert mkv["faster"] in ("always", "never", "above", "below")
