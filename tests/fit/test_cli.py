# SPDX-License-Identifier: Apache-2.0
"""The command line: its options, what it prints, how it fails."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_mkv import __version__
from vllm_mkv.cli import main, parser

OPTIONS = {
    "bench": {
        "--adapter", "--allocation", "--batch", "--budgets", "--compilation-config", "--contexts", "--dtype", "--eager",
        "--group-heads", "--json", "--mkv-kernels", "--one-at-a-time", "--output-len", "--plot", "--repeats",
        "--revision", "--seed", "--shape", "--trust-remote-code", "--warmup", "--widths", "MODEL|ADAPTER",
    },
    "calibrate": {
        "--basis", "--context", "--device", "--dtype", "--eval-windows", "--group-heads", "--output", "--revision",
        "--seed", "--text", "--tokens", "--trust-remote-code", "MODEL",
    },
    "check": {"--device", "--revision", "--tokens", "--trust-remote-code", "ADAPTER", "MODEL"},
    "eval": {
        "--adapter", "--against", "--allocation", "--budgets", "--context", "--device", "--dtype", "--engine", "--json",
        "--model", "--plot", "--revision", "--seed", "--text", "--trust-remote-code", "--windows", "MODEL|ADAPTER",
    },
    "info": {"--budget", "--plot", "ADAPTER"},
    "search": {
        "--context", "--device", "--dtype", "--eval-windows", "--model", "--output", "--revision", "--seed", "--shards",
        "--text", "--tokens", "--trust-remote-code", "--widths", "ADAPTER",
    },
    "train": {
        "--accumulate", "--batch-size", "--budgets", "--checkpoints", "--context", "--cross-entropy", "--device",
        "--dtype", "--eval-windows", "--form", "--json", "--learning-rate", "--model", "--output", "--plot",
        "--repeats", "--report-to", "--resume", "--revision", "--save-steps", "--seed", "--spread", "--steps", "--text",
        "--trust-remote-code", "ADAPTER",
    },
}  # fmt: skip


def test_the_options_are_these_and_no_others():
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    found = {
        name: {(action.option_strings or [action.metavar])[-1] for action in sub._actions} - {"--help"}
        for name, sub in commands.choices.items()
    }
    assert found == OPTIONS


def test_importing_the_package_and_the_command_is_light():
    code = "import sys, vllm_mkv.cli; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_preparing_a_model_never_imports_vllm():
    code = "import sys, vllm_mkv.fit.search, vllm_mkv.fit.check; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_info_needs_no_torch(tiny_model, make_adapter):
    folder = make_adapter(tiny_model("llama"), 1)
    code = (
        f"import sys; from vllm_mkv.cli import main; main(['info', {str(folder)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-mkv {__version__}"


def test_info_prints_bytes_and_ranks_and_draws(tiny_model, make_adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    folder = make_adapter(tiny_model("llama"), 1)
    plot = tmp_path / "ranks.png"
    assert main(["info", str(folder), "--budget", "0.5", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "768 instead of 1,536" in out
    assert "0.5 asked, 0.5000 reached" in out
    assert "16 16 16 16" in out
    assert "16/16.0/16" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_calibrate_then_check(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    model, output = str(tiny_model("llama")), str(tmp_path / "adapter")
    command = ["calibrate", model, "--text", str(text_file), "--tokens", "1000", "--context", "64", "--output", output]
    assert main([*command, "--basis", "pca", "--group-heads", "2", "--eval-windows", "2"]) == 0
    out = capsys.readouterr().out
    assert "measured quality" in out
    lines = [line.strip() for line in out.splitlines()]
    search = lines.index(f"vllm-mkv search {output} --text {text_file} --context 64 --output {output}")
    options = f'{{"mkv": {{"adapter": "{output}", "budget": 0.5}}}}'
    serve = f"vllm serve {model} --attention-backend mkv --additional-config '{options}'"
    memory = "" if torch.cuda.is_available() else " --kv-cache-memory-bytes 268435456"
    assert lines.index(serve + memory) > search
    assert main(["check", output, model, "--tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert "fits: " in out
    assert "exact: " in out
    other = str(tiny_model("mistral"))
    assert main(["check", output, other]) == 1
    assert "architecture is 'MistralForCausalLM', not 'LlamaForCausalLM'" in capsys.readouterr().err


@pytest.mark.parametrize("trust", [False, True])
def test_revision_and_trust_go_to_whatever_reads_the_model(tiny_model, text_file, tmp_path, monkeypatch, trust):
    from vllm_mkv.fit import model as loading

    asked = set()
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(loading, name)

        def read(path, *args, name=name, real=kind.from_pretrained, **settings):
            asked.add((name, settings["revision"], settings["trust_remote_code"]))
            return real(path, *args, **settings)

        monkeypatch.setattr(kind, "from_pretrained", read)
    command = f"calibrate {tiny_model('llama')} --text {text_file} --tokens 128 --context 64 --eval-windows 0"
    options = ["--revision", "branch", *["--trust-remote-code"] * trust]
    assert main([*command.split(), "--output", str(tmp_path / "adapter"), *options]) == 0
    assert asked == {(name, "branch", trust) for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")}


def test_check_fails_where_full_rank_is_not_exact(tiny_model, make_adapter, capsys, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("vllm_mkv.fit.check.TOLERANCE", 1e-12)
    assert main(["check", str(make_adapter(model, 2)), str(model)]) == 1
    assert "full rank is not exact" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, reason",
    [
        ("info TMP/nowhere", "there is no adapter at"),
        ("info TMP", "holds no adapter_config.json"),
        ("info ADAPTER --budget 0", "is not in (0, 1]"),
        ("info ADAPTER --budget nan", "is not in (0, 1]"),
        ("info ADAPTER --budget 0.1", "use at least 0.5"),
        ("info ADAPTER --plot TMP/no/folder.png", "there is no folder"),
        ("info ADAPTER --plot TMP/ranks.exe", "name a file that ends in .png"),
        ("check ADAPTER TMP/nowhere", "there is no model at TMP/nowhere"),
        (
            "check ADAPTER MODEL --tokens 4096",
            "more than the model's longest context; use 2048 at most",
        ),
        ("calibrate TMP/nowhere --text TEXT --output TMP/out", "there is no model at TMP/nowhere"),
        ("calibrate MODEL --text TMP/none.txt --output TMP/out", "there is no file"),
        ("calibrate MODEL --text TEXT --output TEXT", "is a file; name a folder"),
        ("calibrate MODEL --text TEXT --tokens 100 --context 64 --group-heads 3 --output TMP/out", "do not divide"),
    ],
)
def test_mistakes_are_one_line_and_status_1(tiny_model, make_adapter, text_file, tmp_path, capsys, command, reason):
    model = tiny_model("llama")
    names = {"TMP": tmp_path, "ADAPTER": make_adapter(model, 1), "MODEL": model, "TEXT": text_file}
    for name, path in names.items():
        command, reason = command.replace(name, str(path)), reason.replace(name, str(path))
    assert main(command.split()) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-mkv: error: ")]
    assert len(errors) == 1
    assert reason in errors[0]


def test_an_interruption_is_status_130(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_mkv.adapter.locate", interrupt)
    assert main(["info", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "vllm-mkv")
    done = subprocess.run([command, "info", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vllm-mkv: error: there is no adapter at /nowhere")
    assert "Traceback" not in done.stderr


def test_warnings_are_lines_of_their_own(monkeypatch, capsys):
    import warnings

    from vllm_mkv import cli, commands

    def warn(args):
        for message, file in (("mind the gap", commands.__file__), ("a library's own", "/elsewhere/library.py")):
            warnings.warn_explicit(message, UserWarning, file, 7)
        return 0

    monkeypatch.setattr(commands, "info", warn)
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: others.append(str(message))
        assert cli.main(["info", "somewhere"]) == 0
    assert capsys.readouterr().err == "vllm-mkv: warning: mind the gap\n"
    assert others == ["a library's own"]
