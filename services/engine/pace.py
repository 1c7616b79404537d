"""How long a step takes, learnt from the steps that were: t = a + b·tokens + c·kv_tokens.

`tokens` are those computed in the step, `kv_tokens` the lengths of the sequences that take part. Plain Python, no
clock: seconds are given. The scheduler asks it how many tokens of prefill fit beside the running sequences.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

WINDOW = 64
"""Steps remembered of each kind, with prefill and without: a long run of decodes must not make it forget what a prompt
costs."""

FEWEST = 4
"""Steps before anything is predicted."""

RIDGE = 1e-4
"""Relative weight of "all coefficients are zero": decides where the steps cannot tell the coefficients apart."""


class _Observation(NamedTuple):
    tokens: int
    kv_tokens: int
    seconds: float


class Pace:
    """The fitted model of one engine's steps."""

    def __init__(self) -> None:
        self._decodes: deque[_Observation] = deque(maxlen=WINDOW)
        self._mixed: deque[_Observation] = deque(maxlen=WINDOW)
        self._coefficients: tuple[float, float, float] | None = None

    def observe(self, *, tokens: int, kv_tokens: int, seconds: float, prefills: bool) -> None:
        """A step took so long. `prefills`: it computed more than one token of some sequence."""
        (self._mixed if prefills else self._decodes).append(_Observation(tokens, kv_tokens, seconds))
        self._coefficients = None

    def seconds(self, *, tokens: int, kv_tokens: int) -> float | None:
        """How long such a step will take; None as long as too few were seen."""
        if len(self._decodes) + len(self._mixed) < FEWEST:
            return None
        a, b, c = self._fitted()
        return a + b * tokens + c * kv_tokens

    def tokens_within(self, seconds: float, *, kv_tokens: int) -> float:
        """How many tokens a step may compute and still end within `seconds`; infinite where nothing says otherwise."""
        if len(self._decodes) + len(self._mixed) < FEWEST:
            return float("inf")
        a, b, c = self._fitted()
        spare = seconds - a - c * kv_tokens
        if spare <= 0:
            return 0.0
        return spare / b if b > 0 else float("inf")

    def _fitted(self) -> tuple[float, float, float]:
        if self._coefficients is None:
            self._coefficients = _fit([*self._decodes, *self._mixed])
        return self._coefficients


def _fit(observations: list[_Observation]) -> tuple[float, float, float]:
    """Least squares with no coefficient below zero: where one comes out negative it is left out and the rest fitted
    again (for three columns that is near enough to the optimum)."""
    rows = [(1.0, float(each.tokens), float(each.kv_tokens)) for each in observations]
    scales = [max(sum(row[j] for row in rows) / len(rows), 1e-9) for j in range(3)]
    scaled = [[row[j] / scales[j] for j in range(3)] for row in rows]
    seconds = [each.seconds for each in observations]
    columns = [0, 1, 2]
    while columns:
        solution = _least_squares([[row[j] for j in columns] for row in scaled], seconds)
        worst = min(range(len(columns)), key=solution.__getitem__)
        if solution[worst] >= 0:
            break
        del columns[worst]
    result = [0.0, 0.0, 0.0]
    for column, value in zip(columns, solution if columns else [], strict=True):
        result[column] = value / scales[column]
    return result[0], result[1], result[2]


def _least_squares(rows: list[list[float]], targets: list[float]) -> list[float]:
    """Solves the normal equations, with a small ridge, by elimination."""
    n = len(rows[0])
    system = [
        [sum(row[i] * row[j] for row in rows) for j in range(n)]
        + [sum(row[i] * target for row, target in zip(rows, targets, strict=True))]
        for i in range(n)
    ]
    for i in range(n):
        system[i][i] += RIDGE * len(rows)
    for i in range(n):
        for below in range(i + 1, n):
            factor = system[below][i] / system[i][i]
            for j in range(i, n + 1):
                system[below][j] -= factor * system[i][j]
    solution = [0.0] * n
    for i in reversed(range(n)):
        known = sum(system[i][j] * solution[j] for j in range(i + 1, n))
        solution[i] = (system[i][n] - known) / system[i][i]
    return solution
