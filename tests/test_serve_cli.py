"""`pliant serve`, `pliant batch` and `pliant top`, as commands."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import pliant
from pliant.cli import top
from pliant.cli.main import main
from pliant.server.batch import _Place, in_order
from serving import running_server
from tiny import write_tiny_pack

WAIT = 60.0


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(tmp_path_factory.mktemp("serve") / "tiny.pack", least=2)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Commands set up a log, which writes to a standard error that ends with the test."""
    root, ours = logging.getLogger(), logging.getLogger("pliant")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@contextmanager
def serving(pack: Path, *options: str, **environment: str) -> Iterator[tuple[str, Any]]:
    """The address of a `pliant serve` of its own, and its process."""
    command = [sys.executable, "-m", "pliant", "serve", str(pack), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    timer = threading.Timer(WAIT, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] not in ("}\n", ""):
            lines.append(process.stdout.readline())
        assert lines[-1], f"it ended, and said: {process.stderr.read() if process.stderr else ''}"
        yield json.loads("".join(lines))["url"], process
    finally:
        process.kill()
        process.communicate()
        timer.cancel()


def ask(url: str, body: Any = None, key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urlopen(Request(url, data, headers), timeout=WAIT)


def test_a_server_finishes_what_runs_before_it_ends(pack: Path) -> None:
    with serving(pack, "--memory", "200MiB", "--log-level", "info") as (url, process):
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with ask(f"{url}/v1/completions", body) as reply:
            first = reply.readline()
            process.send_signal(signal.SIGTERM)
            rest = reply.read()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        _, log = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["status"], line["answer_tokens"]) == (200, 400)
    assert "Traceback" not in log


def test_keys_come_from_a_file_or_the_environment(pack: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfrom-file\n")
    options = ("--api-keys", str(keys))
    with serving(pack, *options, PLIANT_API_KEY="from-environment") as (url, _):
        for key in ("from-file", "from-environment"):
            with ask(f"{url}/v1/models", key=key) as reply:
                assert json.load(reply)["data"][0]["id"] == "tiny.pack"
        with pytest.raises(HTTPError) as refused:
            ask(f"{url}/v1/models", key="# ours")
        assert refused.value.code == 401
        refused.value.close()


def test_pliant_budget_moves_a_server_by_address_and_by_socket(
    pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PLIANT_API_KEY", "secret")

    def budget(*options: str) -> Any:
        assert main(["budget", *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    with serving(pack, "--memory", "200MiB") as (url, process):
        assert budget("--url", url)["memory"] == 200 * 2**20
        assert budget("180MiB", "--url", url)["memory"] == 180 * 2**20
        assert budget()["pid"] == process.pid
        assert budget("190MiB")["memory"] == 190 * 2**20
        assert main(["budget", "1MiB", "--url", url]) == 1
        assert "too little" in capsys.readouterr().err
        state = budget("auto", "--keep-free", "1MiB", "--url", url)
        assert state["mode"] == "auto"
        assert state["governor"]["keep_free"] == 2**20
        assert budget("none", "--url", url)["mode"] == "none"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "65535"),
        (["--grace", "-1"], "--grace"),
        (["--running", "5000"], "1024"),
        (["--api-keys", "/nowhere"], "cannot be read"),
        (["--memory", "1MiB"], "too little"),
        (["--body-limit", "much"], "--body-limit"),
    ],
    ids=lambda value: str(value),
)
def test_serve_refuses(
    pack: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(pack), "--port", "0", *options]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_an_error(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(pack) as (url, _):
        port = url.rpartition(":")[2]
        assert main(["serve", str(pack), "--port", port]) == 1
    assert re.search(r"port \d+ of .*in use; choose others with --port", capsys.readouterr().err)


# --- batch


def requests_file(path: Path, count: int) -> Path:
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"max_tokens": 5 + number % 3, "temperature": 0}
        if number % 2:
            url, body["prompt"] = "/v1/completions", f"{'the same ' * 10}{number}"
        else:
            url = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": f"say {number}"}]
        lines.append({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})
    lines.append({"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "x", "n": 0}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_answers_all_and_goes_on_where_it_stopped(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = requests_file(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    assert main(["batch", str(pack), str(source), str(target), "--json"]) == 1  # one is bad
    summary = json.loads(capsys.readouterr().out)
    assert (summary["total"], summary["answered"], summary["failed"]) == (21, 21, 1)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    answers = {line["custom_id"]: line["response"] for line in lines}
    assert len(answers) == len(lines) == 21
    assert answers["bad"]["status_code"] == 400
    assert answers["bad"]["body"]["error"]["param"] == "n"
    with pliant.load(pack) as model:
        expected = "".join(model.generate(f"{'the same ' * 10}7", max_tokens=6))
    assert answers["r7"]["body"]["choices"][0]["text"] == expected
    # Killed in the middle of a line: that request is asked again, the others are not.
    text = target.read_text()
    whole = text[: text.rindex("\n", 0, -1) + 1]
    target.write_text(whole + text[len(whole) : len(whole) + 20])
    main(["batch", str(pack), str(source), str(target), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["skipped"], summary["answered"]) == (20, 1)
    again = [json.loads(line) for line in target.read_text().splitlines()]
    assert {line["custom_id"]: line["response"]["body"].get("choices") for line in again} == {
        name: response["body"].get("choices") for name, response in answers.items()
    }
    assert main(["batch", str(pack), str(source), str(target)]) == 0  # nothing is left to do


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no request"),
        ('{"custom_id": "a", "url": "/v1/files", "body": {}}', "not one of"),
        ('{"custom_id": "a", "url": "/v1/completions"}', "body"),
        ('{"custom_id": "r0", "url": "/v1/completions", "body": {}}', "twice"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "no streams"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": "' + "x" * 70_000 + '"}', "bytes"),
    ],
    ids=["open", "url", "body", "twice", "stream", "long"],
)
def test_what_is_no_batch_is_refused_before_a_model_is_loaded(
    tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"custom_id": "r0", "url": "/v1/completions", "body": {"prompt": "x"}}\n' + line + "\n"
    )
    arguments = ["batch", "/no/pack", str(source), str(tmp_path / "out"), "--body-limit", "64KiB"]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "out").write_text("something else\n")
    source.write_text("")
    assert main(arguments) == 2
    assert "something else than answers" in capsys.readouterr().err


def test_requests_that_begin_alike_are_together_and_long_ones_first() -> None:
    places = [
        _Place(f"{start}{rest}", 0, 0, start, rest)
        for rest, start in [(1, "a"), (5, "b"), (2, "a"), (9, "c"), (7, "b"), (3, "a")]
    ]
    assert [place.id for place in in_order(places)] == ["c9", "b7", "b5", "a3", "a2", "a1"]


# --- top


def test_top_shows_a_server(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pliant.load(pack) as model, running_server(model) as server:
        server.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
        assert main(["top", "--url", server.url, "--once"]) == 0
        text = capsys.readouterr().out
        for word in (
            "tiny",
            "resident",
            "waiting 0",
            "on disk 0",
            "weights",
            "interpreter",
            "depth",
            "embed",
        ):
            assert word in text
        assert main(["top", "--url", server.url, "--json"]) == 0
        state = json.loads(capsys.readouterr().out)
        later = json.loads(json.dumps(state))
        later["time"] += 2.0
        later["counters"]["answer_tokens"] += 100
        assert "answers 50 tokens/s" in top.screen(later, state, 100)
        assert max(map(len, top.screen(later, state, 60).splitlines())) <= 60
        # What matters fits into a terminal of 80 columns, however long numbers may become.
        later["budget"] |= {"bits_per_weight": 8.09, "expected_kl": 0.000577, "context": 131_072}
        later["budget"] |= {"rungs": 12_345, "rungs_available": 12_345}
        assert "context 131072\n" in top.screen(later, state, 80)
    assert main(["top", "--url", server.url, "--once"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert main(["top", "--url", "ftp://x"]) == 2
    assert main(["top", "--every", "0"]) == 2
