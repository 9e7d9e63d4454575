# SPDX-License-Identifier: Apache-2.0
"""How far a phase is: a bar on a terminal, and elsewhere one line at its start. Both go to stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(what: str, *, total: int, unit: str) -> tqdm:
    """The bar of a phase, to be updated and closed. In a log, where no bar can move, `what` alone stands."""
    if not sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)
    return tqdm(desc=what, total=total, unit=unit, disable=None)
