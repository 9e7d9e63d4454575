# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmarks share: drawn layers, byte counts, checks against the twins, and how a run ends."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
import torch

# The benchmarks are a package beside mkv_kernels, and part of no distribution.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from benchmarks import attention, bench_decode, bench_prefill, bench_store, cases, launchers, peers, traffic, verify
from benchmarks.cases import GEOMETRIES, Geometry, Spec, draw_widths
from benchmarks.layer import Layer, Requests, Setting, Shape
from benchmarks.timing import Times

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Geometry("tiny", 8, 4, 32)
SPECS = [Spec("ranks", 0.5, 1), Spec("tiers", 0.25, 1), Spec("ranks", 0.5, 4), Spec("tiers", 0.156, 2)]


def make_layer(spec: Spec, folded: bool = True) -> Layer:
    return Layer(Setting(TINY, DEVICE, torch.float16, folded=folded), spec)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("spec", cases.all_specs(cases.RANKS, cases.TIERS, cases.GROUP_HEADS), ids=lambda s: s.label)
def test_drawn_layers_have_the_budget_and_are_uneven(geometry, spec):
    widths = draw_widths(geometry, spec, 2)
    assert widths == draw_widths(geometry, spec, 2)
    layer = Layer(Setting(geometry, torch.device("cpu"), torch.bfloat16), spec)
    one_block = 32 / geometry.full_bytes(2)
    budget = traffic.token_bytes(layer) / geometry.full_bytes(2)
    assert spec.budget - 2 * one_block <= budget <= spec.budget
    # In blocks of 16 tokens nothing is lost to alignment.
    assert traffic.token_bytes(layer) == layer.layout.bytes_per_token
    if spec.budget < 1:
        sizes = [sum(side) for group in widths for side in group]
        assert max(sizes) >= 1.3 * min(sizes)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)
def test_attention_checks_pass_at_tiny_shapes(spec, folded):
    layer = make_layer(spec, folded)
    for shape in (Shape(2, 50), Shape(2, 33, 20)):
        requests = Requests.make(shape, layer.setting)
        cache, query, exact = layer.filled_cache(shape.num_blocks(16)), layer.new_queries(shape.num_tokens), None
        if shape.queries == 1:
            launch = launchers.decode(layer, shape, requests, query, cache, num_processors=8)
        else:
            queries = layer.model_queries(shape.num_tokens)
            query, exact = queries.projected, queries.exact
            launch = launchers.prefill(layer, shape, requests, queries, cache)
        launch.run()
        errors = verify.check_attention(layer, requests, query, cache, launch.output, exact)
        assert errors.passed and 0 < errors.mean < errors.largest < 1, errors
        launch.output[-1, -1, 0] += 0.5 * launch.output.abs().max()
        assert not verify.check_attention(layer, requests, query, cache, launch.output, exact).passed
        launch.output[0, 0, 0] = float("nan")
        errors = verify.check_attention(layer, requests, query, cache, launch.output, exact)
        assert not errors.passed and errors.largest != errors.largest


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)
def test_store_checks_pass_at_tiny_shapes(spec, folded):
    layer = make_layer(spec, folded)
    *inputs, slots = layer.new_inputs(19)
    cache = layer.new_cache(2)
    launch = launchers.store(layer, inputs, slots, cache)
    launch.run()
    errors = verify.check_store(layer, inputs, slots, cache, launch.output)
    assert errors.passed, errors
    cache.view(torch.uint8)[:, :, :4] ^= 0x10
    assert not verify.check_store(layer, inputs, slots, cache, launch.output).passed


def test_products_of_a_chunk():
    # Two requests, three queries each, that see 8, 9 and 10 tokens.
    assert traffic.attention_flops(Shape(2, 10, 3), 5) == 2 * 2 * (8 + 9 + 10) * 5


RUNS = {
    bench_decode: ["--batch", "2", "--context", "40"],
    bench_prefill: ["--batch", "2", "--context", "40", "--chunk", "24"],
    bench_store: ["--tokens", "3"],
}


@pytest.fixture
def tiny_run(monkeypatch, capsys):
    """Runs a benchmark on the CPU, with a tiny geometry and little time; returns exit status, stdout and the JSON."""
    monkeypatch.setitem(GEOMETRIES, "llama-3.1-8b", TINY)
    monkeypatch.setattr("benchmarks.timing.LEAST_SECONDS", 0)
    monkeypatch.setattr("benchmarks.timing.COPY_BYTES", {"cpu": 1 << 16})

    def run(module, *options):
        status = module.main([*RUNS[module], "--device", "cpu", "--tiers", "0.25", "--group-heads", "2", *options])
        out = capsys.readouterr().out
        return status, out, json.loads(out.splitlines()[-1])

    return run


