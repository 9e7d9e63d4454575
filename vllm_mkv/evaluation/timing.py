# SPDX-License-Identifier: Apache-2.0
"""When which engine takes how many decode steps, so that noise of the machine hits all caches alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from vllm_mkv.progress import progress

DEFAULT_CONTEXTS = (512, 1024, 2048, 4096)
TOKENS_PER_STEP = 2048
"""That a step of prefill takes, where the batch is not larger; decoding takes far fewer."""
REFUSALS = (ValueError, NotImplementedError, RuntimeError)
"""What vLLM says a cache with that it does not serve here."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Per context `warmup` windows that do not count and `repeats` that do, of `output_len` tokens per request each.

    Prompts are shorter than the context by as much as puts the windows that count around it.
    """

    contexts: tuple[int, ...]
    batch: int
    output_len: int
    repeats: int
    warmup: int
    seed: int

    @classmethod
    def make(cls, contexts: Sequence[int] | None, positions: int, **counts: int) -> Schedule:
        """Contexts are put in order; None is for those of `DEFAULT_CONTEXTS` that fit.

        Args:
            positions: tokens of a request that the model takes.

        Raises:
            ValueError: a number is too small, a context too long for the model, or there are fewer than two.
        """
        found = cls(contexts=tuple(sorted(set(contexts or DEFAULT_CONTEXTS))), **counts)
        found._check_counts()
        if contexts is None:
            fitting = tuple(c for c in found.contexts if found.prompt_len(c) > 0 and found.longest(c) <= positions)
            found = cls(contexts=fitting, **counts)
        if len(found.contexts) < 2:
            raise ValueError(
                f"{len(found.contexts)} contexts give no line, which takes two or more; name them: --contexts 256 1024"
            )
        for context in found.contexts:
            if found.prompt_len(context) < 1:
                raise ValueError(
                    f"a context of {context} tokens has no room around it for {counts['warmup']} + {counts['repeats']} "
                    f"windows of {counts['output_len']} tokens; use --contexts from {1 - found.prompt_len(0)} on, or "
                    "smaller --output-len, --repeats or --warmup"
                )
            if found.longest(context) > positions:
                beyond = found.longest(context) - context
                raise ValueError(
                    f"a context of {context} tokens, with the {beyond} that are written after it, is more than the "
                    f"model's {positions}; use --contexts up to {max(0, positions - beyond)}"
                )
        return found

    def _check_counts(self) -> None:
        for option, value, least in (
            ("--contexts", self.contexts[0], 1),
            ("--batch", self.batch, 1),
            ("--output-len", self.output_len, 2),
            ("--repeats", self.repeats, 1),
            ("--warmup", self.warmup, 0),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{option} {value} is too small; use at least {least}")

    @property
    def num_windows(self) -> int:
        return self.warmup + self.repeats

    @property
    def tokens_per_step(self) -> int:
        """Of prompts and new ones, that the engine is to take."""
        return max(TOKENS_PER_STEP, 2 * self.batch)

    def prompt_len(self, context: int) -> int:
        return context - self.warmup * self.output_len - self.repeats * self.output_len // 2

    def max_tokens(self, context: int) -> int:
        """More than any request is given: the windows' and, of the first requests, those while others are prefilled."""
        prefill_steps = -(-self.batch * self.prompt_len(context) // (self.tokens_per_step - self.batch))
        return self.num_windows * self.output_len + prefill_steps + 4

    def longest(self, context: int) -> int:
        return self.prompt_len(context) + self.max_tokens(context)

    def prompts(self, context: int, vocab_size: int) -> np.ndarray:
        """int64 [batch, tokens], the same for every cache."""
        rng = np.random.default_rng((self.seed, context))
        return rng.integers(vocab_size, size=(self.batch, self.prompt_len(context)))


class Stepper(Protocol):
    """As in vllm_mkv.serving.stepper."""

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def prefill(self, prompts: np.ndarray, num_tokens: int) -> None: ...

    def decode(self, num_steps: int) -> Any: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Cache:
    """One that an engine is started with.

    bytes_per_token: from the tokens per page, which vLLM may choose.
    settings: those of `vllm_mkv.serving.stepper.running_stepper` that make it this cache.
    may_be_refused: then it is measured where vLLM serves it; any other has to start.
    """

    name: str
    bytes_per_token: Callable[[int], int]
    settings: Mapping[str, Any]
    may_be_refused: bool = False


@dataclass
class Timings:
    """Of one cache.

    refused: what vLLM said, where it did not start.
    block_size: tokens per page.
    windows: per context, of every repeat the cached tokens per request and the seconds between two tokens.
    """

    refused: str | None
    block_size: int
    windows: dict[int, list[tuple[float, float]]]


Start = Callable[[Cache], AbstractContextManager[Stepper]]


def time_caches(schedule: Schedule, caches: Sequence[Cache], start: Start, *, interleaved: bool) -> list[Timings]:
    """Starts the engines, all at once where they are `interleaved`, else one after another, and times them."""
    found: dict[int, Timings] = {}
    # A start that fails takes along the process groups that engines of a process share: it comes before all others.
    order = sorted(range(len(caches)), key=lambda number: not caches[number].may_be_refused)
    what = f"engines timed at {len(schedule.contexts)} contexts: {len(caches)}"
    total = len(caches) * len(schedule.contexts) * schedule.num_windows
    with progress(what, total=total, unit="window") as bar:
        for group in [order] if interleaved else [[number] for number in order]:
            with ExitStack() as running:
                steppers: dict[int, Stepper] = {}
                for number in group:
                    bar.set_postfix_str(f"starting {caches[number].name}")
                    try:
                        steppers[number] = running.enter_context(start(caches[number]))
                    except REFUSALS as error:
                        if not caches[number].may_be_refused:
                            raise
                        found[number] = Timings(" ".join(str(error).split()) or type(error).__name__, 0, {})
                        bar.update(len(schedule.contexts) * schedule.num_windows)
                for number, stepper in steppers.items():
                    found[number] = Timings(None, stepper.block_size, {})
                for context in schedule.contexts:
                    bar.set_postfix_str(f"context {context}")
                    for number, windows in _in_turns(schedule, context, steppers, bar).items():
                        found[number].windows[context] = windows
    return [found[number] for number in range(len(caches))]


def _in_turns(
    schedule: Schedule, context: int, steppers: Mapping[int, Stepper], bar: tqdm
) -> dict[int, list[tuple[float, float]]]:
    """Every engine takes a window before any takes its next."""
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in steppers}
    for stepper in steppers.values():
        stepper.prefill(schedule.prompts(context, stepper.vocab_size), schedule.max_tokens(context))
    for window in range(schedule.num_windows):
        for number, stepper in steppers.items():
            timed = stepper.decode(schedule.output_len)
            if window >= schedule.warmup:
                found[number].append((timed.cached, timed.seconds))
            bar.update()
    for stepper in steppers.values():
        stepper.release()
    return found
