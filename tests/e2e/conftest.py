# SPDX-License-Identifier: Apache-2.0
"""Commands of this environment as a user starts them, with nothing of theirs left running afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

SECONDS = 300


def environment(home: Path) -> dict[str, str]:
    """The user's, with nothing of other tests, without a network and with a Hugging Face cache of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "HF_"))}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "VLLM_NO_USAGE_STATS"), "1")
    return own | offline | {"HF_HOME": str(home), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Command:
    """A command of this environment in an empty folder, and in a process group of its own."""

    def __init__(self, folder: Path, command: tuple[str, ...], **variables: str) -> None:
        self.log = folder / "log.txt"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name(command[0])), *command[1:]],
                cwd=folder,
                env=environment(folder / "huggingface") | variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def finish(self) -> str:
        """What it printed, after it has ended well."""
        assert self.process.wait(SECONDS) == 0, self.said
        return self.said

    def stop(self) -> None:
        """The whole process group, kindly at first; one that has ended may have left children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)


@pytest.fixture
def start_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """`start_command("vllm", "serve", .., VARIABLE="..")`: a Command that runs, and is stopped after the test."""
    with ExitStack() as running:

        def start(*command: str, **variables: str) -> Command:
            started = Command(tmp_path_factory.mktemp("command"), command, **variables)
            running.callback(started.stop)
            return started

        yield start
