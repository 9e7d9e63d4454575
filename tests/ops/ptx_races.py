# SPDX-License-Identifier: Apache-2.0
"""Whether what a launch computes depends on which lane, warp, program or copy is first; see `ptx`.

Between two barriers a program's warps may run in any order, and so may a warp's lanes between two of the warp's own: no
other may read or write what one writes. A copy may arrive at any time from its start until its warp has waited for it.
Programs may run in any order, too: none reads or writes what another writes, unless an atomic counter told it that it
may.
"""

from __future__ import annotations

import numpy as np
from ptx_operands import Values


class Race(ValueError):
    pass


class Accesses:
    """Which of several `agents`, by their numbers, wrote and read every byte last, and in which turn of theirs.

    Shapes: places, of bytes, any; who and turn as these, or one for all.
    """

    def __init__(self, size: int, agents: str) -> None:
        self.agents = agents
        self.write_turn, self.read_turn = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.several_read = np.zeros(size, np.bool_)
        self.copier = np.full(size, -1, np.int32)
        """Of bytes that a copy is under way to."""

    def read(self, who: Values | int, places: Values, turn: int) -> None:
        self._refuse(self.copier[places] >= 0, who, "reads what a copy is under way to")
        self._refuse(self._others_wrote(who, places, turn), who, "reads what another writes")
        read = self.read_turn[places] == turn
        self.several_read[places] = read & (self.several_read[places] | (self.reader[places] != who))
        self.reader[places], self.read_turn[places] = who, turn

    def write(self, who: Values | int, places: Values, turn: int, changed: Values) -> None:
        """`changed`: of each byte, whether it becomes another. Several may write what is there already."""
        self._refuse(self.copier[places] >= 0, who, "writes what a copy is under way to")
        self._check_order(who, places, turn, changed)
        self.writer[places], self.write_turn[places] = who, turn

    def begin_copy(self, who: Values | int, places: Values, turn: int) -> None:
        self._refuse(self.copier[places] >= 0, who, "copies to what a copy is under way to")
        self._check_order(who, places, turn, np.ones(places.shape, np.bool_))
        self.copier[places] = who

    def end_copy(self, who: Values | int, places: Values, turn: int) -> None:
        self.copier[places] = -1
        self.writer[places], self.write_turn[places] = who, turn

    def _check_order(self, who: Values | int, places: Values, turn: int, changed: Values) -> None:
        read = self.read_turn[places] == turn
        others = read & (self.several_read[places] | (self.reader[places] != who))
        self._refuse(others & changed, who, "writes what another reads")
        self._refuse(self._others_wrote(who, places, turn) & changed, who, "writes what another writes")

    def _others_wrote(self, who: Values | int, places: Values, turn: int) -> Values:
        return (self.write_turn[places] == turn) & (self.writer[places] != who)

    def _refuse(self, which: Values, who: Values | int, message: str) -> None:
        if which.any():
            raise Race(f"a race: {self.agents} {np.broadcast_to(who, which.shape)[which][0]} {message}")
