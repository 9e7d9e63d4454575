# SPDX-License-Identifier: Apache-2.0
"""Quality through the real engine: the same figures as through transformers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vllm_mkv.adapter import Adapter

CONTEXT = 128
"""All that the model allows."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def adapter(model: Path, make_adapter: Callable[..., Path], uneven_path: Callable[..., object]) -> Path:
    shape = Adapter.load(make_adapter(model, 2)).shape
    return make_adapter(model, 2, path=uneven_path(shape, widths=(16, 8, 4, 2, 0)))


@pytest.fixture
def transformers_beside_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `engine` in conftest.py."""
    from vllm.model_executor.models.transformers import base

    monkeypatch.setattr(base, "support_torch_compile", lambda **_: lambda cls: cls)


@pytest.mark.engine
def test_both_engines_agree(model, adapter, text_file, tmp_path, monkeypatch, transformers_beside_vllm):
    from vllm_mkv.evaluation.evaluate import evaluate

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = {"text": [str(text_file)], "budgets": [1.0, 0.5, 0.25], "num_windows": 3, "context": CONTEXT}
    expected, found = (
        evaluate(str(adapter), dtype="float32", engine=engine, **settings) for engine in ("transformers", "vllm")
    )
    assert {key: found[key] for key in found if key != "rows"} == {
        key: expected[key] for key in expected if key != "rows"
    }
    assert len(found["rows"]) == 4
    for row, reference in zip(found["rows"], expected["rows"], strict=True):
        assert [row[key] for key in ("name", "budget", "bytes_per_token")] == [
            reference[key] for key in ("name", "budget", "bytes_per_token")
        ]
        # Where most coordinates have codes, one at the border of two may fall to either side: one token in 381.
        tolerance = 1e-3 if row["budget"] > 0.4 else 3e-3
        assert row["perplexity"] == pytest.approx(reference["perplexity"], rel=tolerance)
        assert row["kl"] == pytest.approx(reference["kl"], abs=tolerance)
        assert row["top1"] == pytest.approx(reference["top1"], abs=tolerance)
    assert found["rows"][3]["kl"] > found["rows"][2]["kl"] > 0.01, "so small a difference would show nothing"
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_log_probabilities_are_those_of_the_model(model, transformers_beside_vllm):
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_mkv.serving.score import log_probabilities

    network = AutoModelForCausalLM.from_pretrained(model).eval()
    for context in (2, 3, 17):
        windows = np.random.default_rng(context).integers(2, 290, (2, context))
        found = list(log_probabilities(str(model), windows, dtype="float32", cache_bytes_per_token=3072))
        with torch.inference_mode():
            expected = network(torch.from_numpy(windows)).logits[:, :-1].log_softmax(-1)
        assert all(scores.dtype == np.float32 for scores in found)
        np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=1e-3)


@pytest.mark.engine
def test_an_iterator_that_is_closed_stops_its_engine(model):
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from vllm_mkv.serving.score import log_probabilities

    original = LogprobsProcessor._update_prompt_logprobs
    windows = np.full((4, 8), 5)
    for _ in range(2):  # a second engine starts only where the first has gone
        scores = log_probabilities(str(model), windows, dtype="float32", cache_bytes_per_token=3072)
        assert np.isfinite(next(scores)).all()
        scores.close()
        assert LogprobsProcessor._update_prompt_logprobs is original


@pytest.mark.engine
def test_the_command_works_in_a_users_environment(model, adapter, text_file, tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    figures = tmp_path / "figures.json"
    command = [Path(sys.executable).with_name("vllm-mkv"), "eval", adapter, "--text", text_file, "--budgets", "0.5"]
    options = ["--engine", "vllm", "--windows", "2", "--context", "32", "--dtype", "bfloat16"]
    ran = subprocess.run([*command, *options, "--json", figures], capture_output=True, text=True, timeout=400, env=own)
    assert ran.returncode == 0, ran.stderr
    assert [row["name"] for row in json.loads(figures.read_text("utf-8"))["rows"]] == ["stock", "mkv"]
    assert ran.stdout.splitlines()[-1] == f"wrote {figures}"
    assert "WARNING" not in ran.stdout, "what vLLM says is not among the figures"


def test_a_disk_without_room_is_said_before_the_rest(tmp_path, monkeypatch):
    from vllm_mkv.evaluation import engine

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    windows = np.zeros((3, 8), np.int64)
    closed = []

    def scores(options):
        try:
            yield from np.full((3, 7, 11), -np.log(11), np.float32)
        finally:
            closed.append(options)

    starts = [engine.Served({"budget": 0.5}, 10)]
    stock, row = engine.measure_served(windows, scores, starts, stock_bytes=20)
    assert stock["perplexity"] == pytest.approx(11)
    assert (row["name"], row["budget"], row["kl"], row["top1"]) == ("mkv", 0.5, 0.0, 1.0)
    assert closed == [None, {"budget": 0.5}]

    def full(number, offset, size):
        assert size == 4 * 3 * 7 * 11
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"No space left on device.*fewer --windows.*TMPDIR"):
        engine.measure_served(windows, scores, starts, stock_bytes=20)
    assert closed[2:] == [None], "the engine is stopped"
    assert len(engine.measure_served(windows, scores, [], stock_bytes=20)) == 1
    assert not list(tmp_path.iterdir())


def test_rivals_follow_vllm():
    import torch
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    from vllm_mkv.evaluation.rivals import gaussian_levels, rotated

    for size, block in ((64, 64), (80, 16), (96, 32)):
        x = torch.randn(5, size)
        torch.testing.assert_close(rotated(x) * block**0.5, single_rht(x), atol=1e-4, rtol=1e-4)
    for bits in (3, 4):
        torch.testing.assert_close(gaussian_levels(bits), get_centroids(64, bits) * 8, atol=1e-2, rtol=0)
