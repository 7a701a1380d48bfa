"""Packing: what is said about a model, what calibration learns, and packs from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packs import Reader
from pliant.errors import ModelError, SourceError, UsageError
from pliant.pack.calibrate import (
    calibrate,
    linear_modules,
    logits_chunks,
    read_documents,
    token_windows,
)
from pliant.pack.describe import describe_model, describe_tokens, matrix_names, vector_names
from pliant.pack.echoes import echo_windows
from pliant.pack.packer import PackResult, pack, peak_memory
from pliant.pack.sources import Source, open_source
from pliant.store import Pack
from tiny_sources import FAMILIES, TEXT, VOCAB, save_hf, tiny_model, train_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("%%% prose\n" + TEXT * 60)
    return path


@pytest.fixture(scope="module", params=["llama", "llama-bias", "gemma3"])
def made(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, PackResult]:
    """A tiny model and its pack. No width is a multiple of 64, the vocabulary has row blocks."""
    folder = tmp_path_factory.mktemp("packed")
    more = {"hidden_size": 72, "intermediate_size": 100, "max_position_embeddings": 1024}
    save_hf(tiny_model(request.param, **more), folder / "model")
    source = open_source(str(folder / "model"))
    result = pack(source, folder / "pack", calibration=text, tokens=2048)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "pack"]
    return source, result


# --- what is said about a model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_is_described(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = open_source(str(save_hf(model, tmp_path / "model")))
    found = describe_model(source.config, source.attention_windows())
    rotary = model.model.rotary_emb
    assert found["hidden"] == 32
    assert len(found["layer_rope"]) == len(found["layer_window"]) == found["layers"]
    for layer, table in enumerate(found["layer_rope"]):
        rope = found["ropes"][table]
        prefix = f"{model.config.layer_types[layer]}_" if family == "gemma3" else ""
        assert rope["inv_freq"] == getattr(rotary, prefix + "inv_freq").tolist()
        assert len(rope["inv_freq"]) == found["head_dim"] // 2
        scaling = "attention_scaling"
        assert rope["scale"] == pytest.approx(getattr(rotary, prefix + scaling))
    attention = model.model.layers[0].self_attn
    assert found["attn_scale"] == pytest.approx(attention.scaling)
    embedded = model.get_input_embeddings()(torch.tensor([5]))
    plain = model.get_input_embeddings().weight[5]
    torch.testing.assert_close(embedded[0], plain * found["embed_scale"])
    assert found["logit_softcap"] == (30.0 if family == "gemma3" else None)
    windows = {"mistral": [8, 8], "qwen2": [0, 8], "gemma3": [8, 8, 8, 8, 8, 0]}
    assert found["layer_window"] == windows.get(family, [0, 0])

    names = set(source.tensor_names())
    used = {n.tensor for n in matrix_names(source.config)}
    used |= {tensor for tensor, _ in vector_names(source.config, sorted(names)).values()}
    assert used == names


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_scaled_ropes_are_those_of_transformers(rope: str, tmp_path: Path) -> None:
    settings = {
        "rope_type": rope,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny_model("llama", rope_parameters=settings)
    source = open_source(str(save_hf(model, tmp_path / "model")))
    (table,) = describe_model(source.config, source.attention_windows())["ropes"]
    assert table["inv_freq"] == model.model.rotary_emb.inv_freq.tolist()
    assert table["scale"] == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert (table["scale"] == 1) == (rope == "linear")


def test_what_the_format_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    source = open_source(str(save_hf(tiny_model("llama"), tmp_path / "model")))
    for key, value in (("model_type", "bloom"), ("hidden_act", "relu6")):
        with pytest.raises(ModelError, match=value):
            describe_model({**source.config, key: value}, [None, None])


def test_tokens_that_begin_and_end() -> None:
    config = {"bos_token_id": 1}
    assert describe_tokens(config, {"eos_token_id": [2, 5]}, add_bos=True) == {
        "bos": 1,
        "eos": [2, 5],
        "add_bos": True,
    }
    assert describe_tokens({}, {"eos_token_id": 7}, add_bos=True) == {
        "bos": None,
        "eos": [7],
        "add_bos": False,
    }


# --- calibration


class Letters:
    """A tokenizer of letters; a chat template that marks turns."""

    chat_template = "marks"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role'][0]}|{m['content']}>" for m in messages)


DIALOGUE = "%%% dialogue about tea\nUser: Tea?\nhot?\nAssistant: Yes.\n\nNow.\nUser: Ta\n"


def test_documents_and_dialogues() -> None:
    parts = read_documents("first\n%%% prose one\nA\n%%% code\n\nB = 1\n" + DIALOGUE + "%%% x\n\n")
    assert [kind for kind, _ in parts] == ["text", "prose", "code", "dialogue"]
    assert parts[2] == ("code", "B = 1")
    assert read_documents("only") == [("text", "only")]
    (window,) = token_windows(DIALOGUE, Letters(), tokens=99, length=500, bos=None, seed=0)
    assert "".join(map(chr, window)) == "<u|Tea?\nhot?><a|Yes.\n\nNow.><u|Ta>"


@pytest.mark.parametrize("bos", [None, 1])
def test_windows_have_the_length_asked_for_and_begin_with_bos(bos: int | None) -> None:
    text = "".join(f"%%% prose\n{chr(97 + i) * 50}\n" for i in range(20))
    windows = token_windows(text, Letters(), tokens=205, length=20, bos=bos, seed=3)
    assert len(windows) == 10
    assert all(len(window) == 20 for window in windows)
    heads = {window[0] for window in windows}
    assert (heads == {1}) == (bos == 1)
    assert windows == token_windows(text, Letters(), tokens=205, length=20, bos=bos, seed=3)
    assert windows != token_windows(text, Letters(), tokens=205, length=20, bos=bos, seed=4)
    (short,) = token_windows("abc", Letters(), tokens=205, length=20, bos=bos, seed=0)
    assert short == ([] if bos is None else [1]) + [ord(c) for c in "abc\n\n"]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_fisher_information_foretells_the_loss(family: str) -> None:
    """White noise in a matrix costs half the sum of Fisher information times its variance."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    windows = torch.randint(0, VOCAB, (160, 24), generator=torch.Generator().manual_seed(0))
    told: list[tuple[int, int]] = []
    found = calibrate(model, windows.tolist(), progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (160, 160)
    modules = linear_modules(model)
    assert set(found) == {*modules, "head", "embed"}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    def log_p() -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(windows[:64]).logits, dim=-1)

    before = log_p()
    random = torch.Generator().manual_seed(1)
    for name in ("layers.0.v", "layers.1.down", "layers.0.up", "layers.1.o"):
        fisher, weight = found[name], modules[name].weight
        assert fisher.rows.shape == (weight.shape[0],)
        assert fisher.columns.shape == (weight.shape[1],)
        assert fisher.columns.sum() == pytest.approx(fisher.total, rel=1e-4)
        exact = weight.detach().clone()
        # In a unit of the product of its rows and columns, so that both have to be right.
        rows = torch.from_numpy(fisher.rows).float().argsort()[len(exact) // 2 :]
        columns = torch.from_numpy(fisher.columns).float().argsort()[: exact.shape[1] // 2]
        share = fisher.rows[rows.numpy()].sum() * fisher.columns[columns.numpy()].sum()
        size = (0.004 / (share / fisher.total)) ** 0.5
        losses = []
        for _ in range(6):
            noise = torch.zeros_like(exact)
            noise[rows[:, None], columns] = size * torch.randn(
                len(rows), len(columns), generator=random
            )
            weight.data.copy_(exact + noise)
            losses.append(float((before.exp() * (before - log_p())).sum(-1).mean()))
        weight.data.copy_(exact)
        assert 0.5 < np.mean(losses) / 0.002 < 1.6, name


def test_logits_come_in_chunks() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9, 8, generator=random), torch.randn(50, 8, generator=random)
    for softcap in (None, 2.0):
        parts = list(logits_chunks(hidden, head, softcap))
        raw = hidden @ head.T
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), raw)
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), capped)


