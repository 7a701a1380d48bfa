"""The bounded queue of answers that wait for a place, in fair turns between those who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pliant.engine.answers import Answer

__all__ = ["Waiting"]

_MOST_KEYS = 10_000  # whose service is remembered while others are at work


class Waiting:
    """Next is the lowest priority number; then the key that has been served least; then the oldest.

    What a key was served is counted in tokens, those of answers twice. A key that comes back after
    it had nothing to do begins at the least of the others, so that nobody saves up turns (Sheng et
    al., Fairness in Serving Large Language Models, OSDI 2024).
    """

    __slots__ = ("_answers", "_served")

    def __init__(self) -> None:
        self._answers: dict[int, Answer] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(list(self._answers.values()))

    def add(self, answer: Answer, active: set[str]) -> None:
        """Put an answer in. `active`: the keys that have answers in work."""
        key = answer.request.key
        busy = active | {other.request.key for other in self._answers.values()}
        if not busy:
            self._served.clear()
        elif key not in busy:
            least = min(self._served.get(other, 0.0) for other in busy)
            self._served[key] = max(self._served.get(key, 0.0), least)
            if len(self._served) > _MOST_KEYS:
                self._served = {k: v for k, v in self._served.items() if k in busy or k == key}
        self._answers[answer.number] = answer

    def remove(self, answer: Answer) -> bool:
        """Take an answer out; False if it does not wait."""
        return self._answers.pop(answer.number, None) is not None

    def charge(self, key: str, tokens: float) -> None:
        """Count what a key was served."""
        self._served[key] = self._served.get(key, 0.0) + tokens

    def next(self, ready: Callable[[Answer], bool]) -> Answer | None:
        """Whose turn it is, of those that are ready; it stays in the queue."""
        found = [answer for answer in self._answers.values() if ready(answer)]
        return min(found, key=self._rank, default=None)

    def _rank(self, answer: Answer) -> tuple[int, float, int]:
        request = answer.request
        return request.priority, self._served.get(request.key, 0.0), answer.number
