# SPDX-License-Identifier: Apache-2.0
"""Into how many parts decode cuts contexts, and which programs that makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mkv_kernels.layout import PageLayout, side_bytes

if TYPE_CHECKING:
    from mkv_kernels.fused.table import LayerTable, Shapes

MAX_SPLITS = 256
SPLITS = (1, 2, 3, *(step << octave for octave in range(6) for step in (4, 5, 6, 7)), MAX_SPLITS)
"""Parts that contexts may be cut into: in steps of a quarter or less beyond 4, so that programs fill most of a GPU
whatever the number of requests."""
LEAST_TOKENS = 256
"""A split of fewer costs more to combine than it saves."""


def work_of(layout: PageLayout, device: torch.device, splits: Sequence[int] = SPLITS) -> dict[int, torch.Tensor]:
    """By number of splits, the programs of a decode launch that cuts every group's context into as many.

    Whatever its rank, a group's program has as many tokens as any other's. One of few bytes per token waits less for
    memory, but executes as much; with splits in proportion to bytes, it was the longest (2 parts where others had 4: a
    launch took 1.3 to 1.6 times as long on an H100). Many programs share a multiprocessor, so that the bytes of all
    even out; the groups with most come first, so that what is left to wait for at the end is small.

    Shapes: [P, 4] int32 each: group, its split, its number of splits, and the group's value rank; all splits of a group
    one after the other.
    """
    sizes = [sum(side_bytes(side.widths, layout.itemsize) for side in (g.key, g.value)) for g in layout.groups]
    heavy_first = sorted(range(len(sizes)), key=lambda group: -sizes[group])
    order = torch.tensor([[group, layout.groups[group].value.rank] for group in heavy_first], dtype=torch.int32)
    work = {}
    for count in splits:
        group, rank = order.repeat_interleave(count, 0).unbind(1)
        split = torch.arange(count, dtype=torch.int32).repeat(len(order))
        work[count] = torch.stack([group, split, torch.full_like(group, count), rank], 1).to(device)
    return work


def visible_tokens(max_seq_len: int, max_queries: int, window: int) -> int:
    """Of a request of so many cached tokens, how many its queries see at most."""
    return min(max_seq_len, window + max_queries - 1) if window else max_seq_len


def choose_splits(table: LayerTable, num_requests: int, max_seq_len: int, num_processors: int) -> int:
    """Parts that contexts are cut into: one of `SPLITS`, from shapes alone.

    Args:
        max_seq_len: bound of the cached tokens that a request's queries see, see `visible_tokens`; a CUDA graph must be
            captured with the bound that it serves.
        num_processors: streaming multiprocessors of the device.
    """
    wanted = min(
        programs_per_processor(table.shapes) * num_processors / (num_requests * table.num_groups),
        max_seq_len / LEAST_TOKENS,
        MAX_SPLITS,
    )
    return max(splits for splits in SPLITS if splits <= max(1, wanted))


def programs_per_processor(shapes: Shapes) -> int:
    """Programs of decode that a streaming multiprocessor has registers and shared memory for; of `integer`, as many as
    were fastest on an H200 among powers of two (12 of 168 registers would fit where 8 are taken)."""
    if shapes.integers is not None:
        return 16 if shapes.integers.is_small else 8
    if shapes.operands is not None:
        return 8 if shapes.coded else 4
    if shapes.coded:
        return max(1, 8 // shapes.warps)
    return 4 if shapes.value.columns <= 128 else 2