# --- from end to end


def test_a_pack_holds_the_model(made: tuple[Source, PackResult], reader: Reader) -> None:
    """Orders, rotation and scales are undone by a reader that shares no code with the packer."""
    source, result = made
    opened = Pack.open(result.path)
    opened.verify()
    shards = len(opened.manifest.shards)
    names = matrix_names(source.config)
    assert [m.name for m in opened.manifest.matrices] == [n.name for n in names]
    for name in names:
        weight = source.tensor(name.tensor).numpy()
        decoded = reader(str(result.path), name.name, shards)
        error = float(((decoded - weight) ** 2).sum() / (weight**2).sum())
        assert 10 * np.log10(error) < -38, name.name
        # An order that is undone the wrong way would still have the right energy.
        assert np.corrcoef(decoded.ravel(), weight.ravel())[0, 1] > 0.999
    vectors = vector_names(source.config, source.tensor_names())
    for vector, (tensor, plus_one) in vectors.items():
        expected = source.tensor(tensor).numpy() + np.float32(plus_one)
        np.testing.assert_array_equal(opened.base[vector], expected)
    cut = [m for m in opened.manifest.matrices if len(m.blocks) > 1]
    assert cut
    for matrix in cut:
        rows = opened.base[f"{matrix.name}.row_order"].astype(np.int64)
        for part in np.split(rows, np.cumsum(matrix.blocks[:-1])):
            assert (np.diff(part) > 0).all(), matrix.name


