"""Two puzzles on 4x4 grids: write any Latin square of four symbols, and complete a sudoku with 12 givens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from string import ascii_uppercase, digits

import numpy as np
from numpy.typing import NDArray

from ..puzzles import Grid, all_sudokus, blank_out, blocks_hold, completes, to_grid, to_text
from .base import BenchTask, Question

SIZE = 4
BLANKS = 4
EMPTY: Grid = ((0,) * SIZE,) * SIZE


@cache
def all_latin_squares() -> tuple[Grid, ...]:
    """All 576 Latin squares of size 4, built row by row."""
    partial: list[Grid] = [()]
    for _ in range(SIZE):
        partial = [
            (*grid, row)
            for grid in partial
            for row in permutations(range(1, SIZE + 1))
            if all(len(set(column)) == len(column) for column in zip(*grid, row, strict=True))
        ]
    return tuple(partial)


@dataclass(frozen=True)
class LatinQuestion(Question):
    """Any Latin square of the symbols scores 1, as lines of symbols at commas.

    Lenient reading takes the first four lines that have exactly these symbols, strict reading the whole text.
    """

    symbols: tuple[str, ...]

    def grade(self, text: str, strict: bool = False) -> float:
        rows = [line.split(",") for line in text.strip().splitlines()]
        if not strict:
            stripped = [[cell.strip() for cell in row] for row in rows]
            rows = [row for row in stripped if sorted(row) == sorted(self.symbols)][:SIZE]
        grid = tuple(tuple(self.symbols.index(cell) + 1 if cell in self.symbols else 0 for cell in row) for row in rows)
        return float(completes(grid, EMPTY))

    def draw(self, rng: random.Random) -> str:
        return draw_latin(rng, self.symbols)


def draw_latin(rng: random.Random, symbols: tuple[str, ...]) -> str:
    return "\n".join(",".join(symbols[number - 1] for number in row) for row in rng.choice(all_latin_squares()))


@dataclass(frozen=True)
class LatinTask(BenchTask):
    """A size is that of the grid."""

    def ask(self, rng: random.Random, size: int) -> LatinQuestion:
        symbols = tuple(rng.sample(ascii_uppercase + digits, size))
        prompt = (
            f"Write a Latin square of the symbols {', '.join(symbols)}: {size} lines of {size} symbols with commas, "
            "each symbol once in every line and column. Write only the lines."
        )
        return LatinQuestion(self.name, prompt, draw_latin(rng, symbols), symbols)

    def example_size(self, rng: random.Random, size: int) -> int:
        return size


@dataclass(frozen=True)
class SudokuQuestion(Question):
    """Only the solution scores 1.

    Lenient reading takes the first four lines of four digits, whatever blanks and commas are in them; strict
    reading the whole text.
    """

    givens: Grid

    def grade(self, text: str, strict: bool = False) -> float:
        lines = text.strip().splitlines()
        if not strict:
            bare = ["".join(line.replace(",", " ").split()) for line in lines]
            lines = [line for line in bare if line.isdigit() and len(line) == SIZE][:SIZE]
        grid = to_grid("\n".join(lines))
        written = grid is not None and (not strict or to_text(grid) == text.strip())
        return float(grid is not None and written and completes(grid, self.givens) and blocks_hold(grid))

    def draw(self, rng: random.Random) -> str:
        return self.answer


@cache
def sudokus_array() -> NDArray[np.int_]:
    """All solved sudokus: [288, 4, 4]."""
    return np.array(all_sudokus())


def solutions(givens: Grid) -> int:
    """How many sudokus have these givens."""
    wanted = np.array(givens)
    return int(((sudokus_array() == wanted) | (wanted == 0)).all((1, 2)).sum())


@dataclass(frozen=True)
class SudokuTask(BenchTask):
    """A size is that of the grid. Every puzzle has one solution."""

    def ask(self, rng: random.Random, size: int) -> SudokuQuestion:
        grid = rng.choice(all_sudokus())
        givens = blank_out(rng, grid, BLANKS)
        while solutions(givens) > 1:
            givens = blank_out(rng, grid, BLANKS)
        prompt = (
            "Complete the 4x4 sudoku: replace each 0. Every line, column and 2x2 block has the numbers 1 to 4 once. "
            f"Write only the four lines.\n{to_text(givens)}"
        )
        return SudokuQuestion(self.name, prompt, to_text(grid), givens)

    def example_size(self, rng: random.Random, size: int) -> int:
        return size


def puzzle_tasks() -> dict[str, BenchTask]:
    """The two puzzles, by name, as often as in the paper."""
    tasks: tuple[BenchTask, ...] = (
        LatinTask("latin_square_n4", (SIZE,), 100),
        SudokuTask("sudoku_n4_12", (SIZE,), 108),
    )
    return {task.name: task for task in tasks}
