"""The depth of a running model: which rungs its steps use, and how that changes."""

from __future__ import annotations

import threading

from pliant.engine.build import RungFiles
from pliant.engine.kinds import Depth
from pliant.engine.seam import Executor
from pliant.engine.turns import Turns
from pliant.memory.plan import PackSizes, bits_per_weight, expected_kl

__all__ = ["Weights"]

_BATCH = 64  # rungs that are asked for together

_READS = 4  # in flight while steps go on: the disk is busy while a reader waits for a processor

SHARE = 1 / 7
"""The part of the processors of the steps that a growth computes on beside them."""


class Weights:
    """Moves the rungs of one executor. Changes are transactions at the boundary of a step.

    A step happens while its thread has the turn. Shrinking publishes fewer rungs, and is done when
    the kernel has the memory back; it waits for no read. Growing reads the next rungs beside the
    steps, and publishes them when all are there and right.
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

    def limit(self, rungs: int) -> int:
        """Use and keep at most `rungs` rungs from now on; called with the turn taken.

        A read in progress ends soon. Returns the ticket with which `grow` may add to them.
        """
        self._newest += 1
        self._executor.overtake(self._newest)
        if rungs < self.depth.rungs:
            self._publish(rungs)
        else:
            self._executor.discard(rungs)
        return self._newest

    def grow(self, rungs: int, ticket: int, *, alone: bool = False) -> bool:
        """Read up to `rungs` rungs and use them from the next step on; True when that holds.

        `alone`: nothing else runs, so all threads may read. False if there was a later `limit`
        meanwhile: its caller takes over, and with it what was read. On an error the rungs are those
        from before: ChecksumError, PackError or OSError if one cannot be read.
        """
        threads = self._executor.threads
        with self._changing:
            try:
                while (at := self._executor.read_rungs_count) < rungs and self._newest == ticket:
                    batch = range(at, min(at + _BATCH, rungs))
                    self._executor.read_rungs(
                        [self._files.location(rung) for rung in batch],
                        first=at,
                        goal=rungs,
                        ticket=ticket,
                        threads=threads if alone else _READS,
                        direct=not alone,
                        share=SHARE if self._turns.taken else 1.0,
                    )
                with self._turns.next():
                    if self._newest == ticket:
                        self._publish(rungs)
                        return True
            except BaseException as error:
                if self._newest == ticket:
                    self._executor.discard(0)
                elif isinstance(error, Exception):
                    return False  # whoever took over will meet it, if it matters
                raise
        return False

    def close(self) -> None:
        """End a read in progress, wait until it has ended, and give all rungs back."""
        self._newest += 1
        self._executor.overtake(self._newest)
        with self._changing:
            self._executor.publish(0)
            self._files.close()

    def _publish(self, rungs: int) -> None:
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