@pytest.mark.parametrize("module", RUNS, ids=lambda module: module.__name__)
def test_a_run_on_the_cpu(tiny_run, module, tmp_path):
    file = tmp_path / "rows.json"
    status, out, result = tiny_run(module, "--json", str(file))
    assert status == 0 and json.loads(file.read_text("utf-8")) == result
    assert {"hardware", "versions", "command", "rows", "copy_gb_per_s"} <= set(result)
    kernel, twin, peer, *absent = result["rows"]
    assert kernel["status"] == "not run" and "need a GPU" in kernel["note"] and kernel["times"] is None
    assert twin["status"] == peer["status"] == "timed" and twin["bytes"] > 0
    assert twin["ratios"] == {peer["kernel"]: peer["times"]["median"] / twin["times"]["median"]}
    # Whoever could not run has a row, and its reason is in the table.
    assert absent and all(row["status"] == "absent" and row["note"] in out for row in absent)


def test_a_table_without_rich_and_a_plot_without_matplotlib(tiny_run, monkeypatch, tmp_path):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("rich", "matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, out, _ = tiny_run(bench_decode, "--plot", str(tmp_path / "plot.png"))
    assert status == 0 and "no plot: matplotlib is not installed" in out and "rich is not installed" in out


def test_a_plot(tiny_run, tmp_path):
    pytest.importorskip("matplotlib")
    tiny_run(bench_decode, "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_does_not_fit_is_skipped_and_named(tiny_run, monkeypatch):
    monkeypatch.setattr("benchmarks.session.free_memory", lambda device: 1)
    status, out, result = tiny_run(bench_decode)
    assert status == 1 and "GB are free" in out and "none of the project's own kernels was timed" in out
    assert [row["status"] for row in result["rows"][1:3]] == ["skipped", "skipped"]
    _, _, result = tiny_run(bench_decode, "--limit-s", "0")
    assert "time limit" in result["rows"][1]["note"]


def test_a_device_that_fails_leaves_what_was_measured(tiny_run, monkeypatch, tmp_path, capsys):
    """After an illegal access, every call to the device fails, that for free memory too."""
    calls = []

    def free_memory(device):
        calls.append(device)
        if len(calls) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 1 << 40

    monkeypatch.setattr("benchmarks.session.free_memory", free_memory)
    status, out, result = tiny_run(bench_decode, "--ranks", "0.5")
    assert [row["status"] for row in result["rows"] if row["kernel"] == "twin decode"] == ["timed", "failed"]
    assert status == 1 and "illegal memory access" in out
    monkeypatch.setattr("benchmarks.attention.Layer", lambda *arguments: free_memory(None))
    status, out, result = tiny_run(bench_decode, "--json", str(tmp_path / "rows.json"))
    assert status == 1 and result["rows"] == [] and (tmp_path / "rows.json").exists()


def test_a_peer_that_fails_is_named_with_its_error(tiny_run, monkeypatch):
    def wrong(problem):
        prepared = peers.sdpa(problem)
        return peers.Prepared(lambda: 2 * prepared.run(), prepared.token_bytes)

    def raises(problem):
        raise RuntimeError("no kernel image")

    broken = (peers.Peer("sdpa", raises, on_cpu=True), peers.Peer("fa3", wrong, on_cpu=True))
    monkeypatch.setattr(attention, "PEERS", broken)
    status, out, result = tiny_run(bench_decode)
    assert status == 0 and "RuntimeError: no kernel image" in out and "called wrongly?" in out
    assert [row["status"] for row in result["rows"][-2:]] == ["failed", "failed"]


def test_a_kernel_that_fails_its_check_is_not_timed(tiny_run, monkeypatch):
    """On a GPU; here the launch is the twin's, and wrong."""

    def launch(layer, shape, requests, query, cache, *rest):
        output = verify.twin_attention(layer, requests, query, cache)
        return launchers.Launch(lambda: output.mul_(1.1), output)

    monkeypatch.setattr("benchmarks.session.Session.on_cuda", property(lambda session: True))
    monkeypatch.setattr("benchmarks.session.Session.release", lambda session: None)
    monkeypatch.setattr("benchmarks.session.measure", lambda *args, **kwargs: Times(1.0, 1.0, 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launchers, "prefill", launch)
    status, out, result = tiny_run(bench_prefill, "--peers", "sdpa")
    row = result["rows"][0]
    assert status == 1 and row["status"] == "failed" and row["times"] is None and "FAILED mkv prefill" in out
    assert result["rows"][1]["status"] == "timed"
