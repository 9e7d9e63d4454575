# SPDX-License-Identifier: Apache-2.0
"""Search from end to end on tiny models: probes, paths, what is written, what is refused, what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mkv_kernels.codes import round_trip
from mkv_kernels.layout import WIDTHS
from vllm_mkv.adapter import Adapter
from vllm_mkv.cli import main
from vllm_mkv.fit.attention import intercepted, layer_index
from vllm_mkv.fit.bases import BASES, block_diagonal, block_metrics, hadamard, whitened
from vllm_mkv.fit.calibrate import attention_statistics, draw_windows, output_metrics
from vllm_mkv.fit.check import full_rank_exactness, inverse_error
from vllm_mkv.fit.data import token_windows
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.quality import measure, projected_caches
from vllm_mkv.fit.search import probe, search, spared
from vllm_mkv.fit.statistics import LayerStatistics
from vllm_mkv.fit.truncation import Truncation, by_group

SETTINGS = {"tokens": 1024, "context": 128, "eval_windows": 4}


@pytest.fixture(scope="module")
def searched(tiny_model, make_adapter, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "adapter"
    loaded = Adapter.load(make_adapter(tiny_model("llama"), 2))
    adapter, found = search(loaded, [str(text_file)], output=folder, **SETTINGS)
    return folder, adapter, found


@pytest.fixture(scope="module")
def model(tiny_model):
    return Source(str(tiny_model("llama"))).load("float32", "cpu")


@pytest.fixture(scope="module")
def windows(tiny_model, text_file):
    tokenizer = Source(str(tiny_model("llama"))).tokenizer
    return token_windows([str(text_file)], tokenizer, num_windows=8, context=64, seed=5)


def test_the_path_goes_down_all_widths_and_is_read_back_as_it_was(searched):
    folder, adapter, _ = searched
    loaded = Adapter.load(folder)
    assert adapter.path.widths == WIDTHS
    for budget in (0.5, 0.25, 0.125, 0.07):
        assert loaded.path.replay(budget).widths == adapter.path.replay(budget).widths
    made = loaded.config.made["search"]
    assert made["passes"] == 2 * 3 + 12
    assert made["widths"] == [16, 8, 4, 2, 0]
    assert loaded.config.default_budget == 0.25


def test_quality_is_measured_down_to_small_budgets(searched):
    stock, *rows = searched[1].config.quality
    assert stock["name"] == "stock" and stock["kl"] == 0
    asked = (0.75, 0.5, 0.375, 0.25, 0.167, 0.125, 0.09, 0.07)
    for budget, row in zip(asked, rows, strict=True):
        assert 0.9 * budget < row["budget"] <= budget
    divergence = [row["kl"] for row in rows]
    assert divergence[0] < divergence[3] < divergence[-1]


def test_full_rank_stays_exact_and_pairs_stay_inverse(searched, model):
    adapter = searched[1]
    assert inverse_error(adapter) < 1e-4
    assert full_rank_exactness(model, adapter, tokens=40).exact


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("group_heads", [1, 2, 4])
def test_blocks_have_unit_covariance(basis, group_heads):
    generator = torch.Generator().manual_seed(0)
    found = LayerStatistics(group_heads)
    spread = torch.logspace(0, -1.5, 32)
    q, k, v = (torch.randn(1, heads, 4000, 32, generator=generator) * spread for heads in (8, 4, 4))
    found.add(q, k + 3, v - 1)
    plain = BASES[basis](found, torch.eye(32, dtype=torch.float64).expand(4, 32, 32))
    bases = whitened(plain, found)
    for down, old, moments in ((bases.A, plain.A, found.key), (bases.C, plain.C, found.value)):
        down, old = torch.from_numpy(down).double(), torch.from_numpy(old).double()
        covariance = down.mT @ moments.covariance @ down
        for start in range(0, down.shape[-1], 16):
            block = slice(start, start + 16)
            torch.testing.assert_close(
                covariance[:, block, block], torch.eye(16).double().expand(len(down), 16, 16), atol=1e-3, rtol=0
            )
            # Block by block, the same subspace as before.
            spans = torch.cat([down[..., block], old[..., block]], dim=-1)
            assert (torch.linalg.matrix_rank(spans / spans.norm(dim=-2, keepdim=True), rtol=1e-4) == 16).all()


def test_to_whiten_twice_is_to_whiten_once(model, windows, tiny_model):
    statistics = attention_statistics(model, 2, windows)
    metrics = output_metrics(model, Source(str(tiny_model("llama"))).fingerprint)
    for layer, found in statistics.items():
        once = whitened(BASES["query"](found, metrics[layer]), found)
        twice = whitened(once, found)
        weights = [
            block_metrics(bases, found, metrics[layer]).diagonal(dim1=-2, dim2=-1).sum(-1) for bases in (once, twice)
        ]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=0)


def test_a_side_that_never_varies_is_whitened_to_something_finite(model, windows):
    found = attention_statistics(model, 2, windows)[0]
    found.key.products = found.key.sum[:, :, None] * found.key.sum[:, None, :] / found.key.count
    bases = whitened(BASES["pca"](found, None), found)
    assert np.isfinite(bases.A).all() and np.isfinite(bases.B).all()
    np.testing.assert_allclose(bases.A @ bases.B.swapaxes(-1, -2), np.eye(64)[None].repeat(2, 0), atol=1e-4)


def test_hadamard_is_orthogonal_and_flat():
    matrix = hadamard(16)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 0.25))


def test_block_metrics_are_the_errors_that_they_predict(model, windows, tiny_model):
    """E[(q.e)^2] and E[|e W_O|^2] for errors in the coordinates of one block."""
    statistics = attention_statistics(model, 2, windows)
    metric = output_metrics(model, Source(str(tiny_model("llama"))).fingerprint)[1]
    bases = whitened(BASES["query"](statistics[1], metric), statistics[1])
    metrics = block_metrics(bases, statistics[1], metric)
    noise = torch.randn(500, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for side, up, of_error in (
        (0, bases.B, block_diagonal(statistics[1].query_second, 2)),
        (1, bases.D.swapaxes(-1, -2), block_diagonal(metric, 2)),
    ):
        for block in (0, 3):
            error = noise @ torch.from_numpy(up[1, :, 16 * block : 16 * block + 16].copy()).double().mT
            expected = torch.einsum("ti,ij,tj->t", error, of_error[1], error)
            found = torch.einsum("ti,ij,tj->t", noise, metrics[1, side, block], noise)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_errors_are_those_of_the_coordinates_of_a_model_that_runs(searched, model, windows, tiny_model):
    """Replays what the first probe saw, and quantises one block at one width by hand."""
    adapter = searched[1]
    found = probe(model, adapter, windows)
    prepared = replace(adapter, bases=found.bases)
    metrics = output_metrics(model, Source(str(tiny_model("llama"))).fingerprint)
    second = attention_statistics(model, 2, windows)[1].query_second
    truncation, seen = Truncation(prepared, spared(adapter.shape, None)), []

    def record(module, query, key, value):
        if layer_index(module) == 1:
            seen.append((query, key, value))
        return truncation(module, query, key, value)

    with torch.inference_mode(), intercepted(model, record):
        model(input_ids=torch.from_numpy(windows))
    ((query, key, value),) = seen
    assert found.errors.shape == (3, 2, 2, 4, 5) and (found.errors[..., 0] == 0).all()
    bases, mask = found.bases[1], torch.full((64, 64), -torch.inf).triu(1)
    for side, (heads, down, up, mean, metric) in enumerate(
        (
            (key, bases.A, bases.B.swapaxes(-1, -2), bases.key_mean, second),
            (value, bases.C, bases.D, bases.value_mean, metrics[1]),
        )
    ):
        x = (by_group(heads, 2)[:, 1] - torch.from_numpy(mean[1])) @ torch.from_numpy(down[1])
        for number, width in enumerate(WIDTHS[1:], 1):
            error = torch.zeros_like(x)
            error[..., 16:32] = (x - round_trip(x, (width,) * 4))[..., 16:32]
            lost = [(error @ torch.from_numpy(up[1].copy())).double()]
            if side == 1:
                attention = [
                    ((query[:, head] @ key[:, head // 2].mT) / 32**0.5 + mask).softmax(-1).double()
                    for head in range(4, 8)
                ]
                lost = [of_head @ lost[0] for of_head in attention]
            W = block_diagonal(metric, 2)[1]
            expected = np.mean([float(torch.einsum("bti,ij,btj->bt", e, W, e).mean()) for e in lost])
            assert found.errors[1, 1, side, 1, number] == pytest.approx(expected, rel=1e-3)


def test_a_probe_spares_one_side_of_one_layer(searched, model, windows):
    shape = searched[1].shape
    widths = np.array(spared(shape, (1, 1)).widths)
    assert (widths[1, :, 1] == 16).all()
    widths[1, :, 1] = 2
    assert (widths == 2).all() and (widths == np.array(spared(shape, None).widths)).all()


def test_rates_are_what_sparing_a_side_saves_by_what_was_predicted(searched, model, windows):
    adapter = searched[1]
    found = probe(model, adapter, windows)
    prepared = replace(adapter, bases=found.bases)
    allocations = [spared(adapter.shape, place) for place in (None, (0, 0), (1, 1))]
    _, everything, *others = measure(model, windows, projected_caches(prepared, allocations, 4), stock_bytes=1)
    saved = [everything["kl"] - row["kl"] for row in others]
    predicted = [
        found.errors[place][..., WIDTHS.index(2)].sum() for place in ((0, slice(None), 0), (1, slice(None), 1))
    ]
    ratio = (saved[0] / predicted[0]) / (saved[1] / predicted[1])
    assert found.rates[0, 0] / found.rates[1, 1] == pytest.approx(ratio**found.exponent, rel=1e-2)
    assert found.exponent in (1.0, 0.85, 0.7, 0.55)


def test_ranks_alone(tiny_model, make_adapter, text_file, tmp_path):
    loaded = Adapter.load(make_adapter(tiny_model("llama"), 4))
    adapter, _ = search(
        loaded, [str(text_file)], output=tmp_path / "a", widths=(16, 0), **(SETTINGS | {"eval_windows": 0})
    )
    assert adapter.path.widths == (16, 0)
    assert adapter.config.default_budget == 0.5
    assert adapter.config.quality == []


def test_windows_and_soft_caps(windowed, tiny_model, make_adapter, text_file, tmp_path):
    architecture, settings = windowed
    folder = tiny_model(architecture, **settings)
    loaded = Adapter.load(make_adapter(folder, 2))
    adapter, found = search(loaded, [str(text_file)], output=tmp_path / "a", **SETTINGS)
    divergences = [row["kl"] for row in adapter.config.quality]
    assert divergences == sorted(divergences) and divergences[1] < 0.05 * divergences[-1]
    assert (found.rates > 0).all() and np.isfinite(found.damage).all()
    # Coordinates are whitened as they are stored: keys less no mean where scores are capped.
    capped = "attn_logit_softcapping" in settings
    network = Source(str(folder)).load("float32", "cpu")
    tokens, _ = draw_windows(Source(str(folder)), [str(text_file)], 1024, 4, 128, seed=0)
    for layer, statistics in attention_statistics(network, 2, tokens).items():
        bases = adapter.bases[layer]
        assert bases.key_mean.any() != capped
        stored = statistics.key.second if capped else statistics.key.covariance
        A = torch.from_numpy(bases.A).double()
        variances = (A.mT @ stored @ A).diagonal(dim1=1, dim2=2)
        assert 0.7 < variances.mean() < 1.4, (layer, variances.mean())


def test_shards_are_balanced_in_what_is_written(tiny_model, make_adapter, text_file, tmp_path):
    loaded = Adapter.load(make_adapter(tiny_model("llama"), 1))
    adapter, _ = search(loaded, [str(text_file)], output=tmp_path / "a", shards=2, **(SETTINGS | {"eval_windows": 0}))
    for budget in (0.5, 0.3, 0.2):
        allocation = adapter.path.replay(budget, num_shards=2)
        for layer in range(3):
            layouts = [allocation.layout(layer, block_size=16, itemsize=2, shard=i, num_shards=2) for i in (0, 1)]
            assert [layout.content_bytes for layout in layouts] == [16 * layouts[0].bytes_per_token] * 2


def command(adapter, text, output, *more):
    return ["search", str(adapter), "--text", str(text), "--output", str(output), "--context", "128", *more]


@pytest.mark.parametrize("best", [1.0, 0.85, 0.7, 0.55])
def test_the_exponent_whose_path_loses_least_is_taken(best, searched, model, windows, monkeypatch):
    """By the geometric mean of two budgets."""
    of_pair = {1.0: (0.2, 0.2), 0.85: (0.3, 0.2), 0.7: (0.2, 0.4), 0.55: (0.9, 0.9)} | {best: (0.001, 1.0)}

    def measured(model, windows, caches, stock_bytes):
        rows = measure(model, windows, caches, stock_bytes=stock_bytes)
        if caches[0].name == "mkv":
            for row, kl in zip(rows[1:], sum(of_pair.values(), ()), strict=True):
                row["kl"] = kl
        return rows

    monkeypatch.setattr("vllm_mkv.fit.search.measure", measured)
    found = probe(model, searched[1], windows[:1])
    assert found.exponent == best


def test_a_direction_that_hardly_varies_is_not_blown_up_beside_those_that_do():
    """A hundredth of the largest deviation in its block is what any direction is taken to vary."""
    variances = torch.tensor([1.0] * 15 + [1e-12] + [1.0] * 16, dtype=torch.float64)
    found = LayerStatistics(1)
    flat = torch.zeros(1, 1, 32, dtype=torch.float64)
    for moments in (found.query, found.key, found.value):
        moments.count, moments.sum, moments.products = 1, flat[0], torch.diag(variances)[None]
    bases = whitened(BASES["pca"](found, None), found)
    for down in (bases.A, bases.C):
        norms = np.linalg.svd(down[0], compute_uv=False)
        assert norms.max() == pytest.approx(100, rel=1e-3)
        assert norms[1] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("widths", ["16,4,8,0", "16,5,0", "16,4,4,0", "8,4,0", "wide"])
def test_wrong_widths_are_refused(widths, tiny_model, make_adapter, text_file, tmp_path, capsys):
    arguments = command(make_adapter(tiny_model("llama"), 2), text_file, tmp_path / "out", "--widths", widths)
    try:
        assert main(arguments) == 1
    except SystemExit as stop:
        assert stop.code == 2
    reason = "no list of bits such as 16,8,4,2,0" if widths == "wide" else "must start at 16 and fall through some of"
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("short.txt", b"a mill", "shorter than one window"),
        ("empty.txt", b"  \n", "is empty"),
        ("latin.txt", "ein M\u00fcller ".encode("latin-1") * 99, "not UTF-8"),
        ("missing.txt", None, "no file"),
    ],
)
def test_wrong_texts_are_refused(name, content, reason, tiny_model, make_adapter, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = command(make_adapter(tiny_model("llama"), 2), tmp_path / name, tmp_path / "out", "--tokens", "256")
    assert main(arguments) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tiny_model, make_adapter, text_file, tmp_path, capsys):
    adapter = make_adapter(tiny_model("llama"), 2)
    other = tiny_model("llama", num_key_value_heads=2)
    assert main(command(adapter, text_file, tmp_path / "out", "--model", str(other))) == 1
    assert "this model differs" in capsys.readouterr().err


@pytest.mark.parametrize("shards, reason", [(0, "use at least 1"), (3, "do not divide"), (8, "do not fit")])
def test_shards_that_serving_refuses_are_refused(tiny_model, make_adapter, text_file, tmp_path, capsys, shards, reason):
    adapter = make_adapter(tiny_model("llama"), 2)
    assert main(command(adapter, text_file, tmp_path / "out", "--shards", str(shards))) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_writing_it_leaves_an_adapter(moment, tiny_model, make_adapter, text_file, tmp_path):
    """The old one or the new one: killed before the two change places, and after that."""
    output = tmp_path / "out"
    Adapter.load(make_adapter(tiny_model("llama"), 2)).save(output, "old")
    code = (
        "import os, signal, sys\n"
        "from vllm_mkv import cli, folder\n"
        "exchange = folder._exchange\n"
        "def killing(*names):\n"
        f"    assert {moment == 'before'} or exchange(*names)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder._exchange = killing\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = command(output, text_file, output, "--tokens", "256", "--eval-windows", "0")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert Adapter.load(output).path.widths == ((16, 0) if moment == "before" else (16, 8, 4, 2, 0))


def test_interrupted_it_writes_nothing(tiny_model, make_adapter, text_file, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_mkv.fit.search.measure", interrupt)
    arguments = command(make_adapter(tiny_model("llama"), 2), text_file, tmp_path / "out", "--tokens", "256")
    assert main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_adapter(tiny_model, make_adapter, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    Adapter.load(make_adapter(tiny_model("llama"), 2)).save(output, "old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_mkv.adapter.save_file", full)
    assert main(command(output, text_file, output, "--tokens", "256", "--eval-windows", "0")) == 1
    assert "No space left" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert Adapter.load(output).path.widths == (16, 0)