def test_a_pack_says_how_good_it_is(made: tuple[Source, PackResult]) -> None:
    _, result = made
    opened = Pack.open(result.path)
    quality = [(point.bytes, point.kl) for point in opened.manifest.quality]
    assert quality == result.quality
    assert len(quality) > 3
    assert result.plies == sum(used_bytes(opened))
    assert quality[-1][0] == result.plies + result.scales
    assert result.scales == opened.units.scale_bytes
    assert quality[-1][1] < 0.01 < quality[0][1]
    assert opened.manifest.calibration.tokens == 2048
    assert opened.manifest.calibration.text == "text.txt"


def used_bytes(opened: Pack) -> Iterator[int]:
    """Bytes of each rung without its padding."""
    start = 0
    seen = np.zeros(len(opened.units), np.uint8)
    for count in opened.manifest.rungs.plies.tolist():
        total = 0
        for unit in opened.ladder[start : start + count].tolist():
            seen[unit] += 1
            bits = seen[unit : unit + 1]
            total += int(opened.units.bytes_of(np.array([unit], np.uint32), bits)[0])
        yield total
        start += count


def test_packing_twice_gives_the_same_pack(text: Path, tmp_path: Path) -> None:
    save_hf(tiny_model("qwen3", max_position_embeddings=1024), tmp_path / "model")
    packs = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        pack(str(tmp_path / "model"), tmp_path / name, calibration=text, tokens=1024, seed=seed)
        packs.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert packs[0] == packs[1]
    assert packs[0] != packs[2]


