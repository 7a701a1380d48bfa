"""An importance matrix for llama.cpp: ``python benchmarks/rivals/imatrix.py SOURCE.gguf``.

A pack is made with calibration text, so llama.cpp's quantiser should have the same text: the mean
square of every input channel of every linear layer, which is what llama.cpp itself collects for
``--imatrix``. Computed with the source model in float32 by transformers. The output head gets
none, as with llama.cpp's defaults. Writes WORK/NAME/imatrix.npz: one float32 [inputs] for each
GGUF tensor. Needs the extra ``pack`` (torch, transformers).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WINDOW
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from reference import load_source, token_windows


class Collector:
    """Sums the squares of what goes into the linear layers of a model."""

    def __init__(self, model: torch.nn.Module, source: Path) -> None:
        fields = GGUFReader(source).fields
        name = str(fields["general.architecture"].contents())
        architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
        blocks = int(fields[f"{name}.block_count"].contents())
        names = get_tensor_name_map(architecture, blocks)
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        for path, module in model.named_modules():
            tensor = names.get_name(path)
            if isinstance(module, torch.nn.Linear) and tensor and tensor != "output":
                module.register_forward_hook(self._hook(f"{tensor}.weight"))

    def _hook(self, tensor: str) -> Any:
        def collect(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _out: object
        ) -> None:
            rows = inputs[0].flatten(0, -2).double()
            self.sums[tensor] = self.sums.get(tensor, torch.zeros(())) + rows.square().sum(dim=0)
            self.counts[tensor] = self.counts.get(tensor, 0) + len(rows)

        return collect

    def means(self) -> dict[str, Any]:
        """Mean square for each GGUF tensor, float32 [inputs]."""
        return {
            tensor: (total / self.counts[tensor]).float().numpy()
            for tensor, total in self.sums.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="GGUF file that is packed")
    parser.add_argument("--calibration", type=Path, required=True, help="text, as for pliant pack")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="as in reference.py")
    parser.add_argument("--windows", type=int, default=32, help=f"of {WINDOW} tokens (default 32)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = token_windows(args.source, args.calibration, args.windows)
    model = load_source(args.source)
    collector = Collector(model, args.source)
    with torch.inference_mode():
        for window in ids:
            tokens = torch.from_numpy(window.astype(np.int64))[None]
            model(tokens, use_cache=False, logits_to_keep=1)
    out = args.work / args.source.stem / "imatrix.npz"
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **collector.means())


if __name__ == "__main__":
    main()
