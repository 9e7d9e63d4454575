# SPDX-License-Identifier: Apache-2.0
"""Bytes that a kernel has to move, and products that it has to form, from the page layout alone.

Of a page, exactly what ranks and tiers leave: codes, 16-bit coordinates and scales of the tokens in question. Not
counted are alignment, block tables, splits' partial results, and bases where they are not the bulk (see `store_bytes`).
"""

from __future__ import annotations

from benchmarks.cases import Geometry
from benchmarks.layer import Layer, Shape
from mkv_kernels.layout import side_bytes


def token_bytes(layer: Layer) -> int:
    """Of one cached token in this layer."""
    return sum(side_bytes(side, layer.layout.itemsize) for group in layer.widths for side in group)


def query_bytes(layer: Layer) -> int:
    """Of one token's q'."""
    rows = layer.group_heads * layer.query_heads
    return sum(rows * group.key.rank * layer.layout.itemsize for group in layer.layout.groups)


def attention_bytes(layer: Layer, shape: Shape) -> int:
    """Every cached token once, q' and the output."""
    geometry = layer.setting.geometry
    output = geometry.query_heads * geometry.head_size * layer.layout.itemsize
    return shape.batch * shape.context * token_bytes(layer) + shape.num_tokens * (query_bytes(layer) + output)


def full_attention_bytes(geometry: Geometry, cached_token_bytes: int, shape: Shape, itemsize: int) -> int:
    """The same of attention at full rank, whose cached tokens have `cached_token_bytes` bytes."""
    q_and_output = 2 * geometry.query_heads * geometry.head_size * itemsize
    return shape.batch * shape.context * cached_token_bytes + shape.num_tokens * q_and_output


def attention_flops(shape: Shape, columns: int) -> int:
    """2 per product; `columns` is the sum over query heads of what keys and values have columns."""
    last, first = shape.context, shape.context - shape.queries + 1
    pairs = shape.batch * shape.queries * (first + last) // 2
    return 2 * pairs * columns


def attention_columns(layer: Layer) -> int:
    rows = layer.group_heads * layer.query_heads
    return sum(rows * (group.key.rank + group.value.rank) for group in layer.layout.groups)


def store_bytes(layer: Layer, num_tokens: int) -> int:
    """q, k and v in, q' and pages out, slots, and the bases, which are the bulk where tokens are few."""
    geometry, itemsize = layer.setting.geometry, layer.layout.itemsize
    d, n = geometry.head_size, layer.group_heads * geometry.head_size
    folded = layer.bases.runs[0].value_down is None
    values = sum(group.value.rank if folded else n for group in layer.layout.groups)
    inputs = (geometry.query_heads * d + geometry.kv_heads * d + values) * itemsize
    bases = 0
    for group in layer.layout.groups:
        # query_up is [J, d, Rk], key_down [n, Rk], value_down [n, Rv]; shifts on top; float32.
        bases += 4 * (2 * n * group.key.rank + group.key.rank + (n * (not folded) + 1) * group.value.rank)
    return num_tokens * (inputs + query_bytes(layer) + token_bytes(layer) + 8) + bases
