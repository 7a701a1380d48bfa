"""The budget from outside: the requests, the socket and its hostile clients, the command."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import pliant
from fakes import executor_of, fake_model
from pliant.cli.main import main
from pliant.engine import control_socket
from pliant.engine.control import BudgetControl
from pliant.engine.control_socket import (
    MAX_CLIENTS,
    MAX_LINE,
    ControlSocket,
    ask,
    control_folder,
    running,
)
from pliant.errors import BudgetError, ChecksumError, EngineError, PliantError, UsageError
from tiny import write_tiny_pack

FIXED = 10_000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return control_folder()


@pytest.fixture
def model() -> pliant.Model:
    return fake_model(memory=FIXED + 60_000)


@pytest.fixture
def served(model: pliant.Model) -> Iterator[ControlSocket]:
    with ControlSocket(BudgetControl(model)) as served:
        yield served


def connect(served: ControlSocket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(served.path))  # waits where many wait
    client.settimeout(20)
    return client


def answer(client: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        piece = client.recv(65536)
        if not piece:
            break
        data += piece
    found: dict[str, Any] = json.loads(data)
    return found


def end_of(client: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    data = b""
    try:
        while piece := client.recv(2**20):
            data += piece
    except ConnectionResetError:
        pass
    return data


# --- requests


def test_the_state_has_everything_and_is_json(model: pliant.Model) -> None:
    state = BudgetControl(model).get()
    assert json.loads(json.dumps(state)) == state
    assert state["memory"] == FIXED + 60_000
    assert (state["mode"], state["growing"], state["failed"]) == ("fixed", False, None)
    assert state["free"] + sum(part["held"] for part in state["ledger"].values()) == state["total"]
    assert state["least"] <= state["memory"] <= state["most"]
    assert state["pid"] == os.getpid()


def test_a_budget_is_put_and_grows_in_the_background(model: pliant.Model) -> None:
    control = BudgetControl(model)
    assert control.put({"memory": FIXED + 30_000})["memory"] == model.budget == FIXED + 30_000
    executor_of(model).read_seconds = 0.05
    state = control.put({"memory": "100KB"})
    assert (state["memory"], state["growing"]) == (100_000, True)
    assert model.change is not None
    assert model.change.wait(20)
    assert control.get()["growing"] is False
    assert control.put({"memory": None})["mode"] == "none"
    state = control.put({"memory": "auto", "keep_free": "1GB"})
    assert state["mode"] == "auto"
    assert state["governor"]["keep_free"] == 10**9
    assert control.put({"memory": 90_000})["governor"] is None
    executor_of(model).broken_rung = 90
    control.put({"memory": None})
    with pytest.raises(ChecksumError):
        model.change.wait(20)
    assert "rung 90" in control.get()["failed"]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (None, UsageError),
        ([], UsageError),
        ({}, UsageError),
        ({"memory": "much"}, UsageError),
        ({"memory": 1.5}, UsageError),
        ({"memory": True}, UsageError),
        ({"memory": -1}, UsageError),
        ({"memory": []}, UsageError),
        ({"memory": "1GB", "extra": 1}, UsageError),
        ({"memory": "1GB", "keep_free": "1MB"}, UsageError),
        ({"memory": "auto", "keep_free": "x"}, UsageError),
        ({"memory": 11_000}, BudgetError),
    ],
    ids=str,
)
def test_nonsense_changes_nothing(
    model: pliant.Model, request_: Any, error: type[PliantError]
) -> None:
    before = model.plan, model.budget, model.ledger.owners()
    with pytest.raises(error):
        BudgetControl(model).put(request_)
    assert (model.plan, model.budget, model.ledger.owners()) == before
    assert model.governor is None


# --- the socket


def test_only_this_user_can_open_it(served: ControlSocket, folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert served.path.stat().st_mode & 0o777 == 0o600
    assert running() == {os.getpid(): served.path}
    served.close()
    served.close()
    assert running() == {}


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o755)
    with pytest.raises(EngineError, match="only you can open"):
        control_folder()
    folder.rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(EngineError, match="only you can open"):
        control_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match="cannot be used"):
        control_folder()


def test_sockets_of_dead_processes_are_removed(folder: Path) -> None:
    (folder / "999999999.sock").write_text("")
    (folder / "x.sock").write_text("")
    assert running() == {}
    assert [path.name for path in folder.iterdir()] == ["x.sock"]


def test_a_client_asks_and_tells(served: ControlSocket, model: pliant.Model) -> None:
    assert ask(served.path, {"method": "GET"})["memory"] == FIXED + 60_000
    assert ask(served.path, {"method": "PUT", "memory": "30KB"})["memory"] == 30_000
    assert model.budget == 30_000
    with pytest.raises(BudgetError, match="sum"):
        ask(served.path, {"method": "PUT", "memory": 100})
    for request in ({}, {"method": "DELETE"}, {"method": "GET", "memory": 1}):
        with pytest.raises(UsageError):
            ask(served.path, request)
    with connect(served) as client:  # one after the other
        for _ in range(3):
            client.sendall(b'{"method": "GET"}\n')
            assert answer(client)["memory"] == 30_000


def test_garbage_is_refused_and_others_are_served(served: ControlSocket) -> None:
    rng = random.Random(0)
    lines = [b"\n", b"{\n", b"null\n", b"1\n", b"[[[[\n", b"\xff\xfe\n", b'{"method": {}}\n']
    lines += [b"[" * (MAX_LINE - 2) + b"\n", rng.randbytes(500).replace(b"\n", b"") + b"\n"]
    for line in lines:
        with connect(served) as client:
            client.sendall(line)
            assert answer(client)["error"]["type"] == "UsageError"
    with connect(served) as client:
        client.sendall(b"x" * (3 * MAX_LINE))
        assert "one line of less than" in answer(client)["error"]["message"]
    connect(served).close()
    assert ask(served.path, {"method": "GET"})["growing"] is False


def test_slow_and_silent_and_many_clients_are_cut_off(
    served: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "PATIENCE", 0.3)
    with ExitStack() as stack:
        slow, *crowd = [
            stack.enter_context(connect(served)) for _ in range(MAX_CLIENTS + MAX_CLIENTS // 2)
        ]
        slow.sendall(b'{"meth')
        told = [end_of(client) for client in crowd]
        assert end_of(slow) == b""
    assert sum(b"too many clients" in text for text in told) >= 1
    assert sum(text == b"" for text in told) >= MAX_CLIENTS - 1
    assert ask(served.path, {"method": "GET"})["pid"] == os.getpid()


def test_whoever_does_not_take_the_answer_is_cut_off(
    served: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "PATIENCE", 0.3)
    big = {"text": "x" * 4_000_000}
    monkeypatch.setattr(BudgetControl, "get", lambda self: big)
    with connect(served) as client:
        client.sendall(b'{"method": "GET"}\n')
        time.sleep(0.6)
        assert len(end_of(client)) < 4_000_000
    assert ask(served.path, {"method": "GET"}) == big


def test_an_unexpected_error_is_told_and_the_thread_lives(
    served: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BudgetControl) -> None:
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(BudgetControl, "get", broken)
        with pytest.raises(EngineError, match="a mistake"):
            ask(served.path, {"method": "GET"})
    assert ask(served.path, {"method": "GET"})["pid"] == os.getpid()


# --- the command


def test_the_command_shows_and_sets(
    served: ControlSocket, model: pliant.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("budget    68.4 KiB\n")
    assert "0 in flight, 0 sessions parked" in out
    assert main(["budget", "40KB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == model.budget == 40_000
    assert main(["budget", "none", "--wait", "--pid", str(os.getpid())]) == 0
    assert model.budget is None
    assert model.depth.rungs == 100
    assert main(["budget", "auto", "--keep-free", "1MiB"]) == 0
    assert model.governor is not None
    assert "1.0 MiB stay free" in capsys.readouterr().out
    assert main(["budget", "12KB"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pliant: error: 11.7 KiB are too little")
    model.resize(memory=40_000)
    executor_of(model).broken_rung = 50
    assert main(["budget", "none", "--wait"]) == 1
    assert "rung 50" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pid", "1", "--url", "http://x"],
        ["200MiB", "--keep-free", "1MiB"],
        ["much"],
        ["--url", "ftp://x"],
        ["--url", "http://"],
        ["--url", "http://x:99999"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments: list[str]) -> None:
    assert main(["budget", *arguments]) == 2


def test_nobody_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget"]) == 1
    assert "no pliant runs" in capsys.readouterr().err
    assert main(["budget", "--pid", "1"]) == 1
    (folder / "1.sock").write_text("")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:  # somebody else who is there
        (folder / f"{other.pid}.sock").write_text("")
        assert main(["budget"]) == 2
        other.communicate()
    assert "--pid (" in capsys.readouterr().err
    assert main(["budget", "--pid", "1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_the_command_talks_to_a_server(
    model: pliant.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    control = BudgetControl(model)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(control.get)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(lambda: control.put(json.loads(body)))

        def reply(self, call: Any) -> None:
            status = 200
            try:
                found = call() if self.path == "/v1/budget" else {"no": "such path"}
            except PliantError as error:
                status = 400
                found = {"error": {"type": type(error).__name__, "message": str(error)}}
            data = json.dumps(found).encode()
            self.send_response(status if self.path == "/v1/budget" else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main(["budget", "40KB", "--url", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory"] == model.budget == 40_000
        assert main(["budget", "--url", f"{url}/v1/"]) == 0
        assert main(["budget", "1KB", "--url", url]) == 1
        assert "too little" in capsys.readouterr().err
        assert main(["budget", "--url", f"{url}/elsewhere"]) == 1
        assert "status 404" in capsys.readouterr().err
        server.shutdown()
    assert main(["budget", "--url", url]) == 1


def test_a_run_is_told_from_another_process(tmp_path: Path) -> None:
    pack = write_tiny_pack(tmp_path / "p.pack", least=1, context=16_384, hidden=128, ffn=256)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pliant"]
    with subprocess.Popen(
        [*command, "run", str(pack), "-p", "x", "--raw", "--max-tokens=16000", "--memory=500MiB"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.read1(1)
            path = running()[process.pid]
            before = ask(path, {"method": "GET"})
            assert before["memory"] == 500 * 2**20
            assert before["in_flight"] == 1
            asked = subprocess.run(
                [*command, "budget", str(before["least"] + 2**20), "--json"],
                env=environment, capture_output=True, text=True, check=True,
            )  # fmt: skip
            after = json.loads(asked.stdout)
            assert after["memory"] == before["least"] + 2**20
            assert after["resident"] <= after["memory"] + 8 * 2**20
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert b"bits/weight" in err
    assert process.returncode == 130
    assert running() == {}
