# SPDX-License-Identifier: Apache-2.0
"""`vllm-mkv eval` through transformers: its rows, its files, its refusals. The engine's side is in tests/serving."""

import errno
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from vllm_mkv.adapter import Adapter, digest
from vllm_mkv.allocation import CacheShape
from vllm_mkv.cli import main
from vllm_mkv.evaluation.engine import engine_budget
from vllm_mkv.evaluation.evaluate import evaluate, evaluation_table
from vllm_mkv.fit.data import token_windows
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.quality import measure, projected_caches

ROW = ["name", "budget", "bytes_per_token", "perplexity", "kl", "top1"]
STOCK_BYTES = 2 * 3 * 4 * 32 * 4


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapter(model, make_adapter, uneven_path):
    return make_adapter(model, 2, path=uneven_path(Adapter.load(make_adapter(model, 2)).shape))


def small(text_file, **changes):
    return {"text": [str(text_file)], "num_windows": 3, "context": 48} | changes


def test_the_command_prints_writes_and_draws(model, adapter, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    figures, plot = tmp_path / "figures.json", tmp_path / "curve.png"
    command = (
        f"eval {adapter} --text {text_file} --budgets 1 0.5 0.3 --against turboquant2,int4 --windows 3 --context 48"
    )
    assert main([*command.split(), "--json", str(figures), "--plot", str(plot)]) == 0
    found = json.loads(figures.read_text("utf-8"))
    assert list(found) == ["model", "adapter_digest", "tokens", "context", "rows"]
    assert found["model"] == str(model)
    assert found["adapter_digest"] == digest(adapter)
    assert (found["tokens"], found["context"]) == (3 * 48, 48)
    assert [list(row) for row in found["rows"]] == [ROW] * 6
    stock, full, half, least, int4, turboquant2 = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["stock", "mkv", "mkv", "mkv", "int4", "turboquant2"]
    assert stock == {**stock, "budget": 1.0, "bytes_per_token": STOCK_BYTES, "kl": 0.0, "top1": 1.0}
    assert full["budget"] == 1.0 and full["kl"] < 1e-5 and full["top1"] > 0.99
    assert 0.45 < half["budget"] <= 0.5 and 0.25 < least["budget"] <= 0.3
    assert full["kl"] < half["kl"] < least["kl"]
    assert int4["bytes_per_token"] == 2 * 3 * 4 * 20 and turboquant2["bytes_per_token"] == 2 * 3 * 4 * 10
    assert 0 < int4["kl"] < turboquant2["kl"]
    for row in found["rows"]:
        assert row["budget"] == row["bytes_per_token"] / STOCK_BYTES
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [plot, figures]
    assert figures.stat().st_mode & 0o777 == 0o644
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line.split()[1] for line in lines] == [row["name"] for row in found["rows"]]
    assert f"{half['kl']:.4f}" in lines[2] and "3,072" in lines[0]


def test_rows_are_those_of_measure(model, adapter, text_file):
    found = evaluate(str(model), adapter=str(adapter), budgets=[0.5], **small(text_file))
    source, loaded = Source(str(model)), Adapter.load(adapter)
    windows = token_windows([str(text_file)], source.tokenizer, num_windows=3, context=48)
    caches = projected_caches(loaded, [loaded.path.replay(0.5, itemsize=4)], 4)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    assert found["rows"] == measure(network, windows, caches, stock_bytes=STOCK_BYTES)


def test_a_model_brings_its_adapter_and_its_default_budget(model, adapter, text_file, tmp_path):
    whole = tmp_path / "model"
    shutil.copytree(model, whole)
    without = evaluate(str(whole), **small(text_file))
    assert without["adapter_digest"] is None
    assert [row["name"] for row in without["rows"]] == ["stock"]
    shutil.copytree(adapter, whole / "mkv")
    found = evaluate(str(whole), **small(text_file))
    assert found["model"] == str(whole)
    assert found["adapter_digest"] == digest(adapter)
    stock, row = found["rows"]
    assert row["name"] == "mkv" and row["budget"] <= Adapter.load(adapter).config.default_budget
    assert stock == without["rows"][0]
    # The other model is named by the adapter, and measured.
    assert evaluate(str(whole / "mkv"), **small(text_file))["model"] == str(model)
    assert evaluate(str(whole / "mkv"), model=str(whole), **small(text_file))["rows"] == found["rows"]


def test_other_caches_need_no_adapter(model, text_file):
    found = evaluate(str(model), against=["fp8", "int8"], **small(text_file))
    assert [row["name"] for row in found["rows"]] == ["stock", "int8", "fp8"]
    assert found["rows"][1]["kl"] < 1e-3


