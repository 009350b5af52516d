"""Grids to complete. 0 marks a blank: every cell is then one digit, one token, in question and answer."""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations, product

from .base import PROMPT_END, Example, Task, pick_size, register

Grid = tuple[tuple[int, ...], ...]


def to_text(grid: Grid) -> str:
    return "\n".join("".join(map(str, row)) for row in grid)


def to_grid(text: str) -> Grid | None:
    """The grid in a text, or None if there is anything else than rows of digits. Spaces do not matter."""
    rows = ["".join(line.split()) for line in text.splitlines() if line.strip()]
    if not all(row.isascii() and row.isdigit() for row in rows):
        return None
    return tuple(tuple(map(int, row)) for row in rows)


def blank_out(rng: random.Random, grid: Grid, blanks: int) -> Grid:
    size = len(grid)
    holes = set(rng.sample(range(size * size), blanks))
    return tuple(tuple(0 if y * size + x in holes else grid[y][x] for x in range(size)) for y in range(size))


def fits(grid: Grid, givens: Grid) -> bool:
    """Whether two grids of the same shape agree wherever the second has no blank."""
    rows = zip(grid, givens, strict=True)
    return all(given in (0, cell) for row, other in rows for cell, given in zip(row, other, strict=True))


def completes(grid: Grid, givens: Grid) -> bool:
    """Whether the grid has the givens, and each number once in every row and column."""
    numbers = set(range(1, len(givens) + 1))
    return (
        [len(row) for row in grid] == [len(row) for row in givens]
        and all(set(row) == numbers for row in grid)
        and all(set(column) == numbers for column in zip(*grid, strict=True))
        and fits(grid, givens)
    )


def blocks_hold(grid: Grid) -> bool:
    """Whether each 2x2 block of a 4x4 grid has four different numbers."""
    corners = product((0, 2), repeat=2)
    return all(len({grid[y][x], grid[y][x + 1], grid[y + 1][x], grid[y + 1][x + 1]}) == 4 for y, x in corners)


@cache
def all_sudokus() -> tuple[Grid, ...]:
    """All 288 solved 4x4 sudokus: so few that a puzzle is checked by comparing it with each."""
    rows = list(permutations((1, 2, 3, 4)))
    empty: Grid = ((0,) * 4,) * 4
    halves = [(a, b) for a, b in product(rows, rows) if len({*a[:2], *b[:2]}) == 4 == len({*a[2:], *b[2:]})]
    return tuple(top + bottom for top, bottom in product(halves, halves) if completes(top + bottom, empty))


@register
class Sudoku4(Task):
    name = "sudoku4"
    category = "puzzles"
    title = "Complete a 4x4 sudoku"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        blanks = pick_size(rng, 4, 8, difficulty)
        grid = rng.choice(all_sudokus())
        givens = blank_out(rng, grid, blanks)
        while sum(fits(other, givens) for other in all_sudokus()) > 1:
            givens = blank_out(rng, grid, blanks)
        prompt = f"Complete the 4x4 sudoku. 0 is a blank.\n{to_text(givens)}{PROMPT_END}"
        return Example(self.name, prompt, "\n" + to_text(grid), {"givens": givens})

    def grade(self, example: Example, output: str) -> bool:
        grid = to_grid(output)
        return grid is not None and completes(grid, example.meta["givens"]) and blocks_hold(grid)


@register
class Latin(Task):
    name = "latin"
    category = "puzzles"
    title = "Complete a Latin square; any completion is right"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        size = pick_size(rng, 3, 5, difficulty)
        rows, columns, numbers = (rng.sample(range(size), size) for _ in range(3))
        grid = tuple(tuple(numbers[(y + x) % size] + 1 for x in columns) for y in rows)
        givens = blank_out(rng, grid, rng.randint(2, size * size // 2))
        rule = f"Fill in the blanks (0): every row and column has the numbers 1 to {size} once."
        return Example(self.name, f"{rule}\n{to_text(givens)}{PROMPT_END}", "\n" + to_text(grid), {"givens": givens})

    def grade(self, example: Example, output: str) -> bool:
        grid = to_grid(output)
        return grid is not None and completes(grid, example.meta["givens"])
