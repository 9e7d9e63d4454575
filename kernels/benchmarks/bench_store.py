# SPDX-License-Identifier: Apache-2.0
"""Times the store kernel beside the writing of caches at full rank, after checking it against its PyTorch twin.

    python kernels/benchmarks/bench_store.py --plot store.png --json store.json
    python kernels/benchmarks/bench_store.py --full
    python kernels/benchmarks/bench_store.py --tiers 0.156 --tokens 1 32 256 --unfolded
    python kernels/benchmarks/bench_store.py --device cpu       # the twin by the wall clock

The kernel also projects q, k and v; its peers write what they get. Ends with one line of JSON; exit status 1 if the
kernel fails at some shape. See kernels/README.md for the columns.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import launchers
from benchmarks.cases import Spec
from benchmarks.layer import Layer, Setting, Shape
from benchmarks.report import Row
from benchmarks.session import NO_KERNELS, CheckFailed, Session, parser_of
from benchmarks.store_peers import PEERS, StorePeer
from benchmarks.traffic import store_bytes
from benchmarks.verify import check_store, twin_store

QUICK = (32, 2048, 1, 256, 8192)
QUICK_ON_CPU = (1, 32, 512)
FULL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192, 16384)


def measure_layer(session: Session, setting: Setting, spec: Spec, num_tokens: int) -> None:
    layer = Layer(setting, spec)
    name = "mkv store" if session.on_cuda else "twin store"
    shape = Shape(num_tokens, 0)
    row = Row.at(shape, name, spec.label, own=True, model=setting.geometry.name)
    row.bytes = store_bytes(layer, num_tokens)
    if not session.on_cuda:
        model = setting.geometry.name
        session.rows.append(Row.at(shape, "mkv store", spec.label, own=True, model=model, note=NO_KERNELS))

    def work(row: Row) -> None:
        *inputs, slots = layer.new_inputs(num_tokens)
        cache = layer.new_cache(-(-num_tokens // setting.block_size))
        if not session.on_cuda:
            session.time(row, lambda: twin_store(layer, tuple(inputs), cache, slots))
            return
        launch = launchers.store(layer, tuple(inputs), slots, cache)
        launch.run()
        row.errors = check_store(layer, tuple(inputs), slots, cache, launch.output)
        if not row.errors.passed:
            raise CheckFailed(f"beyond twice the twin's error, or other codes: {row.errors}")
        session.time(row, launch.run)

    # Inputs and what the twin makes of them in float32, several times over.
    width = setting.geometry.query_heads * setting.geometry.head_size * (1 + spec.group_heads)
    session.attempt(row, 64 * num_tokens * width, work)


def measure_peer(session: Session, peer: StorePeer, setting: Setting, num_tokens: int) -> None:
    geometry, itemsize = setting.geometry, setting.dtype.itemsize
    row = Row.at(Shape(num_tokens, 0), peer.name, "full rank", own=False, model="any of them")

    def work(row: Row) -> None:
        _, k, v, slots = Layer(setting, Spec("ranks", 1.0, 1)).new_inputs(num_tokens)
        writer = peer.prepare(setting, -(-num_tokens // setting.block_size))
        row.bytes = num_tokens * (geometry.full_bytes(itemsize) + writer.token_bytes + 8)
        writer.write(k, v, slots)
        session.time(row, lambda: writer.write(k, v, slots))

    session.attempt_peer(row, peer.on_cpu, 64 * num_tokens * geometry.full_bytes(itemsize), work)


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__, [peer.name for peer in PEERS], graph=True)
    parser.add_argument("--tokens", type=int, nargs="+", help="of the step, 1 to 16k with --full (column B)")
    args = parser.parse_args(arguments)
    session = Session(Path(__file__), args)

    def measure() -> None:
        for num_tokens in args.tokens or (FULL if args.full else QUICK if session.on_cuda else QUICK_ON_CPU):
            for setting in session.settings:
                for spec in session.specs:
                    measure_layer(session, setting, spec, num_tokens)
            for peer in PEERS:
                measure_peer(session, peer, session.settings[0], num_tokens)

    return session.run(measure)


if __name__ == "__main__":
    # vLLM logs to stdout, and reads this when it is first imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
