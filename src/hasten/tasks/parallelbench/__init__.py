"""ParallelBench: 17 easy tasks that show what decoding several tokens at once costs in quality.

Kang, Galim, Oh et al., "ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs", 2025,
arXiv 2510.04767. Questions, words and graders are our own; `waiting_line` and `writing` say what differs. `theory`
has the best that an ideal model can do, `oracle` that model.
"""

from .base import BenchTask, Question, questions, score
from .operations import OPERATIONS, SEVERAL_ANSWERS, ListProblem
from .oracle import CountingOracle, Oracle, ShuffleOracle, list_oracle
from .puzzles import puzzle_tasks
from .waiting_line import ListQuestion, name_tasks, word_tasks
from .writing import writing_tasks

PARALLELBENCH: dict[str, BenchTask] = name_tasks() | writing_tasks() | puzzle_tasks()

# The list operations on 15 names: longer lists, weaker dependency between two of their items.
PARALLELBENCH_N15: dict[str, BenchTask] = name_tasks((15,), 100, suffix="_n15")

__all__ = [
    "OPERATIONS",
    "PARALLELBENCH",
    "PARALLELBENCH_N15",
    "SEVERAL_ANSWERS",
    "BenchTask",
    "CountingOracle",
    "ListProblem",
    "ListQuestion",
    "Oracle",
    "Question",
    "ShuffleOracle",
    "list_oracle",
    "name_tasks",
    "puzzle_tasks",
    "questions",
    "score",
    "word_tasks",
    "writing_tasks",
]
