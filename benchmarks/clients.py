"""Servers that run for a benchmark, and clients of them, with the standard library only."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pliant.store.closing import Closing

__all__ = ["Answer", "Running", "free_port", "percentile", "pliant_server"]

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port of the loopback address that nobody has at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all are."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


@dataclass
class Answer:
    """What came back to a streaming request. Times are seconds since it was sent."""

    status: int = 0
    text: str = ""
    reason: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of pieces with text
    done: bool = False  # the mark of the end came
    seconds: float = 0.0

    @property
    def error(self) -> dict[str, Any] | None:
        """What the server said went wrong."""
        for event in self.events:
            if "error" in event:
                found: dict[str, Any] = event["error"]
                return found
        return None


class Running(Closing):
    """A server as a process of its own. Use it as a context manager; it is ended at the end."""

    def __init__(self, command: Sequence[str], port: int, ready: str, *, log: Any = None) -> None:
        """`ready`: a path that answers 200 once requests are taken. `log`: where it writes."""
        self.port = port
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log or subprocess.DEVNULL
        )
        end = time.monotonic() + 120
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {self._process.returncode}")
            try:
                if self.send("GET", ready)[0] == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > end:
                self.close()
                raise RuntimeError(f"{' '.join(command)} does not answer")
            time.sleep(0.1)

    def close(self) -> int:
        """End it with grace; its status."""
        self._process.terminate()
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def cpu(self) -> float:
        """Seconds of processors that it has used."""
        with open(f"/proc/{self.pid}/stat") as file:  # noqa: PTH123
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident(self) -> int:
        """Bytes of its resident set."""
        with open(f"/proc/{self.pid}/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * PAGE

    def connect(self, seconds: float = 300.0) -> http.client.HTTPConnection:
        """A new connection, on which nothing takes longer than `seconds`."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of one request; a text where it is no JSON."""
        connection = self.connect()
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode()
            try:
                return reply.status, json.loads(text)
            except ValueError:
                return reply.status, text
        finally:
            connection.close()

    def stream(
        self,
        body: dict[str, Any],
        path: str = "/v1/completions",
        *,
        leave: Callable[[Answer], bool] = lambda answer: False,
    ) -> Answer:
        """Ask for a stream, and read it to its end, or until `leave` says so after a piece."""
        answer, begin = Answer(), time.perf_counter()
        connection = self.connect()
        try:
            data = json.dumps({**body, "stream": True}).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            answer.status = reply.status
            if reply.status != 200:
                answer.events.append(json.loads(reply.read()))
                return answer
            for event in _events(reply):
                if event is None:
                    answer.done = True
                    break
                answer.events.append(event)
                for choice in event.get("choices", ()):
                    text = choice.get("text") or choice.get("delta", {}).get("content")
                    if text:
                        answer.text += text
                        answer.times.append(time.perf_counter() - begin)
                    answer.reason = choice.get("finish_reason") or answer.reason
                if leave(answer):
                    break
        finally:
            answer.seconds = time.perf_counter() - begin
            connection.close()
        return answer


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any] | None]:
    """The events of a stream; None for the mark of its end."""
    for line in reply:
        if line.startswith(b"data: [DONE]"):
            yield None
        elif line.startswith(b"data: "):
            yield json.loads(line[6:])


def pliant_server(python: str, pack: str, *options: str, log: Any = None) -> Running:
    """`pliant serve` of a pack on a free port."""
    port = free_port()
    command = [python, "-m", "pliant", "serve", pack, "--port", str(port), "--log-level", "error"]
    return Running([*command, *options], port, "/ready", log=log)
