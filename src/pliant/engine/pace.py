"""How many tokens of prompts a step may take besides those that continue answers.

A prompt is read in chunks in the same steps in which answers go on, so that it never stops them
(Agrawal et al., Sarathi-Serve, OSDI 2024). The chunk is chosen from the time that steps took: such
that answers take at most twice as long as without.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pace", "shares"]

_WEIGHT = 0.3  # of a new observation
_OUTLIER = 8.0  # an observation is believed up to this many times the estimate
_PROBE = 32  # steps with prompts after which one without is made, to see how long that takes
_WORST = 3.0  # what is owed for one step, in times of a step without prompts


class Pace:
    """Estimates the time of a step as that of its answers plus that of its tokens of prompts.

    Some of the time is not for tokens but for reading in a prompt at all: the keys and values of
    what was read before. Behind a long beginning that alone may be more than a step shall take
    longer. One token a step would then cost answers as much as eight, and for eight times as long.
    So a step that reads has at least some tokens, and what it takes too long is owed: steps without
    prompts follow until answers have had their time. With a stretch of a half, steps that take more
    than twice as long are the fewer ones.
    """

    __slots__ = (
        "_alone",
        "_answers",
        "_least",
        "_most",
        "_owed",
        "_share",
        "_since",
        "_stretch",
        "_token",
    )

    def __init__(self, *, stretch: float = 0.5, least: int = 8, most: int = 256) -> None:
        """`stretch`: by how much prompts may lengthen steps that continue answers in the mean, as a
        part of their time. `least`, `most`: bounds on the tokens of a step that reads."""
        self._stretch = stretch
        self._least = least
        self._most = most
        self._alone: float | None = None  # seconds of a step without prompts,
        self._answers = 0  # with so many answers
        self._since = 0  # steps after that one
        self._token: float | None = None  # seconds of a token of a prompt
        self._share = stretch  # `stretch` for the prompts and answers of the last step
        self._owed = 0.0  # seconds that steps took too long

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
        self._share = self._stretch * max(1.0, prompts / answers)
        if self._owed > self._share * self._alone / 2:
            return 0
        fit = int(min(self._share * self._alone / self._token, self._most))
        return min(max(fit, self._least), self._most)

    def observe(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._since += 1
        if not prompt_tokens:
            near = self._answers / 2 < answers < self._answers * 2
            self._alone = _blend(self._alone if near else None, seconds)
            self._answers = answers
            self._since = 0
            self._owed = max(self._owed - self._share * self._alone, 0.0)
        elif not answers:
            # Many tokens at once are cheaper than few: only a first guess for a mixed step.
            if self._token is None:
                self._token = max(seconds / prompt_tokens, 1e-9)
        elif self._alone is not None:
            rest = max(seconds - self._alone, 0.1 * seconds)
            self._token = _blend(self._token, max(rest / prompt_tokens, 1e-9))
            over = min(rest, _WORST * self._alone) - self._share * self._alone
            self._owed = max(self._owed + over, 0.0)


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
