# SPDX-License-Identifier: Apache-2.0
"""Windows that quality is measured on, and that no step of making an adapter fits on.

They are the first ones in the order in which `vllm_mkv.fit.data.token_windows` draws windows, which text, seed and
context alone decide. Every step leaves as many of them alone as it measures on, and `HELD_OUT` at least: so steps of
equal text, seed and context fit on none that any of them measures on, however much each of them reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

HELD_OUT = 16
"""Windows that every step leaves alone, whether it measures or not; also, how many are measured on by default."""


def num_held_out(eval_windows: int) -> int:
    """Windows that a step leaves alone which measures on `eval_windows`."""
    return max(HELD_OUT, eval_windows)


def split_windows(windows: np.ndarray, eval_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows to fit on, and the `eval_windows` to measure on."""
    return windows[num_held_out(eval_windows) :], windows[:eval_windows]


def possible_overlap(
    made: dict[str, Any], text: Sequence[str], context: int, seed: int, eval_windows: int
) -> str | None:
    """Why windows to measure on may be among those that a step before this one fitted on; None where none is.

    Args:
        made: what the adapter says of the steps before, as `vllm_mkv.fit.calibrate.how_made` has it; empty for none.

    Raises:
        ValueError: they are, because an earlier step left fewer windows alone than this one measures on.
    """
    now = {"text": [str(name) for name in text], "seed": seed, "context": context}
    for command, step in _steps(made):
        if "held_out" not in step:
            return f"the `{command}` of an older version held other windows out"
        changed = [f"{name} {step[name]!r} and now {now[name]!r}" for name in now if step[name] != now[name]]
        if changed:
            return f"`{command}` was given {', '.join(changed)}"
        left = num_held_out(step["eval_windows"])
        if eval_windows > left:
            raise ValueError(
                f"--eval-windows {eval_windows}: `{command}` left the first {left} windows of this text alone and "
                f"fitted on those after them; use {left} at most, or measure on other text with vllm-mkv eval"
            )
        if not step["held_out"]:
            return f"`{command}` may have measured on windows that a step before it fitted on"
    return None


def measured_apart(made: dict[str, Any]) -> bool:
    """Whether no step fitted on the windows that the adapter's quality was measured on."""
    return bool(made) and all(step.get("held_out", False) for _, step in _steps(made))


def _steps(made: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if made:
        yield "calibrate", made
    for command in ("search", "train"):
        if command in made:
            yield command, made[command]
