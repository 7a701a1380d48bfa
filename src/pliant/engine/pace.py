"""How many tokens of prompts a step may take besides those that continue answers.

A prompt is read in chunks in the same steps in which answers go on, so that it never stops them
(Agrawal et al., Sarathi-Serve, OSDI 2024). The chunk is chosen from the time that steps took: such
that a step with it takes at most twice as long as one without.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pace", "shares"]

_WEIGHT = 0.3  # of a new observation
_OUTLIER = 8.0  # an observation is believed up to this many times the estimate
_PROBE = 32  # steps with prompts after which one without is made, to see how long that takes


class Pace:
    """Estimates the time of a step as that of its answers plus that of its tokens of prompts."""

    __slots__ = ("_alone", "_answers", "_least", "_most", "_since", "_stretch", "_token")

    def __init__(self, *, stretch: float = 0.6, least: int = 1, most: int = 256) -> None:
        """`stretch`: by how much prompts may lengthen a step that continues answers, as a part of
        its time. `least`, `most`: bounds on the tokens of a step, whatever they take."""
        self._stretch = stretch
        self._least = least
        self._most = most
        self._alone: float | None = None  # seconds of a step without prompts,
        self._answers = 0  # with so many answers
        self._since = 0  # steps after that one
        self._token: float | None = None  # seconds of a token of a prompt

    def allowance(self, answers: int, prompts: int = 1) -> int:
        """Tokens of prompts for a step that continues `answers` answers; now and then none.

        Where more `prompts` are being read than answers go on, they get their share of the time.
        """
        if not answers:
            return self._most
        changed = not self._answers / 2 < answers < self._answers * 2
        if self._alone is None or changed or self._since >= _PROBE:
            return 0
        if self._token is None:
            return self._least
        stretch = self._stretch * max(1.0, prompts / answers)
        fit = int(min(stretch * self._alone / self._token, self._most))
        return min(max(fit, self._least), self._most)

    def observe(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._since += 1
        if not prompt_tokens:
            near = self._answers / 2 < answers < self._answers * 2
            self._alone = _blend(self._alone if near else None, seconds)
            self._answers = answers
            self._since = 0
        elif not answers:
            # Many tokens at once are cheaper than few: only a first guess for a mixed step.
            if self._token is None:
                self._token = max(seconds / prompt_tokens, 1e-9)
        elif self._alone is not None:
            rest = max(seconds - self._alone, 0.1 * seconds)
            self._token = _blend(self._token, max(rest / prompt_tokens, 1e-9))


def shares(todo: Sequence[int], allowance: int) -> list[int]:
    """Tokens for each of the prompts that are being read, oldest first, of which `todo` are left:
    half of the allowance for the oldest, the rest for the shortest."""
    counts = [0] * len(todo)
    others = sorted(range(1, len(todo)), key=lambda at: todo[at])
    turns = [(0, -(-allowance // 2) if others else allowance)]
    turns += [(at, allowance) for at in (*others, 0)]
    for at, most in turns:
        count = min(todo[at] - counts[at], most, allowance)
        allowance -= count
        counts[at] += count
    return counts


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (min(new, _OUTLIER * old) - old)
