# SPDX-License-Identifier: Apache-2.0
"""No step fits on what any step measures; where that cannot be known, it is said."""

import json
import re

import numpy as np
import pytest

from vllm_mkv.adapter import CARD_FILE, Adapter
from vllm_mkv.fit import calibrate as calibrating
from vllm_mkv.fit import quality
from vllm_mkv.fit import search as searching
from vllm_mkv.fit import train as training
from vllm_mkv.fit.calibrate import calibrate
from vllm_mkv.fit.held_out import HELD_OUT, measured_apart, possible_overlap, split_windows
from vllm_mkv.fit.search import search
from vllm_mkv.fit.train import train

STEP = {"text": ["a.txt"], "seed": 0, "context": 64, "eval_windows": 16, "held_out": True}


@pytest.fixture
def seen(monkeypatch):
    """Windows by what they were read for, as tuples of tokens."""
    windows = {"fit": set(), "measured": set()}

    def spied(of_what, function, at):
        def call(*args, **kwargs):
            windows[of_what] |= set(map(tuple, args[at]))
            return function(*args, **kwargs)

        return call

    for module in (calibrating, searching):
        name = "attention_statistics"
        monkeypatch.setattr(module, name, spied("fit", getattr(module, name), 2))
    monkeypatch.setattr(training, "with_repeats", spied("fit", training.with_repeats, 0))
    # Of every step, what the quality in its card comes of.
    monkeypatch.setattr(calibrating, "measure", spied("measured", quality.measure, 1))
    return windows


@pytest.fixture
def long_text(tmp_path):
    """No two windows of it are equal."""
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(f"{number:05d}" for number in np.random.default_rng(0).permutation(40_000)[:6000]))
    return file


def test_no_step_fits_on_what_any_step_measures(tiny_model, long_text, tmp_path, seen):
    model, text, same = str(tiny_model("llama")), [str(long_text)], {"context": 48, "seed": 3}
    adapter = calibrate(model, text, tokens=6000, output=tmp_path / "a", eval_windows=2, **same)
    adapter, _ = search(adapter, text, tokens=1000, output=tmp_path / "b", eval_windows=16, **same)
    settings = {"steps": 2, "batch_size": 20, "budgets": (0.07, 0.25), "eval_windows": 0, "repeats": 0.0}
    adapter, _ = train(adapter, text, output=tmp_path / "c", **settings, **same)
    adapter, _ = search(adapter, text, tokens=500, output=tmp_path / "d", eval_windows=5, **same)
    assert len(seen["measured"]) == 16 and len(seen["fit"]) == 6000 // 48
    assert not seen["measured"] & seen["fit"]
    made = Adapter.load(tmp_path / "d").config.made
    assert [made[key] for key in ("seed", "eval_windows", "held_out")] == [3, 2, True]
    assert [made["search"][key] for key in ("seed", "eval_windows", "held_out")] == [3, 5, True]
    assert [made["train"][key] for key in ("seed", "eval_windows", "held_out")] == [3, 0, True]
    assert "that no step fitted on" in (tmp_path / "d" / CARD_FILE).read_text()


def test_another_seed_is_warned_of_and_the_card_says_so(tiny_model, make_adapter, text_file, tmp_path):
    before = Adapter.load(make_adapter(tiny_model("llama"), 2))
    settings = {"tokens": 512, "context": 128, "eval_windows": 2}
    with pytest.warns(UserWarning, match=r"`calibrate` was given seed 0 and now 1\. Give every step the same --text"):
        other, _ = search(before, [str(text_file)], output=tmp_path / "a", seed=1, **settings)
    assert "on some of which a step may have been fitted" in (tmp_path / "a" / CARD_FILE).read_text()
    # Nothing stays of a search that is done again.
    again, _ = search(other, [str(text_file)], output=tmp_path / "b", **settings)
    assert measured_apart(again.config.made)
    assert "that no step fitted on" in (tmp_path / "b" / CARD_FILE).read_text()


def test_as_many_windows_are_left_alone_whatever_is_measured():
    windows = np.arange(2 * HELD_OUT + 6).reshape(-1, 2)
    for eval_windows, fit in ((0, HELD_OUT), (3, HELD_OUT), (HELD_OUT + 1, HELD_OUT + 1)):
        found = split_windows(windows, eval_windows)
        assert np.array_equal(found[0], windows[fit:])
        assert np.array_equal(found[1], windows[:eval_windows])


@pytest.mark.parametrize(
    ("made", "now", "reason"),
    [
        ({}, {}, None),
        (STEP, {}, None),
        (STEP | {"eval_windows": 40}, {"eval_windows": 40}, None),
        (STEP, {"text": ["b.txt"]}, r"`calibrate` was given text \['a.txt'\] and now \['b.txt'\]"),
        (STEP, {"context": 32}, "`calibrate` was given context 64 and now 32"),
        (STEP | {"train": STEP | {"seed": 2}}, {}, "`train` was given seed 2 and now 0"),
        (STEP | {"search": STEP | {"held_out": False}}, {}, "`search` may have measured on windows that a step before"),
        ({"by": "vllm-mkv", "seed": 0}, {}, "the `calibrate` of an older version"),
    ],
)
def test_what_overlaps_is_told_by_how_the_adapter_was_made(made, now, reason):
    arguments = {"text": ["a.txt"], "context": 64, "seed": 0, "eval_windows": 16} | now
    found = possible_overlap(json.loads(json.dumps(made)), **arguments)
    assert found is None if reason is None else re.match(reason, found)


def test_more_windows_than_were_left_alone_are_refused():
    with pytest.raises(ValueError, match=r"--eval-windows 17: `search` left the first 16 windows .* use 16 at most"):
        possible_overlap({**STEP, "eval_windows": 32, "search": STEP}, ["a.txt"], 64, 0, 17)
