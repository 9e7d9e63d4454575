# SPDX-License-Identifier: Apache-2.0
"""Mistakes in arguments are told in a line, before torch is loaded; a log says what a command is at."""

import inspect
import subprocess
import sys

import pytest

from vllm_mkv import arguments, cli, commands
from vllm_mkv.arguments import check_model
from vllm_mkv.progress import progress


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("calibrate MODEL --text TEXT --output TMP/out --tokens 0", "--tokens 0 is too small; use at least 1"),
        ("calibrate MODEL --text TEXT --output TMP/out --context 0", "--context 0 is too small; use at least 2"),
        ("calibrate MODEL --text TEXT --output TMP/out --context 1", "--context 1 is too small; use at least 2"),
        ("calibrate MODEL --text TEXT --output TMP/out --eval-windows -1", "--eval-windows -1 is too small; use at le"),
        ("calibrate MODEL --text TMP/none.txt --output TMP/out", "there is no file TMP/none.txt"),
        ("calibrate TEXT --text TEXT --output TMP/out", "TEXT is a file; name the folder of a model"),
        ("calibrate TMP/typo --text TEXT --output TMP/out", "there is no model at TMP/typo"),
        ("eval TMP/typo --text TEXT", "there is no model at TMP/typo"),
        ("bench TEXT", "TEXT is a file; name the folder of a model"),
        ("search ADAPTER --text TEXT --output TMP/out --shards 0", "--shards 0 is too small"),
        ("search ADAPTER --text TEXT --output TMP/out --widths 16,5,0", "must start at 16"),
        ("train ADAPTER --text TEXT --output TMP/out --steps 0", "--steps 0 is too small"),
        ("train ADAPTER --text TEXT --output TMP/out --steps 9 --budgets 0.1 25", "budget 25 is not in (0, 1]"),
        ("eval MODEL --text TEXT --budgets 25", "budget 25 is not in (0, 1]"),
        ("eval MODEL --text TEXT --against int4,int5", "'int5' is no cache to compare with"),
        ("eval MODEL --text TEXT --windows 0", "--windows 0 is too small"),
        ("bench MODEL --budgets 2", "budget 2 is not in (0, 1]"),
        ("check ADAPTER MODEL --tokens 0", "--tokens 0 is too small"),
    ],
)
def test_mistakes_are_found_before_a_command_runs(command, reason, text_file, tmp_path, capsys, monkeypatch):
    for name in ("calibrate", "train", "search", "evaluate", "bench", "check"):
        monkeypatch.setattr(commands, name, lambda args: pytest.fail("it ran"))
    names = {"TMP": str(tmp_path), "TEXT": str(text_file)}
    for name, path in names.items():
        command, reason = command.replace(name, path), reason.replace(name, path)
    assert cli.main(command.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-mkv: error: ")
    assert reason in line


def test_checking_arguments_loads_no_torch():
    code = (
        "import sys; from vllm_mkv.cli import main; main(['calibrate', 'm', '--text', 't.txt', '--output', 'o']); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is no file t.txt" in done.stderr


def test_names_of_models_that_cannot_be(tmp_path, tiny_model, make_adapter):
    adapter = make_adapter(tiny_model("llama"), 1)
    for name in ("./typo", "/no/where", "~/no-such-model"):
        with pytest.raises(ValueError, match=f"^there is no model at {name};"):
            check_model(name)
    with pytest.raises(ValueError, match=r"is an adapter; name its model$"):
        check_model(str(adapter))
    with pytest.raises(ValueError, match=r"holds no config.json, so it is no model"):
        check_model(str(tmp_path))
    check_model(str(tiny_model("llama")))
    check_model("somebody/somemodel")


def test_a_name_that_the_hub_does_not_know_is_told(monkeypatch):
    from vllm_mkv.fit import model

    def unknown(name, **settings):
        raise OSError(f"{name} is not a valid model identifier\nand much more")

    monkeypatch.setattr(model.AutoConfig, "from_pretrained", unknown)
    reason = r"there is no folder nope/typo, and the Hub gave no model of that name \(nope/typo is not a valid"
    with pytest.raises(ValueError, match=reason):
        _ = model.Source("nope/typo").config


def test_names_to_compare_with_are_those_of_the_caches():
    from vllm_mkv.evaluation.rivals import RIVALS

    assert tuple(RIVALS) == arguments.AGAINST


def test_defaults_of_options_are_those_of_the_functions():
    from vllm_mkv.evaluation.bench import benchmark
    from vllm_mkv.evaluation.evaluate import evaluate
    from vllm_mkv.fit.calibrate import calibrate
    from vllm_mkv.fit.check import full_rank_exactness
    from vllm_mkv.fit.search import search
    from vllm_mkv.fit.train import train

    functions = {
        "calibrate": calibrate, "search": search, "train": train, "eval": evaluate, "bench": benchmark,
        "check": full_rank_exactness,
    }  # fmt: skip
    renamed = {"windows": "num_windows", "json": "json_file"}
    (subparsers,) = (action for action in cli.parser()._actions if action.dest == "command")
    compared = 0
    for command, function in functions.items():
        parameters = inspect.signature(function).parameters
        for action in subparsers.choices[command]._actions:
            name = action.dest if action.dest in parameters else renamed.get(action.dest, "")
            if name in parameters and parameters[name].default is not inspect.Parameter.empty:
                assert action.default == parameters[name].default, (command, action.dest)
                compared += 1
    assert compared > 60


def test_every_option_says_what_it_is_and_what_without_it():
    (subparsers,) = (action for action in cli.parser()._actions if action.dest == "command")
    for command, sub in subparsers.choices.items():
        for action in sub._actions:
            assert action.help and len(action.help.split()) > 2, (command, action.dest)
            if action.option_strings and not action.required and action.dest not in ("help", "shape"):
                assert "(default: " in action.help, (command, action.dest)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_line_in_a_log_and_a_bar_on_a_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress("statistics: 3 windows", total=3, unit="window") as bar:
        for _ in range(3):
            bar.update()
    shown = capsys.readouterr().err
    assert ("3/3" in shown) == terminal
    assert (shown == "statistics: 3 windows\n") != terminal
