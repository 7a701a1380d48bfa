"""The sampler against a plain one in float64 that sorts everything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant._core import cpu_isa, sample
from pliant.engine.sampling import Sampling, new_seed
from pliant.errors import EngineError, UsageError

Floats = npt.NDArray[np.float32]
MASK = 2**64 - 1


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    return float((splitmix(splitmix(seed) ^ splitmix(~position & MASK)) >> 11) * 2.0**-53)


NEAR = 3e-5  # the core adds up in float32 steps: so near to a border both sides are right


def slow_choices(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, u: float
) -> set[int]:
    """The tokens that the number `u` may choose: one, and its neighbours if it is near a border."""
    values = logits.astype(np.float64)
    order = np.lexsort((np.arange(len(values)), -values))
    below = (values[order[0]] - values[order]) / float(np.float32(temperature))
    limit = 40.0 if min_p == 0 else min(40.0, -math.log(float(np.float32(min_p))))
    found = set()
    for least in {limit * (1 - 1e-6), limit * (1 + 1e-6)}:
        kept = below <= least
        if top_k:
            kept[top_k:] = False
        mass = np.exp(-below[kept])
        sums = np.cumsum(mass) / mass.sum()
        ends = {sums[-1]}
        if top_p < 1:
            ends = {
                sums[min(int(np.searchsorted(sums, float(np.float32(top_p)) + e)), len(sums) - 1)]
                for e in (-NEAR, 0.0, NEAR)
            }
        for end in ends:
            for e in (-NEAR, 0.0, NEAR):
                at = min(int(np.searchsorted(sums, max(u * end + e, 0.0))), len(sums) - 1)
                found.add(int(order[at]))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_choice_is_the_largest_logit_and_the_lowest_id(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-5, 5, int(rng.integers(1, 3000))).astype(np.float32)
    assert sample(logits) == int(logits.argmax())
    assert sample(logits, temperature=1.0, top_k=1, seed=seed) == int(logits.argmax())


@settings(max_examples=300, deadline=None)
@given(
    data_seed=st.integers(0, 2**32),
    size=st.integers(1, 2000),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 50.0, 1e4]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)
def test_the_draw_is_where_the_random_number_falls(
    data_seed: int,
    size: int,
    spread: float,
    ties: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    logits = (np.random.default_rng(data_seed).standard_normal(size) * spread).astype(np.float32)
    if ties:
        logits = np.round(logits)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"temperature": temperature}
    found = {
        isa: sample(logits, seed=seed, position=position, isa=isa, **options) for isa in cpu_isa()
    }
    assert len(set(found.values())) == 1, found
    assert found["plain"] in slow_choices(logits, u=uniform(seed, position), **options)


@pytest.mark.parametrize("isa", cpu_isa())
def test_what_many_unlikely_tokens_have_together_counts(isa: str) -> None:
    """One token has a third of the probability, 65,536 others the rest, each 1e-5 of the whole."""
    logits = np.full(65_537, -math.log(32_768), np.float32)
    logits[40_000] = 0.0
    options: dict[str, Any] = {"temperature": 1.0, "isa": isa}
    drawn = [sample(logits, seed=1, position=i, **options) for i in range(900)]
    assert 0.28 < drawn.count(40_000) / len(drawn) < 0.39
    assert len(set(drawn)) > 550
    within = [sample(logits, seed=2, position=i, top_p=0.3, **options) for i in range(20)]
    assert set(within) == {40_000}
    first = [sample(logits, seed=3, position=i, top_k=101, **options) for i in range(3000)]
    assert set(first) - {40_000} <= set(range(100))
    assert 0 < first.count(40_000) < len(first)


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    drawn = [sample(logits, temperature=1.0, seed=7, position=i) for i in range(8000)]
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(counts - [0.5, 0.25, 0.125, 0.125]).max() < 0.02


def test_the_same_seed_and_position_give_the_same_token_in_any_order() -> None:
    logits = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    one = [sample(logits, temperature=1.0, seed=3, position=i) for i in range(50)]
    other = [sample(logits, temperature=1.0, seed=3, position=i) for i in reversed(range(50))]
    assert one == other[::-1]
    assert one != [sample(logits, temperature=1.0, seed=4, position=i) for i in range(50)]


def test_penalties_follow_their_definition_and_leave_the_logits_alone() -> None:
    logits = np.array([2.0, 1.9, -1.0, 1.0], np.float32)
    before = logits.copy()
    history = np.array([0, 1, 1], np.int32)  # 0 is the prompt, 1 was answered twice
    assert sample(logits, history=history, prompt=1) == 0
    assert sample(logits, repetition=1.5, history=history, prompt=1) == 0  # 1.33, 1.27, -, 1
    assert sample(logits, repetition=4.0, history=history, prompt=1) == 3  # 0.5, 0.48, -1, 1
    assert sample(logits, presence=0.5, history=np.array([0], np.int32), prompt=1) == 0
    assert sample(logits, presence=0.5, history=np.array([0], np.int32), prompt=0) == 1
    assert sample(logits, frequency=0.5, history=np.array([0, 1], np.int32), prompt=0) == 0
    assert sample(logits, frequency=0.5, history=np.array([0, 0, 1], np.int32), prompt=0) == 1
    low = np.array([-1.0, -1.2], np.float32)  # negative logits get worse too
    assert sample(low, repetition=1.5, history=np.array([0], np.int32), prompt=1) == 1
    assert np.array_equal(logits, before)


def test_biases_are_added() -> None:
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    assert sample(logits, bias=[(2, 3.0)]) == 2
    assert sample(logits, bias=[(0, -math.inf)]) == 1
    assert sample(logits, bias=[(1, math.inf)], temperature=1.0) == 1
    for position in range(100):
        assert sample(logits, bias=[(0, -math.inf)], temperature=5.0, position=position) != 0


def test_what_is_no_number_is_never_drawn() -> None:
    logits = np.array([math.nan, 1.0, -math.inf, math.nan], np.float32)
    for position in range(50):
        assert sample(logits, temperature=10.0, position=position) == 1
    with pytest.raises(EngineError):
        sample(np.full(5, -math.inf, np.float32), temperature=1.0)
    with pytest.raises(EngineError):
        sample(np.full(5, math.nan, np.float32))
    with pytest.raises(EngineError):
        sample(np.empty(0, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition": 0.0},
        {"presence": math.nan},
        {"bias": [(9, 1.0)]},
        {"bias": [(0, math.nan)]},
        {"repetition": 2.0, "history": np.array([-1], np.int32)},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_the_core_refuses_options_without_meaning(options: dict[str, Any]) -> None:
    logits = np.zeros(4, np.float32)
    with pytest.raises(UsageError):
        sample(logits, **options)
    assert not logits.any()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 2},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -1},
        {"seed": 2**64},
        {"repetition_penalty": 0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": 1e9},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_without_meaning_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)


def test_seeds_differ_and_survive_json() -> None:
    seeds = {new_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert max(seeds) < 2**53
