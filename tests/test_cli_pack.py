"""`pliant pack` and `pliant eval --source`, from a tiny model on disk to its measured distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pliant.cli.main import main
from tiny_sources import save_hf, tiny_model, train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog 0123456789 times, didn't it?\n" * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    save_hf(tiny_model("llama", max_position_embeddings=1024), folder)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.torch_beside
def test_a_plain_pack_is_its_source(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, pack = tmp_path / "text.txt", tmp_path / "plain.pack"
    text.write_text(TEXT)
    code, out, err = run(capfd, "pack", source, "-o", pack, "--plain", "f32", "--threads", 1)
    assert (code, out) == (0, ""), err
    assert "of memory" in err.splitlines()[0]
    assert "made " in err
    code, out, err = run(
        capfd,
        *("eval", pack, "--text", text, "--source", source, "--tokens", 256, "--window", 128),
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    (size,) = found["sizes"]
    assert found["reference"] == str(source)
    assert size["kl"] < 1e-6
    assert size["top1"] > 0.99
    assert size["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-3)


def test_a_coded_pack_says_what_it_holds(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, pack = tmp_path / "text.txt", tmp_path / "coded.pack"
    text.write_text(TEXT)
    arguments = ("pack", source, "-o", pack, "--calibration", text, "--tokens", 2048)
    code, out, err = run(capfd, *arguments, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["plies"] > 0
    assert made["quality"]
    assert (pack / "pliant.json").is_file()
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    assert "is there" in err.splitlines()[-1]
    assert run(capfd, *arguments, "--overwrite")[0] == 0
    # All plies: the source, but for the rounding of 8 bits and of the activations.
    code, out, err = run(
        capfd, "eval", pack, "--text", text, "--source", source, "--tokens", 300, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["sizes"][0]["kl"] < 0.02


def test_a_source_that_is_none_is_refused(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, "pack", tmp_path / "nowhere", "-o", tmp_path / "x")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("pliant: error: ")
    assert not (tmp_path / "x").exists()
    code, _, err = run(capfd, "pack", source, "-o", tmp_path / "x", "--revision", "main")
    assert code == 1
    assert "revision" in err
