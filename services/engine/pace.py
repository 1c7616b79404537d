"""How long a step takes, learnt from the steps that were: t = a + b·tokens + c·kv_tokens.

`tokens` are those computed in the step, `kv_tokens` the lengths of the sequences that take part. Plain Python, no
clock: seconds are given. The scheduler asks it how many tokens of prefill fit beside the running sequences.
"""

from __future__ import annotations

from collections import deque

WINDOW = 64
"""Steps remembered of each kind, with prefill and without: a long run of decodes must not make it forget what a prompt
costs."""

FEWEST = 4
"""Steps before anything is predicted."""

RIDGE = 1e-4
"""Relative weight of "all coefficients are zero": decides where the steps cannot tell the coefficients apart."""


_COLUMNS = 4
"""1, tokens, kv_tokens, seconds."""


class _Window:
    """The last observations of one kind, as the sums of the products of their columns: what a fit needs."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, ...]] = deque()
        self.sums = [[0.0] * _COLUMNS for _ in range(_COLUMNS)]

    def add(self, *row: float) -> None:
        self._rows.append(row)
        self._count(row, 1)
        if len(self._rows) > WINDOW:
            self._count(self._rows.popleft(), -1)

    def _count(self, row: tuple[float, ...], sign: int) -> None:
        for sums, value in zip(self.sums, row, strict=True):
            for column, other in enumerate(row):
                sums[column] += sign * value * other


class Pace:
    """The fitted model of one engine's steps."""

    def __init__(self) -> None:
        self._decodes = _Window()
        self._mixed = _Window()
        self._coefficients: tuple[float, float, float] | None = None

    def observe(self, *, tokens: int, kv_tokens: int, seconds: float, prefills: bool) -> None:
        """A step took so long. `prefills`: it computed more than one token of some sequence."""
        (self._mixed if prefills else self._decodes).add(1.0, tokens, kv_tokens, seconds)
        self._coefficients = None

    def seconds(self, *, tokens: int, kv_tokens: int) -> float | None:
        """How long such a step will take; None as long as too few were seen."""
        if not self._knows_enough:
            return None
        a, b, c = self._fitted()
        return a + b * tokens + c * kv_tokens

    def tokens_within(self, seconds: float, *, kv_tokens: int) -> float:
        """How many tokens a step may compute and still end within `seconds`; infinite where nothing says otherwise."""
        if not self._knows_enough:
            return float("inf")
        a, b, c = self._fitted()
        spare = seconds - a - c * kv_tokens
        if spare <= 0:
            return 0.0
        return spare / b if b > 0 else float("inf")

    @property
    def _knows_enough(self) -> bool:
        return self._decodes.sums[0][0] + self._mixed.sums[0][0] >= FEWEST

    def _fitted(self) -> tuple[float, float, float]:
        if self._coefficients is None:
            windows = zip(self._decodes.sums, self._mixed.sums, strict=True)
            sums = [[x + y for x, y in zip(*rows, strict=True)] for rows in windows]
            self._coefficients = _fit(sums)
        return self._coefficients


def _fit(sums: list[list[float]]) -> tuple[float, float, float]:
    """Least squares with no coefficient below zero: where one comes out negative it is left out and the rest fitted
    again (for three columns that is near enough to the optimum)."""
    count = sums[0][0]
    scales = [max(sums[0][column] / count, 1e-9) for column in range(3)]
    columns = [0, 1, 2]
    solution: list[float] = []
    while columns:
        system = [
            [sums[i][j] / (scales[i] * scales[j]) + RIDGE * count * (i == j) for j in columns]
            + [sums[i][3] / scales[i]]
            for i in columns
        ]
        solution = _solve(system)
        worst = min(range(len(columns)), key=solution.__getitem__)
        if solution[worst] >= 0:
            break
        del columns[worst], solution[worst]
    result = [0.0, 0.0, 0.0]
    for column, value in zip(columns, solution, strict=True):
        result[column] = value / scales[column]
    return result[0], result[1], result[2]


def _solve(system: list[list[float]]) -> list[float]:
    """Solves a symmetric positive definite system, right-hand side in the last column, by elimination."""
    n = len(system)
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
