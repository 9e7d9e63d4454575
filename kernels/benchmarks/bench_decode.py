# SPDX-License-Identifier: Apache-2.0
"""Times the decode kernel beside attention at full rank, after checking it against its PyTorch twin.

    python kernels/benchmarks/bench_decode.py --plot decode.png --json decode.json
    python kernels/benchmarks/bench_decode.py --full
    python kernels/benchmarks/bench_decode.py --tiers 0.156 --group-heads 1 4 --batch 32 --context 8192 --peers fa3 int4
    python kernels/benchmarks/bench_decode.py --device cpu      # the twin by the wall clock

Ends with one line of JSON; exit status 1 if the kernel fails at some shape. See kernels/README.md for the columns.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention
from benchmarks.layer import Shape
from benchmarks.peers import PEERS
from benchmarks.session import Session, parser_of

QUICK = [(32, 8192), (1, 8192), (1, 131072), (32, 1024), (1, 1024), (32, 32768)]
QUICK_ON_CPU = [(1, 1024), (4, 1024), (1, 4096)]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__, [peer.name for peer in PEERS], graph=True)
    attention.add_pairs(parser)
    parser.add_argument("--queries", type=int, default=1, help="per request; more than one are speculative ones")
    args = parser.parse_args(arguments)
    session = Session(Path(__file__), args)
    pairs = attention.pairs_of(args, session, QUICK, QUICK_ON_CPU, (1, 32))
    shapes = [Shape(batch, context, args.queries) for batch, context in pairs]
    return session.run(lambda: attention.run(session, "decode", shapes))


if __name__ == "__main__":
    # vLLM logs to stdout, and reads this when it is first imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
