"""The Python task: each template is its own right answer, and no answer harms the grader."""

from __future__ import annotations

import time

import pytest

from hasten.tasks import TASKS, Example
from hasten.tasks.code_templates import TEMPLATES
from hasten.tasks.sandbox import call_all

EXAMPLE = Example("python", "", "", {"function": "f", "tests": [([[1, 2]], "3"), ([[5]], "5")]})


def grade(code: str) -> bool:
    return TASKS["python"].grade(EXAMPLE, code)


def test_enough_distinct_templates() -> None:
    assert len(TEMPLATES) >= 40
    assert len({template.function.__doc__ for template in TEMPLATES}) == len(TEMPLATES)


def test_right_and_wrong_answers() -> None:
    assert grade("def f(xs):\n    return sum(xs)")
    assert grade("def f(xs):\n    print('noise')\n    import math\n    return int(math.fsum(xs))")
    assert not grade("def f(xs):\n    return len(xs)")
    assert not grade("def f(xs):\n    return")
    assert not grade("def g(xs):\n    return sum(xs)")
    assert not grade("def f(xs:")
    assert not grade("f = 3")


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "return sum(list(range(10**9)))",
        "return 'x' * 10**10",
        "return f(xs)",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
    ],
)
def test_survives_runaway_code(body: str) -> None:
    start = time.monotonic()
    assert not grade(f"def f(xs):\n    {body}")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "body",
    [
        "return open('/etc/hostname').read()",
        "open('/tmp/hasten-should-not-exist', 'w').write('x')",
        "import os; return os.listdir('/')",
        "import os; return os.fork()",
        "import subprocess; return subprocess.run(['true']).returncode",
        "import socket; return str(socket.socket())",
    ],
)
def test_no_files_processes_or_network(body: str) -> None:
    assert call_all(f"def f():\n    {body}", "f", [[]]) is None


def test_results_come_in_order() -> None:
    assert call_all("def f(a, b):\n    return {'b': b, 'a': a}", "f", [[1, 2], [3, 4]]) == [
        '{"a": 1, "b": 2}',
        '{"a": 3, "b": 4}',
    ]
