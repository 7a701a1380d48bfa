"""Between the scheduler's thread and asyncio: neither ever waits for the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.control import BudgetControl
from pliant.engine.model import Model
from pliant.engine.pace import Pace
from pliant.engine.scheduler import Scheduler
from pliant.errors import BusyError

__all__ = ["Bridge", "Flow"]

T = TypeVar("T")

MOST_LONG = 64
"""Requests that wait to make steps of their own."""


class Flow:
    """The pieces of some answers. Closing it cancels them.

    What a slow reader has not taken yet is kept as one piece for each answer.
    """

    def __init__(self, bridge: Bridge, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self._bridge = bridge
        self._pending: dict[int, Piece] = {}
        self._come = asyncio.Event()
        self._places = {answer.number: at for at, answer in enumerate(answers)}

    def put(self, answer: Answer, piece: Piece) -> None:
        """In the event loop: a piece has come."""
        at = self._places[answer.number]
        before = self._pending.get(at)
        if before is not None:
            piece = replace(
                piece, text=before.text + piece.text, choices=before.choices + piece.choices
            )
        self._pending[at] = piece
        self._come.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The place of an answer, and a piece of it; until all have ended."""
        left = len(self.answers)
        while left:
            await self._come.wait()
            at = next(iter(self._pending))
            piece = self._pending.pop(at)
            if not self._pending:
                self._come.clear()
            left -= piece.last
            yield at, piece

    def close(self) -> None:
        """Nobody wants the rest any more."""
        self._bridge.forget(self.answers)


class Bridge:
    """Submits requests and spreads what comes back. Belongs to one event loop."""

    def __init__(
        self, model: Model, *, most_running: int, most_waiting: int, pace: Pace | None = None
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(
            model, self._deliver, most_running=most_running, most_waiting=most_waiting, pace=pace
        )
        self.watch: Callable[[Answer, Piece], None] = lambda answer, piece: None
        """Called in the event loop with every piece, wanted or not."""
        self.begun: Callable[[Sequence[Answer]], None] = lambda answers: None
        """Called in the event loop with answers that were asked for."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flows: dict[int, Flow] = {}
        # Templates, tokenizing and grammars: long enough to stop the event loop.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pliant-prepare")
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="pliant-move")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="pliant-embed")
        self._long_waiting = 0

    def start(self) -> None:
        """In the event loop that is to be used."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    async def stop(self, patience: float) -> None:
        """Finish what runs for up to `patience` seconds."""
        assert self._loop is not None
        await self._loop.run_in_executor(self._pool, self.scheduler.close, patience)
        self._pool.shutdown(wait=False)
        self._mover.shutdown(wait=False)
        self._long.shutdown(wait=False, cancel_futures=True)

    async def work(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something beside the event loop."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._pool, function, *arguments)

    async def work_long(self, function: Callable[[], T]) -> T:
        """Run something that makes steps of its own, one after the other. BusyError if too many
        wait."""
        assert self._loop is not None
        if self._long_waiting >= MOST_LONG:
            raise BusyError(f"{MOST_LONG} requests wait already: try again later", 1.0)
        self._long_waiting += 1
        try:
            return await self._loop.run_in_executor(self._long, function)
        finally:
            self._long_waiting -= 1

    async def move(self, control: BudgetControl, request: object) -> dict[str, Any]:
        """Change the budget, as BudgetControl.put, beside everything else."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._mover, control.put, request)

    def submit(self, requests: Sequence[Request]) -> Flow:
        """Queue requests, all or none. Errors as Scheduler.submit."""
        answers = self.scheduler.submit(requests)
        self.begun(answers)
        flow = Flow(self, answers)
        for answer in answers:
            self._flows[answer.number] = flow
        return flow

    def forget(self, answers: Sequence[Answer]) -> None:
        """Cancel those that have not ended."""
        for answer in answers:
            if self._flows.pop(answer.number, None) is not None and not answer.done:
                self.scheduler.cancel(answer)

    def _deliver(self, out: list[tuple[Answer, Piece]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self._loop.call_soon_threadsafe(self._spread, out)

    def _spread(self, out: list[tuple[Answer, Piece]]) -> None:
        for answer, piece in out:
            self.watch(answer, piece)
            flow = self._flows.get(answer.number)
            if flow is not None:
                flow.put(answer, piece)
                if piece.last:
                    del self._flows[answer.number]
