"""Tasks of single facts: facts are where they are said to be, scores are right, and a cache that is
not touched changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pliant.cli import eval_kv
from pliant.engine.build import open_tokenizer
from pliant.engine.kv_quality import WAYS, Caches, compared, kv_quality, kv_recall
from pliant.engine.recall import TASKS, Sample, Score, make_samples, score, summarise
from pliant.engine.seam import Tokenizer
from pliant.errors import UsageError
from pliant.memory.plan import Wish, kv_levels
from pliant.store import Pack
from test_executor import some_ids
from test_kv import coded
from tiny import write_tiny_pack

TEXT = "".join(f"Line {n} of a text that says nothing much, number {n * n}.\n" for n in range(90))
LENGTH = 2048


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(
        tmp_path_factory.mktemp("recall") / "tiny.pack",
        least=4, head_dim=64, hidden=128, layers=2, context=LENGTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(Pack.open(path))


@pytest.fixture(scope="module")
def samples(tokenizer: Tokenizer) -> list[Sample]:
    return make_samples(tokenizer, TEXT, lengths=[LENGTH], samples=3, begin=[256])


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids))


# --- what is asked


def test_the_same_seed_gives_the_same_samples(tokenizer: Tokenizer, samples: list[Sample]) -> None:
    again = make_samples(tokenizer, TEXT, lengths=[LENGTH], samples=3, begin=[256])
    assert again == samples
    other = make_samples(tokenizer, TEXT, lengths=[LENGTH], samples=3, seed=1, begin=[256])
    assert all(a.context != b.context for a, b in zip(samples, other, strict=True))
    assert len({sample.context for sample in samples}) == 6


def test_facts_are_where_they_are_said_to_be(tokenizer: Tokenizer, samples: list[Sample]) -> None:
    counted = dict.fromkeys(TASKS, 0)
    for sample in samples:
        assert sample.context[0] == 256
        for branch in sample.branches:
            for one in branch:
                counted[one.task] += 1
                before = [text_of(tokenizer, sample.context[:at]) for at in one.at]
                question = text_of(tokenizer, one.question)
                if len(one.at) == 1:
                    start = one.at[0]
                    assert sample.context[start : start + len(one.answer)] == one.answer
                    assert before[0].endswith(question.lstrip("\n"))
                    # There is one place only that says it.
                    whole = text_of(tokenizer, sample.context)
                    assert whole.count(question.lstrip("\n")) == 1
                else:
                    answer = text_of(tokenizer, one.answer)
                    numbers = [int(word) for word in answer.split() if word.isdigit()]
                    first, second, again, more, total = numbers
                    assert (first, second, first + second) == (again, more, total)
                    found = [int(text_of(tokenizer, sample.context[at : at + 1])) for at in one.at]
                    assert sorted(found) == sorted((first, second))
                    asked = question.split("Add the ")[-1]
                    for text in before:
                        assert text.split("The ")[-1].removesuffix(" holds ") in asked
    assert counted == {"needle": 15, "lookup": 24, "copy": 12, "sum": 9, "turns": 24}


def test_facts_lie_at_all_depths_and_everything_fits(samples: list[Sample]) -> None:
    for sample in samples:
        room = LENGTH - len(sample.context)
        lengths = [sum(len(a.question) + len(a.answer) for a in b) for b in sample.branches]
        assert max(lengths) <= room
        for task, parts in (("needle", 5), ("copy", 4), ("lookup", 8)):
            depths = [
                one.at[0] / len(sample.context)
                for branch in sample.branches
                for one in branch
                if one.task == task
            ]
            assert depths == sorted(depths)
            if depths:
                assert len(depths) == parts
                assert depths[0] < 1.5 / parts
                assert depths[-1] > 1 - 1.5 / parts


def test_contexts_do_not_depend_on_the_tasks(tokenizer: Tokenizer, samples: list[Sample]) -> None:
    for task in TASKS:
        few = make_samples(
            tokenizer, TEXT, tasks=[task], lengths=[LENGTH], samples=3, begin=[256]
        )  # fmt: skip
        full = [one for one in samples if any(b[0].task == task for b in one.branches)]
        assert [one.context for one in few] == [one.context for one in full]
        for one, whole in zip(few, full, strict=True):
            assert one.branches == tuple(b for b in whole.branches if b[0].task == task)


def test_turns_ask_what_is_also_asked_alone(samples: list[Sample]) -> None:
    for sample in samples:
        alone = {
            (one.question, one.answer) for b in sample.branches for one in b if one.task != "turns"
        }
        for branch in sample.branches:
            if branch[0].task == "turns":
                assert len(branch) == len({one.question for one in branch}) == 8
                assert {(one.question, one.answer) for one in branch} <= alone


def test_what_cannot_be_made_is_refused_with_the_way_out(tokenizer: Tokenizer) -> None:
    for wrong, message in (
        ({"tasks": ["needles"]}, "there is no task 'needles'"),
        ({"lengths": [600]}, "600 tokens are too few: facts and questions alone take"),
        ({"lengths": [120], "tasks": ["lookup"]}, "only 5 lines fit, and at least 16"),
        ({"lengths": [9000]}, "give a longer --text, or shorter --lengths"),
    ):
        with pytest.raises(UsageError, match=message):
            make_samples(tokenizer, TEXT, **wrong)  # type: ignore[arg-type]


# --- how answers count


def test_scores() -> None:
    answer = [3, 1, 2]
    certain = np.full((3, 5), -50, np.float32)
    certain[np.arange(3), answer] = 50
    assert score(certain, answer) == Score(True, 0.0)
    wrong = score(-certain, answer)
    assert not wrong.right
    assert wrong.likelihood == pytest.approx(-300 - 3 * np.log(4))
    almost = certain.copy()
    almost[2] = 0, 0, 1, 2, 0
    chances = np.exp([0, 0, 1, 2, 0])
    assert not score(almost, answer).right
    assert score(almost, answer).likelihood == pytest.approx(np.log(chances[2] / chances.sum()))
    assert score(np.zeros((3, 5), np.float32), answer).likelihood == pytest.approx(-3 * np.log(5))


def test_changes_are_paired_by_context() -> None:
    def answer(sample: int, exact: float, coded: float) -> dict[str, Any]:
        caches = {"exact": Score(True, exact), "4 as_run": Score(coded > -2, coded)}
        return {
            "task": "copy", "length": 64, "sample": sample, "alone": -9.0, "caches": caches,
        }  # fmt: skip

    answers = [answer(0, -1, -1.5), answer(0, -7, -7.5), answer(1, -1, -1.1), answer(1, -3, -3.3)]
    (found,) = summarise(answers)
    assert (found["answers"], found["contexts"], found["alone"]) == (4, 2, -9.0)
    assert found["caches"]["exact"] == {"right": 1.0, "likelihood": -3.0}
    change = found["caches"]["4 as_run"]
    assert change["likelihood_change"] == pytest.approx(-0.35)
    assert change["likelihood_change_error"] == pytest.approx(0.15)  # half of -0.5 against -0.2
    assert (change["right"], change["right_change"]) == (0.5, -0.5)
    assert change["right_change_error"] == 0.0
    answers[0]["caches"]["8 as_run"] = Score(True, -1.0)  # which the others do not have
    (alone,) = summarise(answers[:2])
    assert list(alone["caches"]) == ["exact", "4 as_run"]
    assert alone["caches"]["4 as_run"]["likelihood_change_error"] is None


def test_the_command_knows_the_tasks_and_ways() -> None:
    """It lists them without importing what makes them."""
    assert eval_kv._TASKS == TASKS
    assert tuple(eval_kv._WAYS) == WAYS


# --- with caches


def test_branches_are_what_reading_everything_gives(path: Path, samples: list[Sample]) -> None:
    """Read once and gone on from again and again, exact and coded: the same as from nothing."""
    caches = Caches(path, [4.5], threads=2)
    sample = samples[0]
    level = kv_levels(caches.sizes, Wish(kv_bits=4.5), sample.length)[-1]
    seen = caches.sizes.schedule(level).seen.tolist()
    found = kv_recall(caches, [sample])["answers"]
    executor = coded(path)
    executor.set_kv_ages(seen, seen)
    sequence = executor.open_sequence()
    at = 0
    for branch in sample.branches:
        executor.truncate(sequence, 0)
        ids, spans = list(sample.context), []
        for one in branch:
            ids += one.question
            spans.append((len(ids) - 1, one.answer))
            ids += one.answer
        rows = executor.step([sequence], [len(ids)], np.array(ids, np.int32), [2])
        for begin, answer in spans:
            expected = score(rows[begin : begin + len(answer)], answer)
            assert found[at]["caches"]["4.5 as_run"] == {
                "right": expected.right,
                "likelihood": expected.likelihood,
            }
            assert found[at]["caches"]["exact"]["likelihood"] != expected.likelihood
            at += 1
    assert at == len(found) == 20


def test_nothing_is_lost_where_nothing_is_coded(
    path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = Caches(path, [4.5], threads=2)
    windows = [some_ids(256, 200), some_ids(256, 90, seed=1)]
    real, asked = kv_quality(caches, windows), kv_recall(caches, samples[:2])
    monkeypatch.setattr(Caches, "coded", lambda self, *_: self.exact())
    same, told = kv_quality(caches, windows), kv_recall(caches, samples[:2])
    for way in WAYS:
        assert same["coded"][0][way]["kl"] == 0
        assert same["coded"][0][way]["top1"] == 1
        assert same["coded"][0][way]["perplexity"] == same["exact"]["perplexity"]
        assert real["coded"][0][way]["kl"] > 0
    for before, after in zip(asked["tasks"], told["tasks"], strict=True):
        for name, figures in after["caches"].items():
            if name != "exact":
                assert figures["likelihood_change"] == figures["right_change"] == 0
                assert before["caches"][name]["likelihood_change"] != 0


def test_of_long_windows_evenly_spread_pages_are_compared(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compared(8192, 49152, 32) == 4  # 2,048 positions of 192 KiB
    assert compared(8192, 262144, 32) == 16
    assert compared(512, 262144, 32) == 1
    caches = Caches(path, [4.5], threads=2)
    window = some_ids(256, 700)
    whole = kv_quality(caches, [window])["coded"][0]["as_run"]
    assert whole["positions"] == 700
    monkeypatch.setattr("pliant.engine.kv_quality._HELD", 32 * 260 * 4 * 6)
    part = kv_quality(caches, [window])["coded"][0]["as_run"]
    assert part["positions"] == 5 * 32  # pages 3, 7, 11, 15 and 19 of 0 to 21
    assert part["kl"] == pytest.approx(whole["kl"], rel=0.5)
    assert None not in part["by_position"]
    short = kv_quality(caches, [window[:50]])["coded"][0]["all_coded"]
    first, *others = short["by_position"]
    assert first > 0
    assert np.average([first, *others], weights=[13, 12, 13, 12]) == pytest.approx(short["kl"])
