# SPDX-License-Identifier: Apache-2.0
"""Mistakes in arguments that show without torch, which takes long to load, and without reading a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mkv.adapter import CONFIG_FILE
from vllm_mkv.allocation import check_budget, check_width_ladder
from vllm_mkv.fit.data import MIN_CONTEXT, check_text

LEAST = {
    "tokens": 1,
    "steps": 1,
    "windows": 1,
    "eval_windows": 0,
    "context": MIN_CONTEXT,
    "seed": 0,
    "group_heads": 1,
    "shards": 1,
    "batch_size": 1,
    "accumulate": 1,
    "save_steps": 1,
}
"""The least that options may be which count something, by the names of their arguments."""
AGAINST = (
    "fp8", "int8", "int4", "int3", "int2", "turboquant4", "turboquant3", "turboquant2", "turboquant4_nc",
    "turboquant3_nc", "turboquant2_nc",
)  # fmt: skip
"""Names of `vllm_mkv.evaluation.rivals.RIVALS`."""


def check_arguments(given: dict[str, Any]) -> None:
    """Raises ValueError, naming the option and the mend, for what no model and no text could make right.

    Args:
        given: options by the names of their arguments; None is what was not given.
    """
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; use at least {least}")
    for budget in given.get("budgets") or ():
        check_budget(budget)
    if given.get("widths") is not None:
        check_width_ladder(given["widths"])
    check_against(given.get("against") or ())
    for name in given.get("text") or ():
        check_text(name)
    if given.get("model") is not None:
        check_model(given["model"])
    # Of `eval` and `bench`, which take an adapter as well.
    subject = given.get("subject") or given.get("name")
    if subject is not None and not (Path(subject).expanduser() / CONFIG_FILE).exists():
        check_model(subject)


def check_against(names: Sequence[str]) -> None:
    """Raises ValueError where a name is that of no cache to compare with."""
    if unknown := [name for name in names if name not in AGAINST]:
        raise ValueError(f"{unknown[0]!r} is no cache to compare with; known are {','.join(AGAINST)}")


def check_model(name: str) -> None:
    """Raises ValueError where a name can be no model's: neither a folder's with one, nor a repository's on the Hub."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{name} is a file; name the folder of a model, or a Hub repository")
    if not path.exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"there is no model at {name}; name a folder, or a Hub repository")
    if (path / CONFIG_FILE).exists():
        raise ValueError(f"{name} is an adapter; name its model")
    if path.exists() and not (path / "config.json").exists():
        raise ValueError(f"{name} holds no config.json, so it is no model; name a folder of one, or a Hub repository")