def test_the_uniform_allocation_is_another(model, adapter, text_file):
    path, uniform = (
        evaluate(str(adapter), budgets=[0.5], allocation=allocation, **small(text_file))["rows"][1]
        for allocation in ("path", "uniform")
    )
    assert uniform["budget"] == 0.5
    assert path["kl"] != uniform["kl"]


def test_the_seed_chooses_the_windows(model, text_file, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(text_file.read_text("utf-8") * 8, "utf-8")
    first, again, other = (
        evaluate(str(model), text=[str(text)], num_windows=3, context=48, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first["rows"] != other["rows"]


def test_bytes_are_of_the_dtype_that_the_model_is_stored_in(model, make_adapter, uneven_path, text_file, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    config = json.loads((half / "config.json").read_text("utf-8"))
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), "utf-8")
    path = uneven_path(CacheShape(3, 2, 64), widths=(16, 8, 4, 2, 0))
    adapter = make_adapter(model, 2, path=path)
    computed = [
        evaluate(str(half), adapter=str(adapter), budgets=[0.4], against=["int4"], dtype=dtype, **small(text_file))
        for dtype in ("auto", "float32")
    ]
    for found in computed:
        stock, row, int4 = found["rows"]
        assert stock["bytes_per_token"] == STOCK_BYTES // 2
        assert row["bytes_per_token"] == path.replay(0.4, itemsize=2).bytes_per_token(block_size=16, itemsize=2)
        assert int4["budget"] == 20 / 64
    assert computed[0]["rows"][0]["perplexity"] != computed[1]["rows"][0]["perplexity"]


@pytest.mark.parametrize("widths", [(16, 0), (16, 8, 4, 2, 0)])
def test_the_engines_budget_is_that_of_the_same_allocation(uneven_path, widths):
    path = uneven_path(CacheShape(3, 2, 64), widths=widths)
    differ = 0
    for budget in (1.0, 0.7, 0.5, 0.31):
        for stored in (2, 4):
            allocation = path.replay(budget, itemsize=stored)
            for computed in (2, 4):
                found = engine_budget(path, allocation, computed)
                assert path.replay(found, itemsize=computed) == allocation
                differ += path.replay(budget, itemsize=computed) != allocation
    assert (differ > 0) == (len(widths) > 2), "with ranks alone, a budget means the same in every dtype"


def test_the_engines_budget_holds_where_a_quotient_was_rounded_down(uneven_path):
    path = uneven_path(CacheShape(7, 7, 48))
    for budget in np.linspace(0.34, 1, 100):
        allocation = path.replay(float(budget))
        assert path.replay(engine_budget(path, allocation, 2)) == allocation


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(Source, "load", load)


@pytest.mark.parametrize(
    "command, reason",
    [
        ("eval TMP/nowhere --text TEXT", "there is no model at"),
        ("eval MODEL --text TMP/none.txt", "there is no file"),
        ("eval MODEL --text TMP/empty.txt", "empty.txt is empty"),
        ("eval MODEL --text TMP/latin.txt", "is not UTF-8 text"),
        ("eval MODEL --text TMP/short.txt", "shorter than one window of 1024 tokens"),
        ("eval MODEL --text TEXT --context 1", "--context 1 is too small; use at least 2"),
        ("eval MODEL --text TEXT --windows 4000 --context 64", "and 4000 are needed; add text"),
        ("eval MODEL --text TEXT --windows 0", "--windows 0 is too small; use at least 1"),
        ("eval MODEL --text TEXT --context 4096", "more than the model's 2048"),
        ("eval MODEL --text TEXT --budgets 0.5", "has none in its folder mkv; name one: --adapter ADAPTER"),
        ("eval ADAPTER --text TEXT --budgets 0.9 0.1", "use at least 0.25"),
        ("eval ADAPTER --text TEXT --budgets 0", "is not in (0, 1]"),
        ("eval ADAPTER --text TEXT --budgets nan", "is not in (0, 1]"),
        ("eval ADAPTER --text TEXT --adapter ADAPTER", "leave one of them out"),
        ("eval MODEL --text TEXT --model MODEL", "leave one of them out"),
        ("eval OTHER --text TEXT --adapter ADAPTER", "architecture is 'MistralForCausalLM', not 'LlamaForCausalLM'"),
        ("eval ADAPTER --text TEXT --model OTHER", "architecture is 'MistralForCausalLM', not 'LlamaForCausalLM'"),
        ("eval MOVED --text TEXT", "which cannot be read here"),
        ("eval MOVED --text TEXT", "name the model: --model MODEL"),
        ("eval MODEL --text TEXT --adapter TMP/nowhere", "there is no adapter at"),
        ("eval MODEL --text TEXT --against int5", "'int5' is no cache to compare with; known are fp8,int8,int4"),
        ("eval MODEL --text TEXT --against int4 --plot TMP/curve.exe", "name a file that ends in .png"),
        ("eval MODEL --text TEXT --against int4 --plot TMP/no/curve.png", "there is no folder"),
        ("eval MODEL --text TEXT --plot TMP/curve.png", "nothing to draw beside the full model"),
        ("eval MODEL --text TEXT --json TMP/no/figures.json", "there is no folder"),
        ("eval MODEL --text TEXT --json TMP", "is a folder; name a file in it"),
        ("eval MODEL --text TEXT --engine vllm --against int4", "leave --against out, or use --engine transformers"),
        ("eval MODEL --text TEXT --engine vllm --device cuda", "leave --device cuda out"),
    ],
)
def test_mistakes_are_one_line_and_found_before_weights_are_loaded(
    model, adapter, tiny_model, text_file, tmp_path, capsys, no_weights, command, reason
):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("a few words")
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text("utf-8"))
    gone = json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    (moved / "adapter_config.json").write_text(gone, "utf-8")
    before = sorted(tmp_path.rglob("*"))
    names = {
        "TMP": tmp_path, "ADAPTER": adapter, "MODEL": model, "OTHER": tiny_model("mistral"), "TEXT": text_file,
        "MOVED": moved,
    }  # fmt: skip
    words = command.split()
    for name, path in names.items():
        words = [str(path) + word.removeprefix(name) if word.split("/")[0] == name else word for word in words]
    assert main(words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-mkv: error: ")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_models_name_is_no_markup(capsys):
    row = dict.fromkeys(ROW[1:], 1) | {"name": "stock"}
    Console().print(evaluation_table({"model": "a/model[b]", "tokens": 1, "context": 1, "rows": [row]}))
    assert "model[b], 1 tokens" in capsys.readouterr().out


def test_without_vllm_its_engine_is_refused(model, text_file, monkeypatch):
    monkeypatch.setattr("vllm_mkv.evaluation.engine.find_spec", lambda name: None)
    reason = r"vLLM is not installed.*'\.\[cuda\]'.* in a clone of vllm-mkv.*--engine transformers"
    with pytest.raises(ValueError, match=reason):
        evaluate(str(model), engine="vllm", **small(text_file))


def test_an_interruption_leaves_what_was_there(model, text_file, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    figures = tmp_path / "figures.json"
    figures.write_text("older")
    monkeypatch.setattr("vllm_mkv.fit.quality.log_probabilities", interrupt)
    command = f"eval {model} --text {text_file} --windows 2 --context 32 --json {figures} --against int4"
    assert main([*command.split(), "--plot", str(tmp_path / "curve.png")]) == 130
    assert list(tmp_path.iterdir()) == [figures]
    assert figures.read_text() == "older"


@pytest.mark.parametrize(
    "stop, status", [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_full_disk_leaves_what_was_there(model, text_file, tmp_path, monkeypatch, capsys, stop, status):
    def fail(*args):
        raise stop

    figures = tmp_path / "figures.json"
    figures.write_text("older")
    monkeypatch.setattr("vllm_mkv.output.os.fsync", fail)
    command = f"eval {model} --text {text_file} --windows 2 --context 32 --json {figures}"
    assert main(command.split()) == status
    assert list(tmp_path.iterdir()) == [figures]
    assert figures.read_text() == "older"
    assert ("No space left" in capsys.readouterr().err) == (status == 1)


def test_a_file_is_replaced_not_written_over(model, text_file, tmp_path):
    figures, link = tmp_path / "figures.json", tmp_path / "link"
    figures.write_text("older")
    link.hardlink_to(figures)
    evaluate(str(model), json_file=figures, **small(text_file))
    assert json.loads(figures.read_text("utf-8"))["tokens"] == 3 * 48
    assert link.read_text() == "older"


def test_numbers_that_are_none_are_refused(model, text_file, tmp_path, monkeypatch):
    from vllm_mkv.evaluation import rivals

    broken = rivals.Rival(8, 0, lambda x, bits: x * float("nan"))
    monkeypatch.setitem(rivals.RIVALS, "fp8", broken)
    with pytest.raises(ValueError, match="fp8 at 768 bytes per token: log-probabilities are not finite"):
        evaluate(str(model), against=["fp8"], json_file=tmp_path / "figures.json", **small(text_file))
    assert not list(tmp_path.iterdir())
