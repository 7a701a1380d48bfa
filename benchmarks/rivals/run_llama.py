"""llama.cpp on the same source: ``python benchmarks/rivals/run_llama.py SOURCE.gguf --out JSON``.

Dequantises every tensor of the source to an F32 GGUF file with the same metadata, lets llama.cpp's
own quantiser make its usual files out of it, and gives for each: bytes, mean KL to the source
model, agreement of the top token, perplexity, and tokens a second. llama.cpp gets token ids, never
text, so both sides see the same windows. reference.py must have been run before.

The F32 file itself is measured too: its KL says how well two programs can agree at all. Where
imatrix.py was run before, every file is also made and scored with an importance matrix.
Needs llama-cpp-python, gguf and numpy (``pip install -e .[bench]``).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from common import (
    DECODED,
    WINDOW,
    Floats,
    Ids,
    Reference,
    llama_errors_only,
    load_average,
    machine,
    markdown,
    read_bandwidth,
    speeds,
    write_json,
)
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

FTYPES: dict[str, int] = {
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def write_f32(source: Path, out: Path) -> None:
    """The source with every tensor in F32; the metadata stays, but for the file type."""
    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(partial, architecture)
    derived = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in derived:
            continue
        array = field.types[0] == GGUFValueType.ARRAY
        kind = field.types[-1] if array else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def importance(path: Path) -> tuple[Any, object]:
    """What imatrix.py wrote, as llama.cpp wants it, and what must live as long as that is used."""
    tensors = [
        (name.encode(), np.ascontiguousarray(values, dtype=np.float32))
        for name, values in np.load(path).items()
    ]
    array = (llama_cpp.llama_model_imatrix_data * (len(tensors) + 1))()  # the last has no name
    for entry, (name, values) in zip(array, tensors, strict=False):
        entry.name = name
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return array, tensors


def quantise(f32: Path, out: Path, name: str, imatrix: Path | None, threads: int) -> None:
    """Let llama.cpp write its file ``name``; RuntimeError if it does not."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[name]
    params.nthread = threads
    if imatrix is not None:
        params.imatrix, _alive = importance(imatrix)
    partial = out.with_suffix(".partial")
    failed = llama_cpp.llama_model_quantize(
        str(f32).encode(), str(partial).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {f32} to {name} (code {failed})")
    partial.rename(out)


def tensor_figures(path: Path, source: Path) -> dict[str, Any]:
    """Bytes of all tensors, bytes in each of llama.cpp's formats, and share like the source.

    llama.cpp replaces formats that need rows of 256 values where a row does not divide. Where the
    source holds a matrix in the very same format, quantising it once more costs nearly nothing:
    a file with a large share of such matrices says little about its format. The share is that of
    the bytes of the matrices inside the layers.
    """
    before = {tensor.name: tensor.tensor_type for tensor in GGUFReader(source).tensors}
    held: dict[str, int] = {}
    same = inside = 0
    for tensor in GGUFReader(path).tensors:
        kind, size = tensor.tensor_type.name, int(tensor.n_bytes)
        held[kind] = held.get(kind, 0) + size
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            inside += size
            same += size * (tensor.tensor_type == before[tensor.name])
    share = round(same / inside, 3)
    return {"tensor_bytes": sum(held.values()), "formats": held, "source_share": share}


class Engine:
    """One file in llama.cpp, with a context for a prompt and what is decoded after it."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = WINDOW + DECODED
        params.n_batch = params.n_ubatch = WINDOW
        params.n_threads = params.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {path}")
        self.batch = llama_cpp.llama_batch_init(WINDOW, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def _decode(self, ids: Ids, first: int, every: bool) -> None:
        """Run ids at positions from ``first`` on; logits of every position or of the last."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = int(token)
            batch.pos[index] = first + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index + 1 == len(ids)
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama.cpp could not decode (code {code})")

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def logits(self, ids: Ids) -> Floats:
        """float32 [tokens, vocabulary]: a view that the next call overwrites."""
        self._clear()
        self._decode(ids, 0, True)
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(len(ids), self.vocabulary))

    def prefill(self, ids: Ids) -> None:
        self._clear()
        self._decode(ids, 0, False)
        llama_cpp.llama_synchronize(self.context)

    def decode(self, ids: Ids, first: int) -> None:
        """The ids one at a time from position ``first`` on, each with its logits."""
        for index in range(len(ids)):
            self._decode(ids[index : index + 1], first + index, False)
            llama_cpp.llama_synchronize(self.context)


@contextmanager
def running(path: Path, threads: int) -> Iterator[Engine]:
    """An engine that is closed in the end."""
    engine = Engine(path, threads)
    try:
        yield engine
    finally:
        engine.close()


