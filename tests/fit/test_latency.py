# SPDX-License-Identifier: Apache-2.0
"""The engine benchmark without an engine: lines, turns, mistakes, files."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from vllm_mkv.adapter import Adapter
from vllm_mkv.cli import main
from vllm_mkv.evaluation.latency import (
    Line,
    break_even,
    draw_latency,
    fit_line,
    latency_row,
    print_latency,
    refused_row,
)
from vllm_mkv.evaluation.synthetic import ModelShape, random_adapter
from vllm_mkv.evaluation.timing import Cache, Schedule, time_caches
from vllm_mkv.fingerprint import ModelFingerprint

COUNTS = {"batch": 2, "output_len": 4, "repeats": 3, "warmup": 1, "seed": 0}


def test_a_line_is_found_again():
    tokens = [512, 1024, 2048, 4096]
    line = fit_line(tokens, [3e-3 + 2e-7 * n for n in tokens])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2e-7, 3e-3, 1))
    assert line.at(1000) == pytest.approx(3.2e-3)
    noisy = fit_line(tokens, [1.0, 2.0, 1.5, 3.0])
    residual = np.polyfit(tokens, [1.0, 2.0, 1.5, 3.0], 1, full=True)[1][0]
    assert noisy.r2 == pytest.approx(1 - residual / np.var([1.0, 2.0, 1.5, 3.0]) / 4)


def test_two_points_say_nothing_of_the_fit_and_one_is_no_line():
    assert fit_line([512, 1024], [1.0, 2.0]).r2 is None
    with pytest.raises(ValueError, match="a line needs two"):
        fit_line([512, 512], [1.0, 2.0])


@pytest.mark.parametrize(
    "slope, intercept, expected",
    [
        (1.0, 14.0, ("above", pytest.approx(4))),
        (3.0, 6.0, ("below", pytest.approx(4))),
        (1.0, 9.0, ("always", None)),
        (2.0, 9.0, ("always", None)),
        (1.0, 10.0, ("always", None)),
        (3.0, 11.0, ("never", None)),
        (2.0, 11.0, ("never", None)),
        (2.0, 10.0, ("never", None)),
    ],
)
def test_break_even(slope, intercept, expected):
    assert break_even(Line(slope, intercept, None), Line(2.0, 10.0, None)) == expected


def test_rows_are_per_token_of_context_and_request():
    def windows(slope, intercept):
        # Of three repeats, the middle one is on the line.
        return {n: [(n, k * (intercept + slope * 4 * n)) for k in (0.9, 1.0, 1.3)] for n in (512, 1024, 2048)}

    named = {"name": "stock", "budget": 1.0, "bytes_per_token": 64}
    stock, line = latency_row(named, 4, windows(2e-6, 1e-3), None)
    assert (stock["slope_us"], stock["intercept_ms"]) == pytest.approx((2000, 1))
    assert (stock["slope_ratio"], stock["faster"], stock["break_even_context"]) == (1.0, None, None)
    point = stock["contexts"][0]
    assert (point["context"], point["inter_token_ms"]) == (512, pytest.approx(5.096))
    assert (point["least_ms"], point["most_ms"]) == pytest.approx((0.9 * 5.096, 1.3 * 5.096))
    assert point["tokens_per_second"] == pytest.approx(4 / 5.096e-3)
    row, _ = latency_row({**named, "name": "mkv"}, 4, windows(1e-6, 5e-3), line)
    assert (row["slope_ratio"], row["faster"], row["break_even_context"]) == (
        pytest.approx(0.5),
        "above",
        pytest.approx(1000),
    )
    falling, _ = latency_row(named, 4, windows(1e-6, 1e-3), Line(-1e-6, 1e-3, None))
    assert falling["slope_ratio"] is None


def test_the_windows_that_count_lie_around_the_context():
    schedule = Schedule.make([256, 128], 400, **COUNTS)
    assert schedule.contexts == (128, 256)
    assert schedule.prompt_len(256) == 256 - 4 - 6
    assert schedule.longest(256) > 256 + 6
    prompts = schedule.prompts(128, 300)
    assert prompts.shape == (2, 118) and prompts.min() >= 0 and prompts.max() < 300
    np.testing.assert_array_equal(prompts, schedule.prompts(128, 300))
    assert Schedule.make(None, 1500, **COUNTS).contexts == (512, 1024)


@pytest.mark.parametrize(
    "contexts, positions, changed, reason",
    [
        ([512], 4096, {}, "1 contexts give no line"),
        ([512, 512], 4096, {}, "1 contexts give no line"),
        (None, 600, {}, "1 contexts give no line"),
        ([512, 4096], 4096, {}, "more than the model's 4096; use --contexts up to 40"),
        ([8, 512], 4096, {}, "use --contexts from 11 on"),
        ([0, 512], 4096, {}, "--contexts 0 is too small"),
        ([256, 512], 4096, {"batch": 0}, "--batch 0 is too small"),
        ([256, 512], 4096, {"output_len": 1}, "--output-len 1 is too small; use at least 2"),
        ([256, 512], 4096, {"repeats": 0}, "--repeats 0"),
        ([256, 512], 4096, {"warmup": -1}, "--warmup -1"),
        ([256, 512], 4096, {"seed": -1}, "--seed -1"),
    ],
)
def test_schedules_that_cannot_be(contexts, positions, changed, reason):
    with pytest.raises(ValueError) as error:
        Schedule.make(contexts, positions, **COUNTS | changed)
    assert reason in str(error.value)


def test_the_longest_context_named_in_an_error_is_taken():
    with pytest.raises(ValueError, match="use --contexts up to") as error:
        Schedule.make([512, 4096], 4096, **COUNTS)
    longest = int(str(error.value).rsplit(" ", 1)[1])
    assert Schedule.make([512, longest], 4096, **COUNTS).longest(longest) <= 4096


class FakeStepper:
    block_size, vocab_size = 16, 100

    def __init__(self, name, log):
        self.name, self.log, self.tokens = name, log, 0

    def prefill(self, prompts, num_tokens):
        self.tokens = prompts.shape[1]
        self.log.append((self.name, "prefill"))

    def decode(self, num_steps):
        self.log.append((self.name, "decode"))
        self.tokens += num_steps
        return SimpleNamespace(seconds=1e-3 * self.tokens, cached=self.tokens)

    def release(self):
        self.log.append((self.name, "release"))


def starting(log, failing=()):
    @contextmanager
    def start(cache):
        if cache.name in failing:
            raise NotImplementedError("no AVX-512\nhere")
        log.append((cache.name, "start"))
        try:
            yield FakeStepper(cache.name, log)
        finally:
            log.append((cache.name, "stop"))

    return start


CACHES = [
    Cache("stock", lambda block_size: 64, {}),
    Cache("fp8", lambda block_size: 32, {}, may_be_refused=True),
    Cache("mkv", lambda block_size: 16, {}),
]


def test_engines_side_by_side_take_turns():
    log = []
    schedule = Schedule.make([64, 128], 400, **COUNTS)
    stock, fp8, mkv = time_caches(schedule, CACHES, starting(log), interleaved=True)
    assert log[:3] == [(name, "start") for name in ("fp8", "stock", "mkv")]
    decodes = [name for name, what in log if what == "decode"]
    assert decodes == ["fp8", "stock", "mkv"] * 4 * 2
    assert list(stock.windows) == [64, 128] and all(len(found) == 3 for found in stock.windows.values())
    assert stock.refused is None and stock.windows == fp8.windows == mkv.windows
    assert [seconds for _, seconds in stock.windows[64]] == pytest.approx([(54 + 4 * n) * 1e-3 for n in (2, 3, 4)])


def test_engines_one_at_a_time():
    log = []
    time_caches(Schedule.make([64, 128], 400, **COUNTS), CACHES, starting(log), interleaved=False)
    assert [entry for entry in log if entry[1] in ("start", "stop")] == [
        (name, what) for name in ("fp8", "stock", "mkv") for what in ("start", "stop")
    ]


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_refused_cache_is_a_row_and_any_other_an_error(interleaved):
    schedule = Schedule.make([64, 128], 400, **COUNTS)
    stock, fp8, mkv = time_caches(schedule, CACHES, starting([], ["fp8"]), interleaved=interleaved)
    assert fp8.refused == "no AVX-512 here" and not fp8.windows
    assert stock.windows == mkv.windows != {}
    log = []
    with pytest.raises(NotImplementedError, match="no AVX-512"):
        time_caches(schedule, CACHES, starting(log, ["mkv"]), interleaved=interleaved)
    assert log[-1][1] == "stop", "engines are stopped"


@pytest.fixture
def without_engine(monkeypatch):
    """`without_engine(failing=())`: benchmarks run with engines that are none; returns what was done with them."""
    from vllm_mkv.evaluation import bench

    def use(failing=()):
        log = []
        monkeypatch.setattr(bench, "engine_start", lambda *args, **kwargs: starting(log, failing))
        monkeypatch.setattr("vllm_mkv.serving.stepper.on_cpu", lambda: True)
        monkeypatch.setattr("vllm_mkv.serving.stepper.hardware", lambda: "an abacus")
        return log

    return use


def bench(*options):
    return main(["bench", "--shape", "2,4,2,32,64", "--contexts", "128", "256", "512", *map(str, options)])


def test_the_command_prints_and_writes(without_engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    without_engine(["fp8"])
    figures, plot = tmp_path / "figures.json", tmp_path / "latency.png"
    assert bench("--budgets", 0.5, 0.25, "--json", figures, "--plot", plot) == 0
    out = capsys.readouterr().out
    assert "fp8 was not measured, vLLM refuses it here: no AVX-512 here" in out and "timed with random bases" in out
    assert out.splitlines()[-2:] == [f"wrote {figures}", f"wrote {plot}"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text("utf-8"))
    assert {key: found[key] for key in found if key not in ("rows", "hardware")} == {
        "model": "shape 2,4,2,32,64", "adapter_digest": None, "dtype": "bfloat16", "batch": 4, "output_len": 16,
        "repeats": 5, "interleaved": True, "contexts": [128, 256, 512],
    }  # fmt: skip
    stock, fp8, *ours = found["rows"]
    assert (stock["name"], stock["bytes_per_token"], stock["slope_ratio"]) == ("stock", 512, 1.0)
    assert (fp8["name"], fp8["budget"], fp8["refused"], fp8["contexts"]) == ("fp8", 0.5, "no AVX-512 here", [])
    assert fp8.keys() == stock.keys() == ours[0].keys()
    for row, budget in zip(ours, (0.5, 0.25), strict=True):
        assert row["name"] == "mkv" and 0.8 * budget < row["budget"] <= budget
        assert row["slope_ratio"] == pytest.approx(1) and row["faster"] == "never"


def test_an_interruption_leaves_no_file(without_engine, tmp_path, monkeypatch):
    log = without_engine()

    def interrupt(self, num_steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeStepper, "decode", interrupt)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert bench("--json", tmp_path / "figures.json") == 130
    assert not list(tmp_path.iterdir())
    assert log[-1][1] == "stop"


@pytest.mark.parametrize(
    "options, reason",
    [
        ("", "give either MODEL or --shape"),
        ("MODEL --shape 2,4,2,32,64", "give either MODEL or --shape"),
        ("--shape 2,4,2,32", "is not five whole numbers above 0"),
        ("--shape 2,4,2,32,x", "is not five whole numbers above 0"),
        ("--shape 2,4,0,32,64", "is not five whole numbers above 0"),
        ("--shape 2,4,3,32,64", "4 query heads do not divide among 3 KV heads"),
        ("--shape 2,4,2,24,64", "the head size 24 is no multiple of 16"),
        ("MODEL --contexts 512", "1 contexts give no line"),
        ("MODEL --contexts 512 2048", "more than the model's 2048; use --contexts up to"),
        ("MODEL --budgets 0", "is not in (0, 1]"),
        ("MODEL --budgets 0.5 1.5", "is not in (0, 1]"),
        ("MODEL --budgets 0.0001", "use at least"),
        ("MODEL --group-heads 3", "do not divide"),
        ("MODEL --widths 8,4", "must start at 16"),
        ("MODEL --adapter ADAPTER --widths 16,0", "--group-heads and --widths are of a random adapter"),
        ("MODEL --adapter TMP/nowhere", "there is no adapter at"),
        ("TMP/nowhere", "nowhere"),
        ("MODEL --batch 0", "--batch 0 is too small"),
        ("MODEL --json TMP", "is a folder"),
        ("MODEL --plot TMP/latency.exe", "name a file that ends in .png"),
    ],
)
def test_mistakes_are_said_before_an_engine_starts(
    without_engine, tiny_model, make_adapter, tmp_path, capsys, options, reason
):
    log = without_engine()
    model = tiny_model("llama")
    for name, path in {"TMP": tmp_path, "ADAPTER": make_adapter(model, 1), "MODEL": model}.items():
        options = options.replace(name, str(path))
    assert main(["bench", *options.split()]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-mkv: error: ")]
    assert len(errors) == 1 and reason in errors[0]
    assert not log


def test_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr("vllm_mkv.evaluation.bench.find_spec", lambda name: None)
    assert bench() == 1
    error = capsys.readouterr().err
    assert "vLLM is not installed" in error and "pip install '.[cuda]' or '.[cpu]' in a clone of vllm-mkv" in error


def test_random_adapters_are_adapters(tmp_path):
    ModelShape.parse("3,8,4,32,64").save(tmp_path / "model", "bfloat16")
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(tmp_path / "model"))
    for group_heads, widths in ((None, (16, 8, 4, 2, 0)), (1, (16, 0))):
        made = random_adapter("shape", fingerprint, group_heads=group_heads, widths=widths)
        made.save(tmp_path / "adapter", "")
        loaded = Adapter.load(tmp_path / "adapter")
        loaded.check_model(fingerprint)
        assert loaded.config.group_heads == (group_heads or 4)
        assert loaded.path.widths == widths
        assert loaded.path.replay(0.5).budget() <= 0.5


def test_tables_and_plots_leave_out_what_was_not_measured(tmp_path):
    named = {"budget": 0.5, "bytes_per_token": 8}
    stock, _ = latency_row({"name": "stock", **named}, 1, {n: [(n, 1e-3 * n)] for n in (512, 1024)}, None)
    refused = refused_row({"name": "fp8", **named}, "[no]")
    assert refused.keys() == stock.keys()
    found = {"model": "m[b]", "dtype": "bfloat16", "batch": 1, "contexts": [512, 1024], "hardware": "an abacus"}
    found["adapter_digest"] = "0123"
    found["rows"] = [stock, refused]
    console = Console(file=io.StringIO(), width=120)
    print_latency(found, console)
    assert "fp8 was not measured, vLLM refuses it here: [no]" in console.file.getvalue()
    assert "latency of m[b], bfloat16" in console.file.getvalue()
    assert "differ" not in console.file.getvalue() and "random bases" not in console.file.getvalue()
    stock["contexts"][1]["most_ms"] *= 1.5
    print_latency(found, console)
    assert "Repeats differ from their median by up to 25%" in " ".join(console.file.getvalue().split())
    draw_latency(found, tmp_path / "latency.svg")
    drawn = (tmp_path / "latency.svg").read_text("utf-8")
    assert "<!-- stock -->" in drawn and "<!-- fp8 -->" not in drawn