@pytest.mark.parametrize("plain", ["f32", "bf16"])
def test_a_plain_pack_holds_the_tensors(plain: Any, tmp_path: Path) -> None:
    save_hf(tiny_model("qwen2"), tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    result = pack(source, tmp_path / "pack", plain=plain)
    assert (result.plies, result.scales, result.quality) == (0, 0, [])
    opened = Pack.open(result.path)
    for name in matrix_names(source.config):
        weight = source.tensor(name.tensor)
        stored = opened.base[f"{name.name}.weight"]
        if plain == "bf16":
            stored = torch.from_numpy(stored.copy()).view(torch.bfloat16).float().numpy()
            weight = weight.bfloat16().float()
        np.testing.assert_array_equal(stored, weight.numpy())


class Stopper:
    """Stops the packing when a part of it begins, and notes what came before."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.peak = 0
        self.told: list[str] = []

    def peak_memory(self, size: int) -> None:
        assert not self.told or "model" not in self.told
        self.peak = size

    def update(self, what: str, done: float | None) -> None:
        assert done is None or 0 <= done <= 1
        self.told.append(what)
        if what == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["calibration", "encoding", "quality", "writing"])
def test_an_interrupt_leaves_nothing(at: str, text: Path, tmp_path: Path) -> None:
    save_hf(tiny_model("llama", max_position_embeddings=1024), tmp_path / "model")
    stopper = Stopper(at)
    with pytest.raises(KeyboardInterrupt):
        pack(
            str(tmp_path / "model"),
            tmp_path / "pack",
            calibration=text,
            tokens=512,
            progress=stopper,
        )
    assert stopper.told[-1] == at
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert stopper.peak > 0


def test_peak_memory_grows_with_the_model(tmp_path: Path) -> None:
    config = open_source(str(save_hf(tiny_model("llama"), tmp_path / "model"))).config
    small = peak_memory(config, plain=False)
    assert 200 << 20 < small < 2 << 30
    wide = {**config, "vocab_size": 1 << 20, "hidden_size": 512}
    # The embedding twice: the model, and the copy that decoded weights are compared with.
    assert peak_memory(wide, plain=False) - small >= 2 * (4 << 29)
    assert peak_memory(wide, plain=True) - small >= 4 << 29


def test_wrong_arguments_are_told(text: Path, tmp_path: Path) -> None:
    save_hf(tiny_model("llama"), tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    with pytest.raises(UsageError, match="0 tokens"):
        pack(source, tmp_path / "pack", tokens=0)
    with pytest.raises(UsageError, match="f32 or bf16"):
        pack(source, tmp_path / "pack", plain="f16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a directory"):
        pack(source, tmp_path / "no" / "pack")
    (tmp_path / "empty").write_text("  \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in (("empty", "is empty"), ("latin", "UTF-8"), ("none", "cannot be read")):
        with pytest.raises(SourceError, match=message):
            pack(source, tmp_path / "pack", calibration=tmp_path / name)
    assert not (tmp_path / "pack").exists()


def test_the_tokenizer_of_the_source_goes_along(made: tuple[Source, PackResult]) -> None:
    source, result = made
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.bin"}
    assert kept <= {p.name for p in result.path.iterdir()}
    assert Pack.open(result.path).manifest.tokens.eos == tuple(
        source.generation_config["eos_token_id"]
    )
    assert train_tokenizer().to_str() == train_tokenizer().to_str()


class Pieces:
    """A tokenizer with four letters in a token."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        first = len(self.pieces)
        self.pieces += [text[at : at + 4] for at in range(0, len(text), 4)]
        return {"input_ids": list(range(first, len(self.pieces)))}


@pytest.mark.parametrize("bos", [None, -1])
def test_echoes_say_again_what_they_said(bos: int | None) -> None:
    passages = ["short", "".join(f"sentence {i}. " for i in range(150))]

    def made(seed: int) -> list[str]:
        tokenizer, texts = Pieces(), []
        for window in echo_windows(tokenizer, passages, count=8, length=500, bos=bos, seed=seed):
            assert len(window) <= 500
            assert (window[0] == -1) == (bos == -1)
            texts.append("".join(tokenizer.pieces[i] for i in window if i >= 0))
        return texts

    texts = made(3)
    assert texts == made(3)
    assert texts != made(4)
    for number, text in enumerate(texts):
        if number % 4 == 0:
            before, after = text.split("As quoted above:\n\n")
            assert len(after) > 500
            assert before.startswith(after)
        else:
            lines = text.splitlines()[:-1]  # the last one may be cut
            first = lines[: 500 // 24]
            assert len(lines) > 1.5 * len(first)
            assert set(lines) == set(first)
    (cut,) = echo_windows(Pieces(), [], count=1, length=100, bos=bos, seed=3)
    assert 30 < len(cut) <= 100
