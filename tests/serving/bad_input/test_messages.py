# SPDX-License-Identifier: Apache-2.0
"""Of an engine that does not start the user sees one message, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_only_this_errors_traceback_is_held_back(capsys, monkeypatch):
    from vllm_mkv.serving import compat

    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *raised: seen.append(raised))
    error = ValueError("the cause\nand the mend")
    compat.print_without_traceback(error)
    sys.excepthook(ValueError, error, None)
    assert capsys.readouterr().err == "vllm-mkv: error: the cause and the mend\n"
    assert not seen
    own = KeyError("the user's own bug")
    own.__context__ = error
    sys.excepthook(KeyError, own, None)
    assert seen == [(KeyError, own, None)]
    assert capsys.readouterr().err == ""


def serve(model: Path, *arguments: str) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm),
        "serve",
        str(model),
        "--port",
        "1",
        "--max-model-len",
        "256",
        "--attention-backend",
        "mkv",
        *arguments,
    ]


def script(model: Path, **options: Any) -> list[str]:
    code = f"from vllm import LLM\nLLM({str(model)!r}, max_model_len=256, attention_backend='mkv', **{options!r})"
    return [sys.executable, "-c", code]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda model: serve(model), "no adapter was named and "),
        (
            lambda model: serve(model, "--kv-cache-dtype", "fp8"),
            "--kv-cache-dtype fp8 is not supported with --attention-backend mkv; leave --kv-cache-dtype at auto",
        ),
        (
            lambda model: script(model, additional_config={"mkv": {"budgett": 0.5}}),
            "--additional-config: unknown mkv option 'budgett'; known are: adapter, revision, budget, allocation",
        ),
    ],
    ids=["serve without an adapter", "serve with fp8 pages", "LLM with a misspelt option"],
)
def test_a_process_ends_with_the_message_alone(model, command, message):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ran = subprocess.run(command(model), capture_output=True, text=True, timeout=600, env=environment)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 1, output
    assert ran.stderr.count(f"vllm-mkv: error: {message}") == 1, output
    assert output.count(message) == 1, output
    assert "Traceback" not in output, output
    assert ran.stderr.splitlines()[-1].startswith("vllm-mkv: error: "), output
