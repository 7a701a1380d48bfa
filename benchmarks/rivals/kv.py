"""Coded KV caches of pliant and of llama.cpp, on the same tokens and with the same questions.

    python benchmarks/rivals/kv.py ids PACK --text FILE --model smollm2
    python benchmarks/rivals/kv.py ours PACK --model smollm2
    python benchmarks/rivals/kv.py theirs F32.gguf --model smollm2
    python benchmarks/rivals/kv.py table --model smollm2

`ids` writes windows of text and what `pliant.engine.recall` asks to WORK/MODEL/kv_ids.json. `ours`
and `theirs` measure each program's coded caches against its own exact one, with the same weights:
KL divergence over the windows, and whether answers are right. Each job is written to WORK when it
is done and not done again; with --seconds N no job begins after so many, and status 3 says that
there are more. `table` puts both together. They meet through files, so `theirs` needs numpy and
llama-cpp-python only.

llama.cpp codes each token at once, in all layers; pliant keeps the newest page of 32 tokens exact,
so its figures are given twice: as it runs, and with every token coded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import Floats, llama_errors_only, log_softmax, machine, markdown, write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"
PAGE = 32
BATCH = 256  # tokens of a step of llama.cpp, with at most so many rows of logits
ROWS = 8  # looked at together: small enough to stay in the cache
WINDOWS = {512: 4, 8192: 1}  # tokens, and how many windows of them
SAMPLES = {1024: 4, 4096: 2, 8192: 1}  # tokens, and how many contexts of each kind
BITS = (3.25, 4.25, 5.25)
LABELLED = 2048  # tokens after which a cache has the bits that tables name
LONG_BITS, LONG_TYPE = 4.25, "q4_0"  # the only caches that longer texts are read with
SIDES = {"llama.cpp": "theirs", "pliant": "ours"}
MORE = 3  # exit status: there are jobs left

Job = dict[str, Any]


def jobs(path: Path) -> list[tuple[str, Job]]:
    """All that is to be measured, with a name for each, in the order of their length."""
    data: dict[str, list[Job]] = json.loads(path.read_text(encoding="utf-8"))
    found = [(f"kl {one['length']} {one['number']}", one) for one in data["windows"]]
    for one in data["samples"]:
        kind = one["branches"][0][0]["task"]
        found.append((f"ask {kind} {one['length']} {one['number']}", one))
    return sorted(found, key=lambda job: int(job[1]["length"]))


# --- ids


def write_ids(options: argparse.Namespace) -> None:
    """Windows and samples as ids, for both programs."""
    import pliant
    from pliant.engine.kv_quality import compared
    from pliant.engine.recall import make_samples

    text = options.text.read_text(encoding="utf-8")
    with pliant.load(options.pack, chat=False) as model:
        begin = list(model.pack.manifest.tokens.begin)
        vocab = model.pack.manifest.model.vocab
        ids = list(model.tokenizer.encode(text, add_special=False, parse_special=False))
        windows, at = [], 0
        for length, count in WINDOWS.items():
            for number in range(count):
                fresh = length - len(begin)
                if at + fresh > len(ids):
                    raise SystemExit(f"{options.text} has only {len(ids)} tokens")
                windows.append(
                    {
                        "length": length,
                        "number": number,
                        "every": compared(length, vocab, PAGE),
                        "ids": begin + ids[at : at + fresh],
                    }
                )
                at += fresh
        samples = []
        for length, count in SAMPLES.items():
            samples += make_samples(
                model.tokenizer, text, lengths=[length], samples=count, begin=begin
            )
    data = {"begin": begin, "windows": windows, "samples": [asdict(one) for one in samples]}
    folder = options.work / options.model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kv_ids.json").write_text(json.dumps(data), encoding="utf-8")


# --- pliant


def ours(options: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Job], Any]]:
    """About pliant, and what measures a job with it."""
    import pliant
    from pliant.engine.kv_quality import WAYS, Caches, kv_quality, kv_recall
    from pliant.engine.recall import Asked, Sample

    begin = json.loads((options.work / options.model / "kv_ids.json").read_text())["begin"]
    caches = Caches(options.pack, BITS, threads=options.threads)
    figures = {f"{bits:g} {way}": caches.figures(bits, LABELLED) for bits in BITS for way in WAYS}

    def measure(job: Job) -> Any:
        caches.bits = sorted(BITS, reverse=True)
        if job["length"] >= options.long:
            caches.bits = [LONG_BITS]
        if "ids" in job:
            found = kv_quality(caches, [job["ids"]])
            return {
                f"{one['name']} {way}": kept(one[way], found["exact"]["perplexity"])
                for one in found["coded"]
                for way in WAYS
            }
        branches = tuple(
            tuple(Asked(**{k: v if k == "task" else tuple(v) for k, v in one.items()}) for one in b)
            for b in job["branches"]
        )
        sample = Sample(job["length"], job["number"], tuple(job["context"]), branches)
        return kv_recall(caches, [sample], begin=begin)["answers"]

    return {"engine": f"pliant {pliant.__version__}", "caches": figures}, measure


def kept(values: dict[str, Any], exact: float) -> dict[str, Any]:
    """Of a window: what is put together in the end."""
    names = ("positions", "kl", "top1", "perplexity", "by_position")
    return {name: values[name] for name in names} | {"exact_perplexity": exact}


# --- llama.cpp


def theirs(options: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Job], Any]]:
    """About llama.cpp, and what measures a job with it."""
    import llama_cpp

    llama_errors_only()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(options.pack).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp could not load {options.pack}")
    kinds = {
        "exact": (llama_cpp.GGML_TYPE_F16, 16.0),
        "q8_0": (llama_cpp.GGML_TYPE_Q8_0, 8.5),
        "q4_0": (llama_cpp.GGML_TYPE_Q4_0, 4.5),
    }
    caches = {name: _Llama(model, kind, options.threads) for name, (kind, _) in kinds.items()}
    begin = json.loads((options.work / options.model / "kv_ids.json").read_text())["begin"]

    def measure(job: Job) -> Any:
        names = ("exact", LONG_TYPE) if job["length"] >= options.long else tuple(caches)
        some = {name: caches[name] for name in names}
        return compare(some, job) if "ids" in job else ask(some, job, begin)

    values = kv_values(model)
    figures = {
        name: {"bits": bits, "bytes_per_token": round(values * bits / 8)}
        for name, (_, bits) in kinds.items()
    }
    about = {
        "engine": f"llama.cpp, llama-cpp-python {llama_cpp.__version__}",
        "system": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
        "file": options.pack.name,
        "caches": figures,
    }
    return about, measure


def kv_values(model: Any) -> int:
    """Keys and values of a token, in all layers."""
    import llama_cpp

    heads = llama_cpp.llama_model_n_head_kv(model)
    text = ctypes.create_string_buffer(256)
    name = llama_cpp.llama_model_meta_val_str
    name(model, b"general.architecture", text, len(text))
    key = text.value + b".attention.key_length"
    if name(model, key, text, len(text)) < 0:
        width = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    else:
        width = int(text.value)
    return int(llama_cpp.llama_model_n_layer(model)) * int(heads) * int(width) * 2


class _Llama:
    """A context of llama.cpp with one sequence and one type of KV cache, with flash attention."""

    def __init__(self, model: Any, kind: int, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(max(WINDOWS), max(SAMPLES)) + BATCH
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = kind
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = True  # so that branches can go back inside of sliding windows
        self._context: Any = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not make a context with KV of type {kind}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._length = 0

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if not self._lib.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise RuntimeError("llama.cpp could not go back in its KV cache")
        self._length = length

    def feed(
        self, ids: Sequence[int], wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Floats]]:
        """Read ids; yields each wanted place in them and its logits: float32 [vocabulary], which
        the next step overwrites."""
        batch = self._batch
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                batch.token[index] = token
                batch.pos[index] = self._length + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = wanted(start + index)
            code = self._lib.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"llama.cpp could not decode (code {code})")
            self._length += len(part)
            for index in range(len(part)):
                if wanted(start + index):
                    pointer = self._lib.llama_get_logits_ith(self._context, index)
                    yield start + index, np.ctypeslib.as_array(pointer, shape=(self.vocab,))


def compare(caches: dict[str, _Llama], job: Job) -> dict[str, Any]:
    """KL of each coded cache against the exact one, over the pages that pliant is scored on."""
    ids, every = job["ids"], job["every"]

    def wanted(at: int) -> bool:
        return at // PAGE % every == every - 1

    places = [at for at in range(len(ids)) if wanted(at)]
    rows = np.empty((len(places), caches["exact"].vocab), np.float32)
    found: dict[str, Any] = {}
    for name, cache in caches.items():
        cache.cut(0)
        sums = np.zeros((4, 2))  # KL and positions by quarter
        loss = targets = agreed = 0.0
        held = rows if name == "exact" else np.empty_like(rows)
        for index, (_, row) in enumerate(cache.feed(ids, wanted)):
            held[index] = row
        for start in range(0, len(places), ROWS):
            at = np.array(places[start : start + ROWS])
            mine = log_softmax(held[start : start + ROWS])
            inside = at + 1 < len(ids)
            loss -= mine[inside, np.array(ids)[at[inside] + 1]].sum()
            targets += inside.sum()
            if name == "exact":
                continue
            exact = log_softmax(rows[start : start + ROWS])
            agreed += (mine.argmax(-1) == exact.argmax(-1)).sum()
            kl = np.maximum((np.exp(exact) * (exact - mine)).sum(-1), 0.0)
            np.add.at(sums, at * 4 // len(ids), np.stack([kl, np.ones_like(kl)], -1))
        perplexity = float(np.exp(loss / targets))
        if name == "exact":
            original = perplexity
            continue
        values = {
            "positions": len(places),
            "kl": float(sums[:, 0].sum() / len(places)),
            "top1": float(agreed / len(places)),
            "perplexity": perplexity,
            "by_position": (sums[:, 0] / sums[:, 1]).tolist(),
        }
        found[name] = kept(values, original)
    return found


def ask(caches: dict[str, _Llama], job: Job, begin: list[int]) -> list[dict[str, Any]]:
    """The answers to a sample, in the form of `pliant.engine.kv_quality.kv_recall`."""
    context = job["context"]
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name, cache in caches.items():
        cache.cut(0)
        for _ in cache.feed(context, lambda at: False):
            pass
        found[name] = []
        for branch in job["branches"]:
            cache.cut(len(context))
            found[name].append(answered(cache, [], branch))
    answers = []
    for index, branch in enumerate(job["branches"]):
        caches["exact"].cut(0)
        alone = answered(caches["exact"], begin, branch)
        for place, one in enumerate(branch):
            answers.append(
                {
                    "task": one["task"],
                    "length": job["length"],
                    "sample": job["number"],
                    "depth": one["at"][0] / len(context),
                    "alone": alone[place]["likelihood"],
                    "caches": {name: scores[index][place] for name, scores in found.items()},
                }
            )
    return answers


def answered(cache: _Llama, rest: list[int], branch: list[Job]) -> list[dict[str, Any]]:
    """Scores of a branch that follows `rest`."""
    ids, targets = list(rest), {}
    for number, one in enumerate(branch):
        ids += one["question"]
        for token in one["answer"]:
            targets[len(ids) - 1] = (number, token)
            ids.append(token)
    scores = [{"right": True, "likelihood": 0.0} for _ in branch]
    for at, row in cache.feed(ids, lambda at: at in targets):
        number, token = targets[at]
        chances = log_softmax(row[None])[0]
        scores[number]["right"] &= bool(chances.argmax() == token)
        scores[number]["likelihood"] += float(chances[token])
    return scores


# --- all of it


def run(options: argparse.Namespace) -> int:
    """Do the jobs that are left; returns the exit status."""
    folder = options.work / options.model
    out = folder / f"kv_{options.part}.json"
    result: dict[str, Any] = {"jobs": {}}
    if out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    todo = [job for job in jobs(folder / "kv_ids.json") if job[0] not in result["jobs"]]
    if not todo:
        return 0
    begin = time.monotonic()
    about, measure = (ours if options.part == "ours" else theirs)(options)
    result |= about | {"machine": machine()}
    for name, job in todo:
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            return MORE
        result["jobs"][name] = measure(job)
        write_json(out, result)
        print(f"{time.monotonic() - begin:.0f} s: {name}", file=sys.stderr, flush=True)
    return 0


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """What both programs measured, put together: KL by length of the windows, and tasks."""
    result: dict[str, Any] = {"model": options.model}
    found = {}
    for side, part in SIDES.items():
        path = options.work / options.model / f"kv_{part}.json"
        if not path.exists():
            raise SystemExit(f"{path} is not there: run kv.py {part} first")
        found[side] = json.loads(path.read_text(encoding="utf-8"))
    both = set.intersection(*(set(one["jobs"]) for one in found.values()))
    kinds = {name.rpartition(" ")[0] for name in both}
    for side, one in found.items():
        # What both have read; and what only one has, if the other has nothing of that kind.
        done = {
            name: job
            for name, job in one.pop("jobs").items()
            if name in both or name.rpartition(" ")[0] not in kinds
        }
        lengths = sorted({int(name.split()[1]) for name in done if name.startswith("kl")})
        kl = {str(n): kl_of(done, n) for n in lengths}
        result[side] = one | {"kl": kl, "tasks": tasks_of(done, both)}
    return result


def kl_of(done: dict[str, Any], length: int) -> dict[str, Any]:
    """For each cache means over the windows of a length, by their positions."""
    windows = [job for name, job in done.items() if name.startswith(f"kl {length} ")]
    result = {}
    for cache in windows[0]:
        found = [window[cache] for window in windows]
        weights = [one["positions"] for one in found]
        values: dict[str, Any] = {"windows": len(found), "positions": sum(weights)}
        for figure in ("kl", "top1"):
            values[figure] = float(np.average([one[figure] for one in found], weights=weights))
        for figure in ("perplexity", "exact_perplexity"):
            logs = np.log([one[figure] for one in found])
            values[figure] = float(np.exp(np.average(logs, weights=weights)))
        each = [one["kl"] for one in found]
        error = np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else None
        quarters = np.average([one["by_position"] for one in found], axis=0, weights=weights)
        values |= {"kl_error": error, "by_position": quarters.tolist()}
        result[cache] = values
    return result


def tasks_of(done: dict[str, Any], both: set[str]) -> list[dict[str, Any]]:
    """Tasks by length, and over all lengths, which is length 0, of what both programs have read."""
    from pliant.engine.recall import Score, summarise

    answers, pooled = [], []
    for name, job in done.items():
        if not name.startswith("ask"):
            continue
        for one in job:
            scores = {cache: Score(**score) for cache, score in one["caches"].items()}
            answers.append(one | {"caches": scores})
            if name in both:
                context = (one["length"], one["sample"])
                pooled.append(answers[-1] | {"length": 0, "sample": context})
    return summarise(answers + pooled)


def tables(result: dict[str, Any]) -> str:
    """KL, right answers and log-likelihood as markdown; caches of both programs by their bits."""
    caches = [
        (figures["bits"], side, name, figures["bytes_per_token"])
        for side in SIDES
        for name, figures in result[side]["caches"].items()
        if name != "exact"
    ]
    caches.sort(key=lambda cache: (-cache[0], cache[1], cache[2]))
    lengths = list(result["pliant"]["kl"])
    rows = []
    for bits, side, name, size in caches:
        row = [label(side, name), f"{bits:.2f}", f"{size:,}"]
        for length in lengths:
            one = result[side]["kl"].get(length, {}).get(name)
            if one is None:
                row += ["-"] * 3
                continue
            row += [f"{one['kl']:.4f}", f"{one['top1']:.1%}"]
            row.append(f"{one['perplexity'] / one['exact_perplexity'] - 1:+.2%}")
        last = result[side]["kl"].get(lengths[-1], {}).get(name, {"by_position": ()})
        rows.append([*row, " ".join(f"{kl:.4f}" for kl in last["by_position"]) or "-"])
    titles = [f"{what}, {n}" for n in lengths for what in ("KL", "top-1", "perplexity")]
    text = markdown(["cache", "bits", "bytes a token", *titles, "KL by quarter"], rows)

    tasks: dict[tuple[str, int], dict[str, Any]] = {}
    for side in SIDES:
        for one in result[side]["tasks"]:
            tasks.setdefault((one["task"], one["length"]), {})[side] = one
    few = {LONG_TYPE} | {name for bits, side, name, _ in caches if near(bits, side)}
    some = [cache for cache in caches if cache[2] in few]
    place = {one["task"]: at for at, one in enumerate(result["pliant"]["tasks"])}
    rows, deep = [], []
    for (task, length), sides in sorted(
        tasks.items(), key=lambda one: (place[one[0][0]], one[0][1])
    ):
        if not length and sides["pliant"]["answers"] in {
            tasks[one]["pliant"]["answers"] for one in tasks if one[0] == task and one[1]
        }:
            continue  # of a single length: the same once more
        exact = [sides[side]["caches"]["exact"] for side in SIDES if side in sides]
        row = [task, str(length or "all"), str(sides["pliant"]["answers"])]
        row += [" / ".join(f"{one['right']:.0%}" for one in exact)]
        found = [sides.get(side, {"caches": {}})["caches"].get(name) for _, side, name, _ in caches]
        kept_of = [one for one, cache in zip(found, caches, strict=True) if cache in some]
        row += [f"{one['right']:.0%}" if one else "-" for one in kept_of]
        row += [f"{sides['pliant']['alone']:.1f}"]
        row += [" / ".join(f"{one['likelihood']:.2f}" for one in exact)]
        rows.append([*row, *map(changed, kept_of)])
        if length and all(found):
            deep.append([task, str(length), *map(changed, found)])
    heads = [f"{label(side, name)}, {bits:.2f}" for bits, side, name, _ in some]
    text += (
        "\n\nRight answers; log-likelihood in nats (exact: llama.cpp / pliant), and its change\n\n"
    )
    titles = ["task", "tokens", "answers", "right, exact", *heads, "nats, no context", "exact"]
    text += markdown([*titles, *heads], rows)
    if not deep:
        return text
    heads = [f"{label(side, name)}, {bits:.2f}" for bits, side, name, _ in caches]
    text += "\n\nChange of log-likelihood, all caches\n\n"
    return text + markdown(["task", "tokens", *heads], deep)


def near(bits: float, side: str) -> bool:
    """Whether these are the bits of the cache that longer texts are read with."""
    return side == "pliant" and LONG_BITS - 0.5 < bits <= LONG_BITS


def changed(one: dict[str, float | None] | None) -> str:
    """A change of log-likelihood with its error."""
    if one is None:
        return "-"
    change, error = one["likelihood_change"], one["likelihood_change_error"]
    return f"{change:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def label(side: str, name: str) -> str:
    """A cache for readers."""
    return name if side != "pliant" else f"pliant {name.split()[1]}".replace("_", " ")


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("part", choices=("ids", "ours", "theirs", "table"))
    parser.add_argument("pack", nargs="?", type=Path, help="theirs: a GGUF file")
    parser.add_argument("--model", required=True, help="its name in WORK and results")
    parser.add_argument("--text", type=Path, help="ids: UTF-8 text to measure on")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/kv_MODEL.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--long", type=int, default=4096, help="texts from so many tokens on with few caches only"
    )
    parser.add_argument("--seconds", type=float, help="begin no job after so many")
    options = parser.parse_args()
    if options.part == "table":
        result = collect(options)
        write_json(options.out or RESULTS / f"kv_{options.model}.json", result)
        print(tables(result))
        return 0
    if options.pack is None:
        parser.error(f"{options.part} needs a pack, or a GGUF file")
    if options.part == "ids":
        if options.text is None:
            parser.error("ids needs --text")
        write_ids(options)
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
