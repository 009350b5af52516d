"""Arithmetic, worked out one digit at a time.

The answer first restates the numbers, padded to one length, so that the digits of a step stand at fixed
distances. Every step names its digits, the carry, and the result so far: each next token depends on a few
tokens only, and the final number is a copy.
"""

from __future__ import annotations

import random
from abc import abstractmethod

from .base import Example, Task, pick_size, register


def number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


class Arithmetic(Task):
    category = "arithmetic"

    def grade(self, example: Example, output: str) -> bool:
        # The steps may be wrong or missing: the number after the last "so" counts.
        _, _, result = output.rpartition("so ")
        return result.strip().rstrip(".") == str(example.meta["result"])

    @abstractmethod
    def generate(self, rng: random.Random, difficulty: float) -> Example: ...


@register
class Addition(Arithmetic):
    name = "addition"
    title = "Add two numbers, digit by digit"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        size = pick_size(rng, 2, 4, difficulty)
        a, b = number(rng, size), number(rng, rng.randint(2, size))
        if rng.random() < 0.5:
            a, b = b, a
        first, second = f"{a:0{size}}", f"{b:0{size}}"
        steps, carry, have = [], 0, ""
        for x, y in zip(reversed(first), reversed(second), strict=True):
            total = int(x) + int(y) + carry
            step = f"{x}+{y}+{carry}={total}"
            carry, have = total // 10, f"{total % 10}{have}"
            steps.append(f"{step}, carry {carry}, have {have}")
        answer = f"{first}+{second}: {'; '.join(steps)}; so {a + b}"
        return self.example(f"Add {a} and {b}, step by step. End with: so RESULT", answer, result=a + b)


@register
class Subtraction(Arithmetic):
    name = "subtraction"
    title = "Subtract a number from a larger one, digit by digit"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        size = pick_size(rng, 2, 4, difficulty)
        a, b = number(rng, size), number(rng, rng.randint(2, size))
        a, b = max(a, b), min(a, b)
        first, second = f"{a:0{size}}", f"{b:0{size}}"
        steps, borrow, have = [], 0, ""
        for x, y in zip(reversed(first), reversed(second), strict=True):
            need = int(x) < int(y) + borrow
            top = int(x) + 10 * need
            digit = top - int(y) - borrow
            step = f"{top}-{y}-{borrow}={digit}"
            borrow, have = int(need), f"{digit}{have}"
            steps.append(f"{step}, borrow {borrow}, have {have}")
        answer = f"{first}-{second}: {'; '.join(steps)}; so {a - b}"
        return self.example(f"Subtract {b} from {a}, step by step. End with: so RESULT", answer, result=a - b)


@register
class Multiplication(Arithmetic):
    name = "multiplication"
    title = "Multiply a number by one digit, digit by digit"

    def generate(self, rng: random.Random, difficulty: float) -> Example:
        a, b = number(rng, pick_size(rng, 2, 3, difficulty)), rng.randint(2, 9)
        steps, carry, have = [], 0, ""
        for x in reversed(str(a)):
            total = int(x) * b + carry
            step = f"{x}*{b}+{carry}={total}"
            carry, have = total // 10, f"{total % 10}{have}"
            steps.append(f"{step}, carry {carry}, have {have}")
        answer = f"{a}*{b}: {'; '.join(steps)}; so {a * b}"
        return self.example(f"Multiply {a} by {b}, step by step. End with: so RESULT", answer, result=a * b)
