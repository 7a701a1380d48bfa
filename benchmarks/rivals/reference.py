"""The source model's own logits: ``python benchmarks/rivals/reference.py SOURCE.gguf --text FILE``.

Tokenises the text once, cuts it into windows of 512, and runs the source model over them with
transformers in float32 (every tensor of the GGUF file dequantised). Every engine gets these very
token ids and is scored against these very logits. A model whose tokenizer wants a token at the
beginning of a text gets it at the beginning of every window.

Writes ids.npy (int32 [windows, 512]), logits.npy (float32 [windows, 512, vocabulary]) and
about.json to WORK/NAME. Needs the extra ``pack`` (torch, transformers).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WINDOW, Ids, write_json
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer


def begin_token(source: Path) -> int | None:
    """The id that must begin every text, or None, as the metadata of the GGUF file says."""
    fields = GGUFReader(source).fields
    wanted = fields.get("tokenizer.ggml.add_bos_token")
    token = fields.get("tokenizer.ggml.bos_token_id")
    if wanted is None or token is None or not wanted.contents():
        return None
    return int(token.contents())


def token_windows(source: Path, text: Path, windows: int) -> Ids:
    """The first ``windows`` windows of the text, int32 [windows, 512].

    Raises ValueError if the text is too short.
    """
    # Typed as Any: the return type that transformers declares has no call signature.
    tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    flat = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    begin = begin_token(source)
    fresh = WINDOW - (begin is not None)
    if len(flat) < windows * fresh:
        raise ValueError(f"{text} has {len(flat)} tokens, {windows * fresh} are needed")
    ids: Ids = np.array(flat[: windows * fresh], dtype=np.int32).reshape(windows, fresh)
    if begin is None:
        return ids
    return np.concatenate([np.full((windows, 1), begin, dtype=np.int32), ids], axis=1)


def load_source(source: Path) -> Any:
    """The source model in float32, from the dequantised tensors."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="GGUF file that is packed")
    parser.add_argument("--text", type=Path, help="made by benchmarks/text.py")
    parser.add_argument("--ids", type=Path, help=".npy with windows of token ids, in place of text")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="large files go here")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens (default 12)")
    parser.add_argument(
        "--matrices",
        choices=("f32", "bf16"),
        default="f32",
        help="bf16: round the matrices to bfloat16 at first, and write to WORK/NAME-bf16",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if (args.text is None) == (args.ids is None):
        parser.error("give --text FILE or --ids FILE")
    torch.set_num_threads(args.threads)
    if args.ids is not None:
        ids: Ids = np.load(args.ids)[: args.windows].astype(np.int32)
        if ids.shape != (args.windows, WINDOW):
            parser.error(f"{args.ids} holds windows of shape {ids.shape}, not {WINDOW} tokens each")
    else:
        ids = token_windows(args.source, args.text, args.windows)

    model = load_source(args.source)
    folder = args.work / args.source.stem
    if args.matrices == "bf16":
        folder = folder.with_name(f"{folder.name}-bf16")
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.bfloat16().float()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)  # a half-written reference must not look whole
    np.save(folder / "ids.npy", ids)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    shape = (len(ids), WINDOW, vocabulary)
    logits = np.lib.format.open_memmap(
        folder / "logits.npy", mode="w+", dtype=np.float32, shape=shape
    )
    with torch.inference_mode():
        for index, window in enumerate(ids):
            tokens = torch.from_numpy(window.astype(np.int64))[None]
            logits[index] = model(tokens, use_cache=False).logits[0].float().numpy()
            print(f"window {index + 1}/{len(ids)}", file=sys.stderr)
    logits.flush()
    about = {"model": args.source.stem, "windows": len(ids), "window": WINDOW}
    write_json(folder / "about.json", about | {"vocabulary": vocabulary})


if __name__ == "__main__":
    main()
