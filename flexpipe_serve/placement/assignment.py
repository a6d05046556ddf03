"""The assignment problem: rows to columns, one to one, at the least total cost."""

from __future__ import annotations

from collections.abc import Sequence


def assign(costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """For each row the column it takes, no column twice, with the least sum of costs (the Hungarian method).

    Exact for integers of any size; rows * rows * columns steps. Forbidden pairs get a cost that no sum of allowed ones
    reaches.

    Args:
        costs: [rows][columns], at least as many columns as rows.
    """
    num_rows = len(costs)
    num_columns = len(costs[0]) if num_rows else 0
    assert num_rows <= num_columns
    # Row and column prices under which no pair is cheaper than its prices say; column 0 and row 0 are a dummy pair.
    row_price: list[float] = [0] * (num_rows + 1)
    column_price: list[float] = [0] * (num_columns + 1)
    row_of = [0] * (num_columns + 1)
    for row in range(1, num_rows + 1):
        # A cheapest path from the new row over rows that have a column to a column that is free.
        row_of[0] = row
        column = 0
        slack: list[float | None] = [None] * (num_columns + 1)
        came_from = [0] * (num_columns + 1)
        is_done = [False] * (num_columns + 1)
        while row_of[column]:
            is_done[column] = True
            i = row_of[column]
            line, price = costs[i - 1], row_price[i]
            least: float | None = None
            nearest = 0
            for j in range(1, num_columns + 1):
                if is_done[j]:
                    continue
                reduced = line[j - 1] - price - column_price[j]
                known = slack[j]
                if known is None or reduced < known:
                    slack[j] = known = reduced
                    came_from[j] = column
                if least is None or known < least:
                    least, nearest = known, j
            assert least is not None
            for j in range(num_columns + 1):
                if is_done[j]:
                    row_price[row_of[j]] += least
                    column_price[j] -= least
                else:
                    known = slack[j]
                    if known is not None:
                        slack[j] = known - least
            column = nearest
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    columns = [0] * num_rows
    for j in range(1, num_columns + 1):
        if row_of[j]:
            columns[row_of[j] - 1] = j - 1
    return tuple(columns)
