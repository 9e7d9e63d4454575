# SPDX-License-Identifier: Apache-2.0
"""Which requests of a step have their pages expanded together, and where those go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

BLOCK_SIZE = 16


@pytest.fixture
def prefills():
    """`prefills(lengths, first, room)`: of the requests from `first` on, with room for so many blocks."""
    from vllm_mkv.serving.metadata import MKVMetadataBuilder

    def build(lengths, first=0, room=10, known=True):
        builder = object.__new__(MKVMetadataBuilder)
        builder.block_size, builder.expanded_blocks = BLOCK_SIZE, room
        lens = torch.tensor(lengths, dtype=torch.int32)
        step = SimpleNamespace(
            num_reqs=len(lengths),
            max_seq_len=max(lengths),
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens.clone() if known else None,
            block_table_tensor=torch.zeros(len(lengths), 99, dtype=torch.int32),
            query_start_loc=torch.arange(len(lengths) + 1, dtype=torch.int32),
        )
        return builder._prefills(step, first)

    return build


def test_as_many_at_once_as_there_is_room_for(prefills):
    # Blocks: 1, 4, 6, 1, 10, 11, 2.
    found = prefills([9, 64, 90, 16, 160, 161, 17])
    assert [step.requests.seq_lens.tolist() for step in found] == [[9, 64], [90, 16], [160], [161], [17]]
    assert [step.max_seq_len for step in found] == [64, 90, 160, 161, 17]
    assert [step.expanded_table is not None for step in found] == [True, True, True, False, True]


def test_decoding_requests_are_left_out(prefills):
    (found,) = prefills([500, 40, 30], first=1)
    assert found.requests.seq_lens.tolist() == [40, 30] and found.requests.query_start_loc.tolist() == [1, 2, 3]
    assert prefills([500, 40], first=2) == ()


def test_blocks_follow_each_other(prefills):
    (found,) = prefills([40, 9, 33])
    used = [found.expanded_table[i, : -(-length // BLOCK_SIZE)].tolist() for i, length in enumerate([40, 9, 33])]
    assert used == [[0, 1, 2], [3], [4, 5, 6]] and found.expanded_table.dtype == torch.int32


def test_lengths_that_the_host_does_not_know_count_as_the_longest(prefills):
    found = prefills([64, 9, 9], known=False)
    assert [step.requests.seq_lens.tolist() for step in found] == [[64, 9], [9]]
