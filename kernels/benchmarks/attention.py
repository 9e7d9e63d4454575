# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill, measured alike: per shape, every layer's kernel and then every peer."""

from __future__ import annotations

import argparse

import torch

from benchmarks import launchers
from benchmarks.cases import Spec
from benchmarks.layer import Layer, Requests, Setting, Shape
from benchmarks.peers import CHUNK, PEERS, Peer, Problem
from benchmarks.report import Row
from benchmarks.session import NO_KERNELS, CheckFailed, Session
from benchmarks.traffic import attention_bytes, attention_columns, attention_flops, full_attention_bytes
from benchmarks.verify import MAX_CHECKED_SCORES, check_attention, twin_attention

FULL = [(batch, context) for context in (1024, 4096, 16384, 32768, 65536, 131072) for batch in (1, 4, 16, 64, 256)]

Pairs = list[tuple[int, int]]
"""Of a batch and a context."""


def add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", help="requests, 1 to 256 with --full")
    parser.add_argument("--context", type=int, nargs="+", help="cached tokens per request, 1k to 128k with --full")


def pairs_of(
    args: argparse.Namespace, session: Session, quick: Pairs, on_cpu: Pairs, batches: tuple[int, ...]
) -> Pairs:
    """Those asked for, with `batches` where only contexts are; else those of the subset."""
    if args.batch or args.context:
        return [(batch, context) for context in args.context or (8192,) for batch in args.batch or batches]
    return FULL if args.full else quick if session.on_cuda else on_cpu


def run(session: Session, kind: str, shapes: list[Shape]) -> None:
    for shape in shapes:
        for setting in session.settings:
            for spec in session.specs:
                measure_layer(session, kind, setting, spec, shape)
        # Models of one geometry have the same attention at full rank.
        for peer in PEERS:
            measure_peer(session, kind, peer, session.settings[0], shape)


def measure_layer(session: Session, kind: str, setting: Setting, spec: Spec, shape: Shape) -> None:
    layer = Layer(setting, spec)
    name = "mkv" if session.on_cuda else "twin"
    row = Row.at(shape, f"{name} {kind}", spec.label, own=True, model=setting.geometry.name)
    row.bytes = attention_bytes(layer, shape)
    if kind == "prefill":
        row.flops = attention_flops(shape, attention_columns(layer))
    if not session.on_cuda:
        model = setting.geometry.name
        session.rows.append(Row.at(shape, f"mkv {kind}", spec.label, own=True, model=model, note=NO_KERNELS))

    def work(row: Row) -> None:
        requests = Requests.make(shape, setting)
        cache = layer.filled_cache(shape.num_blocks(setting.block_size))
        queries = layer.model_queries(shape.num_tokens) if kind == "prefill" else None
        query = layer.new_queries(shape.num_tokens) if queries is None else queries.projected
        if not session.on_cuda:
            plain = twin_attention(layer, requests, query, cache)
            row.errors = check_attention(layer, requests, query, cache, plain)
            session.time(row, lambda: twin_attention(layer, requests, query, cache))
            return
        if kind == "decode":
            processors = torch.cuda.get_device_properties(setting.device).multi_processor_count
            launch = launchers.decode(layer, shape, requests, query, cache, processors)
        else:
            assert queries is not None
            launch = launchers.prefill(layer, shape, requests, queries, cache)
        launch.run()
        exact = queries.exact if queries is not None and layer.group_heads > 1 else None
        row.errors = check_attention(layer, requests, query, cache, launch.output, exact)
        if not row.errors.passed:
            raise CheckFailed(f"beyond twice the twin's error: {row.errors}")
        session.time(row, launch.run)

    session.attempt(row, needed_memory(layer, shape), work)


def needed_memory(layer: Layer, shape: Shape) -> int:
    """Bytes of pages, queries and outputs, and of what the twin makes of them in float32."""
    setting = layer.setting
    pages = shape.num_blocks(setting.block_size) * layer.layout.page_bytes
    most = max(max(group.key.rank, group.value.rank) for group in layer.layout.groups)
    per_query = setting.geometry.query_heads * (most + setting.geometry.head_size) * 4
    at_once = MAX_CHECKED_SCORES[shape.queries == 1] // shape.queries
    gathered = min(shape.batch * shape.context, max(shape.context, at_once)) * layer.num_groups * most
    return pages + 6 * shape.num_tokens * per_query + 32 * gathered


def measure_peer(session: Session, kind: str, peer: Peer, setting: Setting, shape: Shape) -> None:
    if peer.decode_only and kind != "decode":
        return
    geometry = setting.geometry
    row = Row.at(shape, peer.name, "full rank", own=False, model="any of them")
    full = geometry.full_bytes(setting.dtype.itemsize)

    def work(row: Row) -> None:
        problem = Problem.make(setting, shape)
        prepared = peer.prepare(problem)
        row.bytes = full_attention_bytes(geometry, prepared.token_bytes, shape, setting.dtype.itemsize)
        if kind == "prefill":
            row.flops = attention_flops(shape, 2 * geometry.query_heads * geometry.head_size)
        row.relative_error = problem.relative_error(prepared.run())
        if not row.relative_error < peer.largest_error:
            raise CheckFailed(f"called wrongly? Its result is off by {row.relative_error:.3g} of its size")
        session.time(row, prepared.run)

    tokens = shape.batch * shape.context
    needed = tokens * full + 6 * (min(tokens, CHUNK) + shape.context) * full
    session.attempt_peer(row, peer.on_cpu, needed, work)
