# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: where they lie, which are complete, and which one a run goes on from.

transformers writes a checkpoint in place, so that one that a kill cut short looks like any other. Here a checkpoint
counts once a file beside its own names them all with their sizes.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from vllm_mkv.output import write_json

ARGUMENTS_FILE = "arguments.json"
COMPLETE_FILE = "complete.json"
KEPT = 2

logger = logging.getLogger(__name__)


def checkpoint_folder(output: str | Path, checkpoints: str | Path | None) -> Path:
    """`checkpoints`, or else `output` with `.checkpoints` behind it."""
    return Path(checkpoints or f"{str(output).rstrip('/')}.checkpoints")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete or not, by their steps."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files are there, as long as they were when the last of them had been written."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text("utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    return [checkpoint for checkpoint in all_checkpoints(folder) if is_complete(checkpoint)]


def finish_checkpoint(checkpoint: Path) -> None:
    """Lets a checkpoint count whose files are all written."""
    write_json(checkpoint / COMPLETE_FILE, {file.name: file.stat().st_size for file in checkpoint.iterdir()})


def remove_others(folder: Path) -> None:
    """Removes checkpoints that are incomplete, and those that are complete but not among the last."""
    kept = complete_checkpoints(folder)[-KEPT:]
    for checkpoint in all_checkpoints(folder):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def write_arguments(folder: Path, given: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ARGUMENTS_FILE, given)


def choose_checkpoint(folder: Path, given: dict[str, Any], resume: bool) -> Path | None:
    """The last complete one of a run with the same arguments; None to start anew.

    Raises:
        ValueError: there is none to go on from, or it is of other arguments, or one is there and nobody asked for it.
    """
    found = all_checkpoints(folder)
    if not resume:
        if found:
            raise ValueError(f"{folder} has checkpoints; go on from them with --resume, or remove the folder")
        return None
    if not found:
        raise ValueError(f"{folder} has no checkpoint to go on from; start without --resume")
    check_arguments(folder, given)
    complete = complete_checkpoints(folder)
    last = complete[-1] if complete else None
    skipped = [checkpoint.name for checkpoint in found if last is None or step_of(checkpoint) > step_of(last)]
    if skipped and PartialState().is_main_process:
        goes_on = "starting anew" if last is None else f"going on from {last.name}"
        logger.warning("%s: %s incomplete and skipped; %s", folder, ", ".join(skipped), goes_on)
    return last


def check_arguments(folder: Path, given: dict[str, Any]) -> None:
    """Raises ValueError unless the checkpoints are of a run with these arguments; it may have had more."""
    file = folder / ARGUMENTS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {ARGUMENTS_FILE} to say what its checkpoints are of; remove the folder")
    before = json.loads(file.read_text("utf-8"))
    changed = [name for name in given if given[name] != before.get(name)]
    if changed:
        what = ", ".join(f"{name} was {before.get(name)!r} and is {given[name]!r}" for name in changed)
        raise ValueError(f"{folder} is of another run: {what}; give what was given then, or remove the folder")
