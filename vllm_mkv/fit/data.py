# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens from text: local UTF-8 files, folders of them, or datasets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 1 << 16
"""Characters that are tokenised at once. Pieces of a file are drawn in random order."""
SHUFFLE_BUFFER = 1000
"""Rows of a streamed dataset among which the next one is drawn."""
MIN_CONTEXT = 2
PASSAGE, TOKENS_PER_REPEAT = 32, 256
"""Tokens of a passage that stands twice, and tokens of a window for each of these."""


def token_windows(text: Sequence[str], tokenizer: Any, *, num_windows: int, context: int, seed: int = 0) -> np.ndarray:
    """Windows that do not overlap, drawn at random and in equal shares from every source as long as it lasts.

    Fewer windows of the same text, context and seed are the first of more.

    Args:
        text: files, folders with .txt files, or datasets as `NAME[:CONFIG[:SPLIT]]`.
        tokenizer: of the model. Where it begins a text with tokens of its own (BOS), so does every window.
        num_windows: how many.
        context: tokens per window.
        seed: of the draw.

    Returns:
        int64 `[num_windows, context]`.

    Raises:
        ValueError: names the source that is missing, empty, not UTF-8 or shorter than a window, or says that all
            together are too short.
    """
    if not text:
        raise ValueError("no text to read; name a file, a folder or a dataset: --text FILE")
    check_context(context)
    sources = [_windows(name, tokenizer, context, seed) for name in text]
    turns = cycle(range(len(sources)))
    live = dict(enumerate(sources))
    windows: list[list[int]] = []
    while live and len(windows) < num_windows:
        turn = next(turns)
        if turn in live:
            found = next(live[turn], None)
            if found is None:
                del live[turn]
            else:
                windows.append(found)
    if len(windows) < num_windows:
        raise ValueError(
            f"{', '.join(text)}: {len(windows)} windows of {context} tokens, and {num_windows} are needed; "
            "add text, or ask for less of it (--tokens, --windows, --eval-windows) or for a shorter --context"
        )
    return np.array(windows, dtype=np.int64)


def check_context(context: int) -> None:
    """Raises ValueError where a window of so many tokens has none to predict."""
    if context < MIN_CONTEXT:
        raise ValueError(f"a context of {context} tokens has nothing to predict; use at least {MIN_CONTEXT}")


def _windows(name: str, tokenizer: Any, context: int, seed: int) -> Iterator[list[int]]:
    """Windows of one source. Raises ValueError at once where it cannot be read, and where it has not even one."""
    documents = _documents(name, seed)
    packed = _pack(documents, tokenizer, context)
    first = next(packed, None)
    if first is None:
        raise ValueError(f"{name} is shorter than one window of {context} tokens; use more text or a shorter --context")
    return _chain(first, packed)


def _chain(first: list[int], rest: Iterator[list[int]]) -> Iterator[list[int]]:
    yield first
    yield from rest


def _pack(documents: Iterator[str], tokenizer: Any, context: int) -> Iterator[list[int]]:
    """Consecutive windows of the documents' tokens, an end-of-text token between documents.

    Pieces of a file count as documents: in the order that they are drawn in, none goes on where the one before ended.
    """
    prefix = leading_tokens(tokenizer)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = context - len(prefix)
    pending: list[int] = []
    for document in documents:
        pending += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        full = len(pending) // size * size
        for start in range(0, full, size):
            yield prefix + pending[start : start + size]
        pending = pending[full:] + separator


def leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _documents(name: str, seed: int) -> Iterator[str]:
    path = Path(name).expanduser()
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path] if path.exists() else []
    if files:
        pieces = [piece for file in files for piece in _pieces(read_text(file))]
        random.Random(seed).shuffle(pieces)
        return iter(pieces)
    check_text(name)
    return _dataset(name, seed)


def check_text(name: str) -> None:
    """Raises ValueError where there is no such file, and the name is one of a file and not of a dataset."""
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix in (".txt", ".md", ".text")):
        raise ValueError(f"there is no file {name}; name a text file, a folder of .txt files or a dataset")


def read_text(file: Path) -> str:
    """Raises ValueError naming the file where it is unreadable, empty or not UTF-8."""
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text (byte {error.start}: {error.reason}); convert it: iconv -f FROM -t UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}); name a readable text file") from error
    if not text.strip():
        raise ValueError(f"{file} is empty; name a file with text")
    return text


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def _dataset(name: str, seed: int) -> Iterator[str]:
    """Texts of a dataset, `NAME[:CONFIG[:SPLIT]]`, streamed; the split is `train` unless named."""
    import datasets

    repository, *rest = name.split(":")
    config, split = (*rest, None, None)[:2]
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        first = next(iter(rows), None)
    except Exception as error:  # `datasets` raises many unrelated types for a name that leads nowhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = (
            f"{repository} holds no .txt files, and no dataset could be read from it"
            if Path(repository).is_dir()
            else f"there is no file {repository}, and no dataset of that name could be read"
        )
        raise ValueError(
            f"{what} ({reason}); name a text file, a folder of .txt files or a dataset as NAME[:CONFIG[:SPLIT]]"
        ) from error
    if first is None:
        raise ValueError(f"dataset {name} is empty; name one with rows")
    column = text_column(name, first)
    return (row[column] for row in rows if isinstance(row[column], str) and row[column].strip())


def text_column(name: str, row: dict[str, Any]) -> str:
    """Raises ValueError naming the columns where none is `text` and not exactly one holds strings."""
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise ValueError(f"dataset {name} has no column `text`, and its columns of strings are {strings}; name another")
    return strings[0]


def passage_places(context: int) -> int:
    """Of a window, whose first token is the tokenizer's own (BOS) where it has one."""
    return (context - 1) // PASSAGE


def check_repeats(share: float, context: int) -> None:
    """Raises ValueError where the share is not in [0, 1], or windows are too short for a passage to stand twice."""
    if not 0 <= share <= 1:
        raise ValueError(f"repeats in a share of {share:g} of the windows; give one in [0, 1]")
    if share and passage_places(context) < 2:
        raise ValueError(
            f"no passage of {PASSAGE} tokens stands twice in {context}; use a longer --context, or --repeats 0"
        )


def with_repeats(windows: np.ndarray, share: float, tokens: np.ndarray, seed: int) -> np.ndarray:
    """Windows in a share of which passages of random tokens stand twice, at random places.

    Text alone hardly asks a cache for what it cannot guess. To foretell such a passage's second appearance, it has to
    hold the first.

    Args:
        windows: int64 [windows, context].
        share: one that `check_repeats` lets pass.
        tokens: int64, what passages are drawn from.
    """
    if share == 0:
        return windows
    places = passage_places(windows.shape[1])
    repeats = max(1, windows.shape[1] // TOKENS_PER_REPEAT)
    rng, windows = np.random.default_rng(seed), windows.copy()
    for window in np.flatnonzero(rng.random(len(windows)) < share):
        starts = 1 + PASSAGE * rng.permutation(places)[: 2 * repeats].reshape(repeats, 2)
        passages = rng.choice(tokens, (repeats, PASSAGE))
        for both, passage in zip(starts, passages, strict=True):
            for start in both:
                windows[window, start : start + PASSAGE] = passage
    return windows


def batches(windows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive `size` windows at a time."""
    rows = iter(windows)
    while chunk := list(islice(rows, size)):
        yield np.stack(chunk)
