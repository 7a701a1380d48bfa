"""What both sides of a comparison share: the windows, the score, the clock, the machine.

Needs numpy only, so that it runs in the environment of a rival as well as in that of pliant.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 512  # tokens of one window, and of the prompt whose prefill is timed
DECODED = 128  # tokens of which decoding is timed
REPEATS = 5  # timings of which the median is reported
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
ROWS = 64  # positions scored at once: bounds the float64 copies to 64 x vocabulary

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_callbacks: list[Any] = []  # llama.cpp holds a pointer to each


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """log softmax over the last axis of float32 [rows, vocabulary], in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    total: npt.NDArray[np.float64] = np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    wide -= total
    return wide


@dataclass
class Score:
    """Sums over positions, from which the figures of one engine at one size follow.

    KL(source || engine) and agreement of the most probable token count every position; the
    perplexity counts the positions that have a next token inside their window.
    """

    kl_sum: float = 0.0
    agreed: int = 0
    positions: int = 0
    nll_sum: float = 0.0
    source_nll_sum: float = 0.0
    predicted: int = 0

    def add(self, ids: Ids, source: Floats, engine: Floats) -> None:
        """Count one window: ids [tokens], logits of both float32 [tokens, vocabulary].

        Raises ValueError if the shapes differ or the engine gave a value that is not finite.
        """
        if source.shape != engine.shape or len(ids) != len(source):
            shapes = f"{ids.shape}, {source.shape}, {engine.shape}"
            raise ValueError(f"token ids, source logits and engine logits do not match: {shapes}")
        for at in range(0, len(ids), ROWS):
            log_p = log_softmax(np.asarray(source[at : at + ROWS]))
            log_q = log_softmax(np.asarray(engine[at : at + ROWS]))
            if not np.isfinite(log_q).all():
                raise ValueError("the engine gave logits that are not finite")
            self.agreed += int((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())
            following = ids[at + 1 : at + 1 + len(log_p)]
            rows = np.arange(len(following))
            self.nll_sum -= float(log_q[rows, following].sum())
            self.source_nll_sum -= float(log_p[rows, following].sum())
            self.predicted += len(following)
            self.positions += len(log_p)
            log_q -= log_p
            self.kl_sum -= float(np.einsum("tv,tv->", np.exp(log_p), log_q))

    def figures(self) -> dict[str, float]:
        """Mean KL in nats, share of agreeing top tokens, perplexities."""
        return {
            "kl": self.kl_sum / self.positions,
            "top1": self.agreed / self.positions,
            "perplexity": float(np.exp(self.nll_sum / self.predicted)),
            "source_perplexity": float(np.exp(self.source_nll_sum / self.predicted)),
        }


@dataclass(frozen=True)
class Reference:
    """Windows of token ids, int32 [windows, 512], and the logits of the source model for them."""

    ids: Ids
    logits: npt.NDArray[np.float32]  # [windows, 512, vocabulary], mapped from the file
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, windows: int | None = None) -> Reference:
        """Read what reference.py wrote; FileNotFoundError says to run it first."""
        if not (folder / "about.json").exists():
            raise FileNotFoundError(f"no reference in {folder}: run reference.py first")
        about = json.loads((folder / "about.json").read_text())
        logits = np.load(folder / "logits.npy", mmap_mode="r")
        ids = np.load(folder / "ids.npy").astype(np.int32)
        held = len(logits)
        if windows is not None and windows > held:
            raise ValueError(f"the reference has {held} windows, {windows} were asked for")
        count = windows or held
        return cls(ids[:count], logits[:count], about)

    def score(self, engine: Callable[[Ids], Floats]) -> dict[str, float]:
        """Figures of an engine, given as a function from ids [512] to logits [512, vocabulary]."""
        total = Score()
        for window, source in zip(self.ids, self.logits, strict=True):
            total.add(window, source, engine(window))
        return total.figures() | {"tokens": total.positions}


def speeds(prefill: Callable[[int], None], decode: Callable[[int], None]) -> dict[str, Any]:
    """Tokens a second: medians and ranges of REPEATS runs, after one that is not counted.

    ``prefill`` reads a prompt of WINDOW tokens into an empty context, ``decode`` goes on from there
    for DECODED tokens, one at a time. Both get the number of the run, so that prompts may differ.
    These are the steps that ``pliant bench`` times, under the same names.
    """
    read, decoded = [], []
    for run in range(REPEATS + 1):
        begin = time.perf_counter()
        prefill(run)
        middle = time.perf_counter()
        decode(run)
        end = time.perf_counter()
        if run:
            read.append(WINDOW / (middle - begin))
            decoded.append(DECODED / (end - middle))
    result: dict[str, Any] = {}
    for name, rates in (("prefill", read), ("decode", decoded)):
        result[f"{name}_tokens_per_second"] = round(statistics.median(rates), 1)
        result[f"{name}_range"] = [round(min(rates), 1), round(max(rates), 1)]
    return result


def read_bandwidth(threads: int = 2, mebibytes: int = 1024) -> int:
    """Median bytes a second of ``threads`` threads that together sum one large array."""
    parts = np.array_split(np.ones(mebibytes * 2**17, dtype=np.int64), threads)
    seconds = []
    for _ in range(REPEATS):
        workers = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - begin)
    return round(mebibytes * 2**20 / statistics.median(seconds))


def load_average() -> float:
    """Runnable processes of the last minute: timing means little much above the threads used."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    """Model and count of the processors, and the instruction sets that matter here."""
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "gfni", "amx_int8", "asimddp", "i8mm")
    about: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        about.setdefault(key.strip(), value.strip())
    held = (about.get("flags") or about.get("Features") or "").split()
    return {
        "cpu": about.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "instructions": [name for name in wanted if name in held],
    }


def llama_errors_only() -> None:
    """Let llama.cpp print its errors, and nothing else of all that it tells."""
    import llama_cpp

    def show(level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    _callbacks.append(llama_cpp.llama_log_callback(show))
    llama_cpp.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))


def write_json(path: Path, value: object) -> None:
    """Write a result, readable and with a stable order of its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table; the first column is text, the others are figures."""
    titles = list(head)
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
