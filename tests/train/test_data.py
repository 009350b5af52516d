"""Where training data comes from: questions of all tasks in turn, and passes over what there is."""

from __future__ import annotations

from itertools import islice

from hasten.tasks import TASKS, split_of
from hasten.train.data import Document, Passes, training_examples


def test_questions_are_of_all_tasks_in_turn():
    questions = list(training_examples(2 * len(TASKS), 3, 0.3))
    assert [question.task for question in questions] == sorted(TASKS) * 2
    assert all(split_of(question.prompt) == "train" for question in questions)
    assert list(islice(training_examples(500, 3, 0.3), 30)) == questions[:30]
    assert next(training_examples(1, 4, 0.3)) != questions[0]


def test_tasks_that_do_not_fit_give_way():
    short = list(training_examples(20, 0, fits=lambda question: len(question.answer) < 16))
    assert len(short) == 20 and len({question.task for question in short}) > 4
    assert all(len(question.answer) < 16 for question in short)
    assert list(training_examples(20, 0, fits=lambda question: False)) == []


def test_a_pass_has_every_document_once():
    documents = [Document([number] * (2 + number % 5), 1) for number in range(2, 40)]
    passes = Passes(documents, 0, 64, seed=1)
    orders = []
    for number in (0, 1, 0):
        rows = [row for batch in passes.pool(number, 1.0) for row in batch.ids.tolist()]
        assert sorted(row[0] for row in rows) == list(range(2, 40))
        orders.append(rows)
    assert orders[0] == orders[2] != orders[1]
    assert all(batch.ids.numel() <= 64 for batch in passes.pool(0, 1.0))
