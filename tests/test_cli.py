"""The command line: what it prints, where, and how it refuses."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pliant.cli.document import commands, document
from pliant.cli.main import COMMANDS, main
from pliant.engine.compare import Divergence, log_softmax
from tiny import write_tiny_pack

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return write_tiny_pack(folder / "tiny.pack", least=1, hidden=128, ffn=256, context=1024)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "pliant", *map(str, arguments)], env=environment, **options
    )


# --- all commands


def test_the_documentation_is_that_of_the_program() -> None:
    page = document()
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == page, (
        "run python -m pliant.cli.document > docs/cli.md"
    )
    assert max(map(len, page.splitlines())) <= 81
    for name, parser in commands().items():
        section = page.split(f"## `pliant {name}`")[1].split("\n## ")[0]
        for action in parser._actions:
            for option in action.option_strings:
                assert f"`{option}" in section


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_in_80_columns_and_json(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = commands()[name].format_help()
    assert "--json" in text
    assert "--help" in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(action.help for action in commands()[name]._actions)


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert "pliant" in out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "PACK", "--nonsense"],
        ["nonsense"],
        ["run", "PACK", "-p", "x", "--memory", "12Q"],
        ["run", "PACK", "-p", "x", "--memory", "0"],
        ["run", "PACK", "-p", "x", "--context", "0"],
        ["run", "PACK", "-p", "x", "--context", "99999"],
        ["run", "PACK", "-p", "x", "--threads", "0"],
        ["run", "PACK", "-p", "x", "--isa", "mmx"],
        ["run", "PACK", "-p", "x", "--temperature", "-1"],
        ["run", "PACK", "-p", "x", "--top-p", "2"],
        ["run", "PACK", "-p", "x", "--max-tokens", "0"],
        ["run", "PACK", "-p", "x", "--seed", "-1"],
        ["run", "PACK", "-p", "x", "--stop", ""],
        ["run", "PACK", "-p", "x", "--raw", "--system", "y"],
        ["run", "PACK", "-p", "x", "--mem", "1GB"],
        ["run", "PACK", "-p", "x", "--sessions", "2"],
        ["plan", "PACK", "--sessions", "0"],
        ["eval", "PACK"],
        ["eval", "PACK", "--text", "nowhere.txt"],
        ["eval", "PACK", "--text", __file__, "--revision", "x"],
        ["eval", "PACK", "--text", __file__, "--window", "1"],
        ["eval", "PACK", "--text", __file__, "--window", "5000"],
        ["eval", "PACK", "--text", __file__, "--tasks", "all"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--samples", "3"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--tasks", "needles"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--tasks", "copy", "--seed", "-1"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--tasks", "all", "--lengths", "9999"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--tasks", "all", "--lengths", "500"],
        ["eval", "PACK", "--text", __file__, "--kv", "4", "--memory", "1GB"],
        ["eval", "PACK", "--text", __file__, "--kv", "1.5"],
        ["bench", "PACK", "--prompt-tokens", "5000"],
        ["pack", "PACK"],
        ["pack", "PACK", "-o", "x", "--plain", "f16"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line_and_code_2(
    run: Run, pack: Path, arguments: list[str]
) -> None:
    code, out, err = run(*(str(pack) if a == "PACK" else a for a in arguments))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("pliant: error: ")


def test_errors_are_one_line_and_code_1_or_raised(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run("run", tmp_path / "nowhere", "-p", "x")
    assert (code, out) == (1, "")
    assert err.startswith("pliant: error: there is no pack at ")
    assert err.count("\n") == 1
    monkeypatch.setenv("PLIANT_RAISE_ERRORS", "1")
    from pliant.errors import PackError

    with pytest.raises(PackError):
        run("run", tmp_path / "nowhere", "-p", "x")


def test_what_does_not_fit_is_refused_with_the_sum(run: Run, pack: Path) -> None:
    code, out, err = run("run", pack, "-p", "x", "--memory", "3MiB")
    assert (code, out) == (1, "")
    first, *rest = err.splitlines()
    assert "give at least" in first
    assert [line.split()[0] for line in rest][-1] == "sum"
    assert all(len(line) <= 80 for line in rest)


# --- run


def test_one_prompt_is_answered_on_stdout(run: Run, pack: Path) -> None:
    arguments = ("run", pack, "-p", "Hello", "--max-tokens", 8, "--memory", "4GiB")
    code, out, err = run(*arguments)
    assert code == 0
    assert out.endswith("\n")
    line = err.splitlines()[-1]
    assert re.fullmatch(r"\[\d tokens.* bits/weight; \d+\.\d MiB\]", line), line
    again = run(*arguments)
    assert again[1] == out
    assert run(*arguments, "--json")[0] == 0


def test_the_answer_as_json_has_everything(run: Run, pack: Path) -> None:
    code, out, err = run(
        *("run", pack, "-p", "Hello", "--max-tokens", 4, "--json", "--weights", "60KB"),
        *("--temperature", 5, "--seed", 7, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01),
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["result"]["seed"] == 7
    assert found["result"]["finish_reason"] in ("length", "eos")
    assert found["result"]["bits_per_weight"] == found["report"]["bits_per_weight"]
    assert found["report"]["weights"] <= 60_000
    assert found["report"]["ledger"]["weights"]["touched"] > 0


def test_a_prompt_goes_through_the_template_unless_raw(run: Run, pack: Path) -> None:
    def tokens(*more: str) -> int:
        code, out, _ = run("run", pack, "-p", "Hi", "--max-tokens", 1, "--json", *more)
        assert code == 0
        return int(json.loads(out)["result"]["prompt_tokens"])

    assert tokens("--raw") == 2
    plain = tokens()
    assert plain > 10
    assert tokens("--system", "Be kind") > plain


def test_a_model_without_template_continues_text(run: Run, tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "plain.pack", template=None, least=1)
    code, out, _ = run("run", path, "-p", "Hi", "--max-tokens", 1, "--json")
    assert code == 0
    assert json.loads(out)["result"]["prompt_tokens"] == 2
    code, _, err = run("run", path, "-p", "Hi", "--system", "x")
    assert code == 2
    assert "no chat template" in err


def test_a_prompt_may_be_piped_in(pack: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = spawn("run", pack, "--raw", "--max-tokens", 3, "--json", **pipes)
    out, err = process.communicate(b"ab\xff\n", timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["result"]["prompt_tokens"] == 2 + 3  # U+FFFD has three bytes
    process = spawn("run", pack, **pipes)
    out, err = process.communicate(b"\n", timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert b"nothing was piped in" in err


def test_the_peak_of_the_process_stays_below_the_budget(pack: Path) -> None:
    process = spawn(
        *("run", pack, "-p", "Hello " * 100, "--memory", "120MiB", "--max-tokens", 200, "--json"),
        stdout=subprocess.PIPE,
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    report = json.loads(out)["report"]
    assert report["peak"] < 120 * 2**20
    assert (
        report["free"] + sum(part["held"] for part in report["ledger"].values())
        == (report["total"])
    )


def test_a_reader_that_leaves_is_no_error(pack: Path) -> None:
    process = spawn(
        *("run", pack, "-p", "x", "--max-tokens", 900, "--repetition-penalty", 1.3),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert b"Traceback" not in err
    assert process.returncode == 141


class Terminal:
    """A program in a terminal of 80 columns."""

    def __init__(self, *arguments: object) -> None:
        master, slave = pty.openpty()
        self.process = spawn(*arguments, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self._master = master
        self.text = ""

    def expect(self, what: str, seconds: float = 60) -> str:
        """Read until `what` appears; what was read up to then."""
        end = time.monotonic() + seconds
        while what not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"{what!r} did not appear after {self.text!r}"
            if select.select([self._master], [], [], left)[0]:
                self.text += os.read(self._master, 4096).decode("utf-8", "replace")
        before, _, self.text = self.text.partition(what)
        return before

    def send(self, line: str) -> None:
        os.write(self._master, line.encode())

    def close(self) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._master)


def test_a_chat_in_the_terminal(pack: Path) -> None:
    terminal = Terminal("run", pack, "--max-tokens", 5, "--memory", "200MiB")
    terminal.expect("/help for help")
    terminal.expect("> ")
    terminal.send("Hello\n")
    terminal.expect("[")
    terminal.expect("bits/weight")
    terminal.expect("> ")
    terminal.send("/memory 150MiB\n")
    terminal.expect("150.0 MiB: ")
    terminal.send("/memory 1MiB\n")
    terminal.expect("give at least")
    terminal.send("/memory lots\n")
    terminal.expect("is not a size")
    terminal.send("/report\n")
    terminal.expect("interpreter")
    terminal.expect("peak")
    terminal.send("/help\n")
    terminal.expect("/memory SIZE")
    terminal.send("/nonsense\n")
    terminal.expect("there is no command")
    terminal.send("/reset\n")
    terminal.expect("forgotten")
    terminal.send("Again\n")
    terminal.expect("bits/weight")
    terminal.send("/quit\n")
    assert terminal.close() == 0


def test_ctrl_c_ends_the_answer_and_not_the_program(tmp_path: Path) -> None:
    # A model that never ends an answer, with room for a very long one.
    path = write_tiny_pack(
        tmp_path / "endless.pack",
        least=1,
        context=2**18,
        tokens={"bos": 256, "eos": [], "add_bos": False},
    )
    terminal = Terminal("run", path, "--max-tokens", 2**18, "--temperature", 900, "--seed", 1)
    for text in ("Hello", "Again"):
        terminal.expect("> ")
        terminal.send(f"{text}\n")
        terminal.expect(text)  # what was typed, shown
        terminal.expect("e")  # a letter of the answer
        terminal.process.send_signal(signal.SIGINT)
        terminal.expect(", interrupted; ")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.close() == 0


# --- plan


def test_plan_shows_what_fits(run: Run, pack: Path) -> None:
    code, out, err = run("plan", pack)
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "smallest" in out
    code, out, _ = run("plan", pack, "--json")
    found = json.loads(out)
    sizes = found["sizes"]
    assert found["smallest"]["rungs"] == 1
    assert sizes[-1]["rungs"] == found["rungs_of_pack"]
    rungs = [size["rungs"] for size in sizes]
    assert rungs == sorted(rungs)
    for size in sizes:
        assert size["total"] == sum(size["parts"].values()) <= size["memory"]
        assert size["context"] <= size["largest_context"] <= 1024


def test_plan_answers_for_one_size_as_run_does(run: Run, pack: Path) -> None:
    code, out, _ = run("plan", pack, "--memory", "4GiB", "--context", 700)
    assert code == 0
    assert re.search(r"^sum +\d", out, re.M)
    code, out, _ = run("plan", pack, "--memory", "4GiB", "--context", 700, "--json")
    plan = json.loads(out)["plan"]
    assert plan["context"] == 700
    code, out, _ = run("run", pack, *("--memory", "4GiB", "--context", 700, "-p", "x"), "--json")
    report = json.loads(out)["report"]
    assert report["rungs"] == plan["rungs"]
    assert abs(report["resident"] - plan["total"]) < 8 * 2**20
    code, _, err = run("plan", pack, "--memory", "3MiB")
    assert code == 1
    assert "sum" in err


# --- eval and bench


def test_plan_predicts_the_resident_set_of_a_model_whose_context_is_full(pack: Path) -> None:
    program = """if True:
        import json, sys, pliant
        with pliant.load(sys.argv[1], memory="90MiB", context=1000) as model:
            with model.session() as session:
                session.feed([1] * 1000)
                assert model.audit().ok
                print(json.dumps({"resident": model.report().resident}))
    """
    limits = ["--memory", "90MiB", "--context", "1000", "--json"]
    plan, resident = (
        json.loads(
            subprocess.run(
                [sys.executable, *command],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for command in (["-m", "pliant", "plan", str(pack), *limits], ["-c", program, str(pack)])
    )
    assert 0 <= plan["plan"]["total"] - resident["resident"] <= 8 * 2**20


def test_eval_measures_at_many_sizes(run: Run, pack: Path, tmp_path: Path) -> None:
    text, picture = tmp_path / "text.txt", tmp_path / "kl.png"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    arguments = ("eval", pack, "--text", text, "--window", 128, "--tokens", 300)
    sizes = ("--weights", "60KB", "100KB", "--memory", "4GiB", "--plot", picture)
    code, out, _ = run(*arguments, *sizes, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["tokens"] == 256
    assert "all rungs" in found["reference"]
    deep, middle, low = found["sizes"]
    assert (deep["memory"], deep["kl"], deep["top1"]) == (4 * 2**30, 0.0, 1.0)
    assert deep["perplexity"] == pytest.approx(found["reference_perplexity"])
    assert middle["kl"] > 0.01
    assert low["kl"] > 0.01
    assert 0 <= low["top1"] < 1
    assert low["weights"] <= 60_000 < middle["weights"] <= 100_000
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = run(*arguments)
    assert code == 0
    assert "all rungs of the pack" in out
    assert "measuring" in err
    assert all(len(line) <= 80 for line in out.splitlines()[2:])


def test_eval_asks_for_single_facts(run: Run, tmp_path: Path) -> None:
    pack = write_tiny_pack(tmp_path / "long.pack", least=4, head_dim=64, hidden=128, context=2048)
    text, picture = tmp_path / "text.txt", tmp_path / "kv.png"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    arguments = ["eval", pack, "--text", text, "--tokens", 100, "--window", 50, "--kv", 4.5]
    arguments += ["--tasks", "needle,lookup", "--samples", 2, "--lengths", 2048]
    code, out, err = run(*arguments, "--plot", picture)
    assert code == 0
    assert "asking" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines[2:])
    assert sum(line.startswith(("needle", "lookup")) for line in lines) == 2
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["exact_perplexity"] > 1
    one = found["kv"][0]
    assert one["bits"] <= 4.5
    needles, lookups = found["tasks"]
    assert (needles["task"], needles["length"]) == ("needle", 2048)
    assert (needles["answers"], needles["contexts"], lookups["answers"]) == (10, 2, 16)
    for way in ("as_run", "all_coded"):
        coded = needles["caches"][f"{one['name']} {way}"]
        change = coded["likelihood"] - needles["caches"]["exact"]["likelihood"]
        assert coded["likelihood_change"] == pytest.approx(change, abs=1e-9)
        assert coded["likelihood_change_error"] > 0
    assert len(found["answers"]) == 26


def test_divergence_is_the_definition() -> None:
    rng = np.random.default_rng(0)
    mine = rng.normal(size=(37, 50)).astype(np.float32)
    theirs = rng.normal(size=(37, 50)).astype(np.float32)
    tokens = rng.integers(0, 50, 36).tolist()
    p, q = (
        np.exp(x - x.max(-1, keepdims=True)) for x in (theirs.astype(float), mine.astype(float))
    )
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    each = (p * np.log(p / q)).sum(-1)
    sums = Divergence()
    for start, stop in ((0, 20), (20, 37)):
        sums.begin_window()
        sums.add(mine[start:stop], tokens[start:stop], theirs[start:stop])
    found = sums.values()
    assert found["positions"] == 37
    assert found["kl"] == pytest.approx(each.mean())
    assert found["kl_median"] == pytest.approx(np.median(each))
    spread = abs(each[:20].mean() - each[20:].mean()) / 2
    assert found["kl_error"] == pytest.approx(spread)
    assert found["top1"] == pytest.approx((mine.argmax(-1) == theirs.argmax(-1)).mean())
    losses = -np.log(q[np.arange(36), tokens])
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()))
    assert np.exp(log_softmax(mine)).sum(-1) == pytest.approx(1)
    same = Divergence()
    same.add(mine, tokens, mine)
    assert same.values()["kl"] == 0
    alone = Divergence()
    alone.add(mine, tokens)
    assert alone.values()["kl"] is None


def test_bench_measures_at_many_sizes(run: Run, pack: Path) -> None:
    quick = ("--prompt-tokens", 20, "--tokens", 5, "--repeat", 2)
    code, out, _ = run("bench", pack, *quick, "--weights", "60KB", "--batch", 2, "--json")
    assert code == 0
    found = json.loads(out)
    (size,) = found["sizes"]
    assert found["batch"] == 2
    assert size["weights"] <= 60_000
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "bandwidth", "share"):
        assert size[key] > 0
    code, out, _ = run("bench", pack, *quick, "--memory", "4GiB", "--isa", "plain")
    assert code == 0
    assert "plain" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_bench_walks(run: Run, pack: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "walk.png"
    code, out, err = run("bench", pack, "--walk", "2", "--batch", "2", "--plot", plot, "--json")
    assert code == 0, err
    answer = json.loads(out)
    least, most = answer["least"], answer["most"]
    budgets = [move["budget"] for move in answer["moves"]]
    assert len(budgets) == 14
    assert (budgets[0], min(budgets), max(budgets)) == (most, least, most)
    assert all(least <= sample["budget"] <= most for sample in answer["samples"])
    assert answer["samples"][-1]["budget"] == budgets[-1]
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("bench", pack, "--walk", "1")
    assert code == 0
    assert "less memory: given back after at most" in out
    for wrong in (["--plot", plot], ["--walk", "1", "--weights", "1MB"], ["--walk", "0"]):
        assert run("bench", pack, *wrong)[0] == 2