def quality(path: Path, source: Path, reference: Reference, threads: int) -> dict[str, Any]:
    """Bytes and score of one file."""
    result: dict[str, Any] = {"file_bytes": path.stat().st_size} | tensor_figures(path, source)
    with running(path, threads) as engine:
        if reference.about["vocabulary"] != engine.vocabulary:
            raise ValueError(f"{path} has {engine.vocabulary} tokens, the reference another number")
        return result | reference.score(engine.logits)


def weights_only(path: Path, reference: Reference, threads: int) -> float:
    """KL of a file whose weights are taken back to F32: what is lost in the weights alone.

    llama.cpp also quantises the activations, to 8 bits, which is most of the KL of its largest
    files. Both figures are given, since a program that does not do so reaches this one.
    """
    wide = path.with_name("widened.gguf")
    write_f32(path, wide)
    with running(wide, threads) as engine:
        kl: float = reference.score(engine.logits)["kl"]
    wide.unlink()
    return kl


def speed(path: Path, ids: Ids, threads: int) -> dict[str, Any]:
    """Tokens a second of one file, beside what the machine did at that minute."""
    state = {
        "threads": threads,
        "load_average": load_average(),
        "bandwidth": read_bandwidth(threads),
    }
    with running(path, threads) as engine:
        return state | speeds(
            lambda run: engine.prefill(ids[run % len(ids)]),
            lambda run: engine.decode(ids[(run + 1) % len(ids), :DECODED], WINDOW),
        )


def table(result: dict[str, Any]) -> str:
    """The results as markdown."""
    rows = []
    for name, file in result["files"].items():
        rates = [file.get(f"{kind}_tokens_per_second") for kind in ("decode", "prefill")]
        helped = file.get("imatrix")
        rows.append(
            [
                name,
                f"{file['file_bytes']:,}",
                f"{file['tensor_bytes']:,}",
                f"{file['kl']:.5f}",
                f"{file['kl_weights']:.5f}" if "kl_weights" in file else "-",
                f"{helped['kl']:.5f}" if helped else "-",
                f"{file['top1']:.4f}",
                f"{file['perplexity']:.3f}",
                *(f"{rate:.0f}" if rate else "-" for rate in rates),
            ]
        )
    head = ["file", "bytes", "bytes of tensors", "KL", "KL, weights alone", "KL, imatrix", "top-1"]
    return markdown([*head, "perplexity", "decode", "prefill"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="GGUF file that is packed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="as in reference.py")
    parser.add_argument("--files", nargs="+", choices=FTYPES, default=list(FTYPES))
    parser.add_argument("--windows", type=int, help="fewer than the reference has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only",
        choices=("quality", "imatrix", "speed"),
        help="the other figures in OUT stay as they are",
    )
    args = parser.parse_args()

    work = args.work / args.source.stem
    reference = Reference.read(work, args.windows)
    llama_errors_only()  # the formats it falls back to are in the result
    llama_cpp.llama_backend_init()

    f32 = work / "gguf" / "F32.gguf"
    f32.parent.mkdir(parents=True, exist_ok=True)
    if not f32.exists():
        write_f32(args.source, f32)
    result: dict[str, Any] = {
        "model": args.source.stem,
        "engine": f"llama.cpp, llama-cpp-python {llama_cpp.__version__}",
        "system": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
        "machine": machine(),
        "files": {},
    }
    same_engine = False
    if args.out.exists():  # files that are not measured now keep their figures
        before = json.loads(args.out.read_text(encoding="utf-8"))
        result["files"] = before["files"]
        same_engine = before["engine"] == result["engine"]
    # Files are often measured one by one; F32 is the same every time, and takes the longest.
    tokens = reference.ids.size
    known = result["files"].get("F32", {}).get("tokens") == tokens and same_engine
    matrix = work / "imatrix.npz"
    for name in ["F32", *args.files]:
        plain, helped = (f32.with_name(f"{name}{kind}.gguf") for kind in ("", "-imatrix"))
        file = result["files"].setdefault(name, {})
        if not plain.exists():
            quantise(f32, plain, name, None, args.threads)
        if args.only in (None, "quality") and not (name == "F32" and known):
            file |= quality(plain, args.source, reference, args.threads)
            if name != "F32":
                file["kl_weights"] = weights_only(plain, reference, args.threads)
        if args.only in (None, "imatrix") and name != "F32" and matrix.exists():
            if not helped.exists():
                quantise(f32, helped, name, matrix, args.threads)
            file["imatrix"] = quality(helped, args.source, reference, args.threads)
        if args.only in (None, "speed") and name != "F32":
            file |= speed(plain, reference.ids, args.threads)
        write_json(args.out, result)
        print(f"{name} done", file=sys.stderr)
    print(table(result))


if __name__ == "__main__":
    main()
