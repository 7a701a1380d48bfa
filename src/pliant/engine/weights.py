"""The depth of a running model: which rungs its steps use, and how that changes."""

from __future__ import annotations

import threading

from pliant.engine.build import RungFiles
from pliant.engine.kinds import Depth
from pliant.engine.seam import Executor
from pliant.engine.turns import Turns
from pliant.errors import EngineError
from pliant.memory.plan import PackSizes, bits_per_weight, expected_kl

__all__ = ["Weights"]

_BATCH = 16  # rungs that are read at once; between batches a newer request may take over


class Weights:
    """Moves the rungs of one executor. Changes are transactions at the boundary of a step.

    A step happens while its thread has the turn. Shrinking publishes fewer rungs, and is done when
    the kernel has the memory back. Growing reads the next rungs beside the steps, and publishes
    them when all are there and right.
    """

    __slots__ = ("_changing", "_executor", "_files", "_newest", "_sizes", "_turns", "depth")

    def __init__(
        self, executor: Executor, files: RungFiles, sizes: PackSizes, turns: Turns
    ) -> None:
        self._executor = executor
        self._files = files
        self._sizes = sizes
        self._turns = turns
        self._changing = threading.Lock()
        self._newest = 0
        self.depth = self._describe(0)
        """What steps use now. It changes only while the turn is taken."""

    def ticket(self) -> int:
        """A place in the order of changes; whoever has a later one takes over."""
        self._newest += 1
        return self._newest

    def go(self, rungs: int, ticket: int) -> bool:
        """Use exactly `rungs` rungs from the next step on; True when that holds.

        False if a later ticket was given out meanwhile: its holder takes over. On an error the
        rungs are those from before: ChecksumError, PackError or OSError if one cannot be read.
        """
        if not 0 <= rungs <= self._sizes.rungs:
            raise EngineError(f"{rungs} rungs were asked for, and there are {self._sizes.rungs}")
        with self._changing:
            if self._newest != ticket:
                return False
            at = self.depth.rungs
            if rungs > at and not self._read(at, rungs, ticket):
                return False
            self._publish(rungs)
            return True

    def _read(self, at: int, rungs: int, ticket: int) -> bool:
        try:
            while at < rungs:
                if self._newest != ticket:
                    self._publish(self.depth.rungs)  # gives back what was read for nothing
                    return False
                batch = range(at, min(at + _BATCH, rungs))
                self._executor.read_rungs([self._files.location(rung) for rung in batch])
                at = batch.stop
        except BaseException:
            self._publish(self.depth.rungs)
            raise
        return True

    def _publish(self, rungs: int) -> None:
        with self._turns:
            self._executor.publish(rungs)
            self.depth = self._describe(rungs)

    def _describe(self, rungs: int) -> Depth:
        weights = self._sizes.weights[rungs]
        return Depth(
            rungs,
            weights,
            bits_per_weight(weights, self._sizes.coded),
            expected_kl(self._sizes.quality, weights) if self._sizes.coded else None,
        )
