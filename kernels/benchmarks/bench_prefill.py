# SPDX-License-Identifier: Apache-2.0
"""Times the prefill kernel beside attention at full rank, after checking it against its PyTorch twin.

    python kernels/benchmarks/bench_prefill.py --plot prefill.png --json prefill.json
    python kernels/benchmarks/bench_prefill.py --full
    python kernels/benchmarks/bench_prefill.py --ranks 0.5 --tiers --batch 1 --context 2048 32768 --chunk 2048
    python kernels/benchmarks/bench_prefill.py --device cpu     # the twin by the wall clock

Every request's last `--chunk` tokens, or all of a shorter one, attend to all of its tokens before them. Ends with one
line of JSON; exit status 1 if the kernel fails at some shape. See kernels/README.md for the columns.
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

QUICK = [(1, 2048), (1, 8192), (8, 2048), (1, 32768), (1, 1024)]
QUICK_ON_CPU = [(1, 256), (1, 1024)]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__, [peer.name for peer in PEERS if not peer.decode_only], graph=False)
    attention.add_pairs(parser)
    parser.add_argument("--chunk", type=int, default=2048, help="queries per request at most (default %(default)s)")
    args = parser.parse_args(arguments)
    session = Session(Path(__file__), args)
    pairs = attention.pairs_of(args, session, QUICK, QUICK_ON_CPU, (1,))
    shapes = [Shape(batch, context, min(args.chunk, context)) for batch, context in pairs]
    return session.run(lambda: attention.run(session, "prefill", shapes))


if __name__ == "__main__":
    # vLLM logs to stdout, and reads this when it is first imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
