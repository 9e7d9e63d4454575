# SPDX-License-Identifier: Apache-2.0
"""What attention needs to know of a step, built once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

MAX_SCORES = 1 << 24
"""Scores per query head that one bucket may hold: bounds the mask and the gathered pages of a long prefill."""
LEAST_STRETCH = 64
"""Queries behind a window shorter than that are not cut further."""


@dataclass(frozen=True)
class Bucket:
    """Requests, or a stretch of one request's queries, that attend together, padded to common lengths.

    Cached tokens are counted from the first page on that one of the queries sees anything of: with a window, pages
    before it are not read.

    Shapes, with B requests, Q queries each and L cached tokens each:
        blocks: [B, ceil(L / block_size)] int64, 0 where a request has no block
        unused: [B, L - first_unused, 1] bool, cached positions from `first_unused` on that hold no token of the
            request; None where the requests are equally long
        mask:   [B, 1, Q, L], added to the scores: 0 where a query sees a cached token, else minus infinity; None where
            L = Q and query i sees tokens 0 to i
        tokens: [N] int64, tokens of the step that are computed here
        rows:   [N] int64, their rows among the B * Q; None where they are all rows in order
        gather: [B * Q] int64, the token whose query fills each row
    """

    blocks: torch.Tensor
    unused: torch.Tensor | None
    first_unused: int
    mask: torch.Tensor | None
    tokens: torch.Tensor
    rows: torch.Tensor | None
    gather: torch.Tensor
    num_queries: int
    length: int


@dataclass(frozen=True)
class Decodes:
    """Queries that attend one by one: those of the requests that have few of them.

    Shapes:
        requests, tokens, lengths: [queries] int64, row of the block table, token of the step, and cached tokens up to
            it, its own included: all that it sees where there is no window
        block_table: [num_reqs, blocks] int32
    """

    requests: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    max_length: int
    block_table: torch.Tensor


def split_decodes(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, max_queries: int
) -> tuple[Decodes | None, list[int]]:
    """The queries of requests that have at most `max_queries`, and the other requests; arguments as `make_buckets`."""
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    counts = [stop - start for start, stop in pairwise(starts)]
    few = [request for request, count in enumerate(counts) if 0 < count <= max_queries]
    many = [request for request, count in enumerate(counts) if count > max_queries]
    if not few:
        return None, many
    queries = [(request, query) for request in few for query in range(counts[request])]
    lengths = [lens[request] - counts[request] + query + 1 for request, query in queries]
    decodes = Decodes(
        requests=torch.tensor([request for request, _ in queries]),
        tokens=torch.tensor([starts[request] + query for request, query in queries]),
        lengths=torch.tensor(lengths),
        max_length=max(lengths),
        block_table=block_table,
    )
    return decodes, many


def make_buckets(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    max_scores: int = MAX_SCORES,
    requests: list[int] | None = None,
    window: int = 0,
) -> list[Bucket]:
    """Buckets requests of like lengths, so that padding stays below a factor of two in queries and in context.

    Args:
        query_start_loc: [num_reqs + 1] int, on the CPU.
        seq_lens: [num_reqs] int, on the CPU; cached tokens of each request, this step's included.
        block_table: [num_reqs, blocks] int, on the device of the cache.
        block_size: tokens per page.
        dtype: of queries and cache, which the masks get.
        max_scores: see MAX_SCORES.
        requests: those to bucket; None for all.
        window: tokens that a query sees, its own included; 0 for all that come before it.
    """
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    by_size: dict[tuple[int, int], list[Stretch]] = {}
    for request in range(len(lens)) if requests is None else requests:
        seq_len = lens[request]
        start, stop = starts[request], starts[request + 1]
        # A stretch of queries sees nothing after its last one, so long prefills are cut into stretches.
        stride = max(1, max_scores // max(seq_len, 1))
        if window:
            # Nor anything before its first one's window.
            stride = min(stride, max(window, LEAST_STRETCH))
        for first in range(start, stop, stride):
            last = min(first + stride, stop)
            context = seq_len - (stop - last)
            skipped = max(0, context - (last - first) - window + 1) // block_size if window else 0
            context -= skipped * block_size
            size = ((last - first - 1).bit_length(), (-(-context // block_size) - 1).bit_length())
            by_size.setdefault(size, []).append((request, first, last - first, skipped, context))
    buckets = []
    for stretches in by_size.values():
        per_stretch = max(count for _, _, count, *_ in stretches) * max(context for *_, context in stretches)
        at_once = max(1, max_scores // per_stretch)
        for i in range(0, len(stretches), at_once):
            buckets.append(_make_bucket(stretches[i : i + at_once], block_table, block_size, dtype, window))
    return buckets


Stretch = tuple[int, int, int, int, int]
"""Request; first query, as token of the step; queries; pages before all that they see; tokens from there on."""


def _make_bucket(
    stretches: list[Stretch], block_table: torch.Tensor, block_size: int, dtype: torch.dtype, window: int
) -> Bucket:
    device = block_table.device
    request, first, count, skipped, context = (torch.tensor(column) for column in zip(*stretches, strict=True))
    num_queries, length, first_unused = int(count.max()), int(context.max()), int(context.min())
    page = torch.arange(-(-length // block_size))
    in_use = page * block_size < context[:, None]
    places = torch.where(in_use, skipped[:, None] + page, 0)
    blocks = block_table[request[:, None].to(device), places.to(device)].long()
    # Rows beyond a stretch's queries repeat its last one, so that no row is without a key to attend to.
    query = torch.minimum(torch.arange(num_queries), count[:, None] - 1)
    position = torch.arange(length)
    mask = unused = rows = None
    if num_queries != length or first_unused != length or 0 < window < length:
        last_seen = ((context - count)[:, None] + query)[:, :, None]
        sees = position <= last_seen
        if window:
            sees &= position > last_seen - window
        mask = torch.where(sees, 0.0, -torch.inf)[:, None].to(device, dtype)
    if first_unused != length:
        unused = (position[first_unused:] >= context[:, None])[:, :, None].to(device)
    gather = (first[:, None] + query).flatten()
    if int(count.min()) < num_queries:
        rows = (torch.arange(num_queries) < count[:, None]).flatten().nonzero()[:, 0]
    return Bucket(
        blocks=torch.where(in_use.to(device), blocks, 0),
        unused=unused,
        first_unused=first_unused,
        mask=mask,
        tokens=(gather if rows is None else gather[rows]).to(device),
        rows=None if rows is None else rows.to(device),
        gather=gather.to(device),
        num_queries=num_queries,
        length=length,
    )
