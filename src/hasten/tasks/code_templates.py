"""The functions that `code.py` asks for, from simple to longer ones.

Each is both the reference implementation and, with its names and the constant `k` replaced, the answer. The
names of the arguments say what they are: `xs` numbers, `ws` words, `s` a text, `n` a positive number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """A function that takes some arguments and the constant `k` last, and its source."""

    function: Callable[..., Any]
    source: str
    arguments: tuple[str, ...]

    def call(self, values: list[Any], k: int) -> Any:
        copies = [list(value) if isinstance(value, list) else value for value in values]
        return self.function(*copies, k)


TEMPLATES: list[Template] = []


def template(function: Callable[..., Any]) -> Callable[..., Any]:
    arguments = tuple(name for name in inspect.signature(function).parameters if name != "k")
    TEMPLATES.append(Template(function, inspect.getsource(function), arguments))
    return function


@template
def numbers_plus_k(xs: list[int], k: int) -> list[int]:
    """Return the numbers in xs plus k."""
    return [x + k for x in xs]


@template
def numbers_times_k(xs: list[int], k: int) -> list[int]:
    """Return the numbers in xs times k."""
    return [x * k for x in xs]


@template
def plus_k(n: int, k: int) -> int:
    """Return n plus k."""
    return n + k


@template
def times_k(n: int, k: int) -> int:
    """Return n times k."""
    return n * k


@template
def whether_divisible_k(n: int, k: int) -> bool:
    """Return whether n is divisible by k."""
    return n % k == 0


@template
def rest_divided_k(n: int, k: int) -> int:
    """Return the rest of n divided by k."""
    return n % k


@template
def power_k(n: int, k: int) -> Any:
    """Return n to the power of k."""
    return n**k


@template
def repeated_k_times(s: str, k: int) -> str:
    """Return s repeated k times."""
    return s * k


@template
def first_k_characters(s: str, k: int) -> str:
    """Return the first k characters of s."""
    return s[:k]


@template
def last_k_characters(s: str, k: int) -> str:
    """Return the last k characters of s."""
    return s[-k:]


@template
def first_k_numbers(xs: list[int], k: int) -> list[int]:
    """Return the first k numbers of xs."""
    return xs[:k]


@template
def without_first_k_numbers(xs: list[int], k: int) -> list[int]:
    """Return xs without its first k numbers."""
    return xs[k:]


@template
def every_k_numbers(xs: list[int], k: int) -> list[int]:
    """Return the numbers at the places 0, k, 2 * k and so on of xs."""
    return xs[::k]


@template
def reverse_order(xs: list[int], k: int) -> list[int]:
    """Return xs in reverse order."""
    return xs[::-1]


@template
def whether_has_more_than_k(s: str, k: int) -> bool:
    """Return whether s has more than k characters."""
    return len(s) > k


@template
def sum_plus_k(xs: list[int], k: int) -> int:
    """Return the sum of xs plus k."""
    return sum(xs) + k


@template
def largest_number_times_k(xs: list[int], k: int) -> int:
    """Return the largest number of xs times k."""
    return max(xs) * k


@template
def smallest_number_minus_k(xs: list[int], k: int) -> int:
    """Return the smallest number of xs minus k."""
    return min(xs) - k


@template
def largest_number_minus_smallest(xs: list[int], k: int) -> int:
    """Return the largest number of xs minus the smallest one."""
    return max(xs) - min(xs)


@template
def k_smallest_numbers_sorted(xs: list[int], k: int) -> list[int]:
    """Return the k smallest numbers of xs, sorted."""
    return sorted(xs)[:k]


@template
def k_largest_numbers_largest_first(xs: list[int], k: int) -> list[int]:
    """Return the k largest numbers of xs, the largest first."""
    return sorted(xs, reverse=True)[:k]


@template
def whether_k(xs: list[int], k: int) -> bool:
    """Return whether k is in xs."""
    return k in xs


@template
def how_often_k(xs: list[int], k: int) -> int:
    """Return how often k is in xs."""
    return xs.count(k)


@template
def number_words(s: str, k: int) -> int:
    """Return the number of words in s."""
    return len(s.split())


@template
def upper_case(s: str, k: int) -> str:
    """Return s in upper case."""
    return s.upper()


@template
def whether_reads_same_backwards(s: str, k: int) -> bool:
    """Return whether s reads the same backwards."""
    return s == s[::-1]


@template
def sum_even_numbers(xs: list[int], k: int) -> int:
    """Return the sum of the even numbers in xs."""
    return sum(x for x in xs if x % 2 == 0)


@template
def sum_numbers_over_k(xs: list[int], k: int) -> int:
    """Return the sum of the numbers in xs over k."""
    return sum(x for x in xs if x > k)


@template
def sum_numbers_divisible_k(xs: list[int], k: int) -> int:
    """Return the sum of the numbers in xs divisible by k."""
    return sum(x for x in xs if x % k == 0)


@template
def count_numbers_under_k(xs: list[int], k: int) -> int:
    """Count the numbers in xs under k."""
    return sum(1 for x in xs if x < k)


@template
def count_numbers_divisible_k(xs: list[int], k: int) -> int:
    """Count the numbers in xs divisible by k."""
    return sum(1 for x in xs if x % k == 0)


@template
def numbers_least_k(xs: list[int], k: int) -> list[int]:
    """Return the numbers in xs that are at least k."""
    return [x for x in xs if x >= k]


@template
def numbers_not_divisible_k(xs: list[int], k: int) -> list[int]:
    """Return the numbers in xs not divisible by k."""
    return [x for x in xs if x % k != 0]


@template
def numbers_none_over_k(xs: list[int], k: int) -> list[int]:
    """Return the numbers in xs, none of them over k."""
    return [min(x, k) for x in xs]


@template
def squares_numbers_under_k(xs: list[int], k: int) -> list[int]:
    """Return the squares of the numbers in xs under k."""
    return [x * x for x in xs if x < k]


@template
def whether_all_numbers_over_k(xs: list[int], k: int) -> bool:
    """Return whether all numbers in xs are over k."""
    return all(x > k for x in xs)


@template
def whether_number_divisible_k(xs: list[int], k: int) -> bool:
    """Return whether a number in xs is divisible by k."""
    return any(x % k == 0 for x in xs)


@template
def words_more_than_k_letters(ws: list[str], k: int) -> list[str]:
    """Return the words in ws with more than k letters."""
    return [w for w in ws if len(w) > k]


@template
def count_words_exactly_k_letters(ws: list[str], k: int) -> int:
    """Count the words in ws with exactly k letters."""
    return sum(1 for w in ws if len(w) == k)


@template
def words_repeated_k_times(ws: list[str], k: int) -> list[str]:
    """Return the words in ws, each repeated k times."""
    return [w * k for w in ws]


@template
def lengths_words(ws: list[str], k: int) -> list[int]:
    """Return the lengths of the words in ws."""
    return [len(w) for w in ws]


@template
def different_words_sorted(ws: list[str], k: int) -> list[str]:
    """Return the different words in ws, sorted."""
    return sorted(set(ws))


@template
def words_sorted_length(ws: list[str], k: int) -> list[str]:
    """Return the words in ws sorted by length."""
    return sorted(ws, key=len)


@template
def longest_word(ws: list[str], k: int) -> str:
    """Return the longest word in ws."""
    return max(ws, key=len)


@template
def join_first_k_words_commas(ws: list[str], k: int) -> str:
    """Join the first k words of ws with commas."""
    return ",".join(ws[:k])


@template
def count_vowels(s: str, k: int) -> int:
    """Count the lower-case vowels in s."""
    return sum(1 for c in s if c in "aeiou")


@template
def without_vowels(s: str, k: int) -> str:
    """Return s without its lower-case vowels."""
    return "".join(c for c in s if c not in "aeiou")


@template
def words_reverse_order(s: str, k: int) -> str:
    """Return s with the words in reverse order."""
    return " ".join(s.split()[::-1])


@template
def sum_digits(n: int, k: int) -> int:
    """Return the sum of the digits of n."""
    return sum(int(c) for c in str(n))


@template
def sum_numbers_k(n: int, k: int) -> int:
    """Return the sum of the numbers from k to n, both included."""
    return sum(range(k, n + 1))


@template
def first_multiples_k(n: int, k: int) -> list[int]:
    """Return the first n multiples of k."""
    return [k * i for i in range(1, n + 1)]


@template
def divisors_least_k(n: int, k: int) -> list[int]:
    """Return the divisors of n that are at least k."""
    return [i for i in range(k, n + 1) if n % i == 0]


@template
def numbers_over_times_k(xs: list[int], n: int, k: int) -> list[int]:
    """Return the numbers in xs over n, times k."""
    return [x * k for x in xs if x > n]


@template
def words_more_than_letters_most(ws: list[str], n: int, k: int) -> list[str]:
    """Return the words in ws with more than n letters, at most k of them."""
    return [w for w in ws if len(w) > n][:k]


@template
def how_many_numbers_over_k(xs: list[int], k: int) -> dict[str, int]:
    """Count the numbers in xs over k as 'high' and the others as 'low', in a dict."""
    high = sum(1 for x in xs if x > k)
    return {"high": high, "low": len(xs) - high}


@template
def split_into_lists_k_numbers(xs: list[int], k: int) -> list[list[int]]:
    """Split xs into lists of k numbers."""
    return [xs[i : i + k] for i in range(0, len(xs), k)]


@template
def running_sums_starting_k(xs: list[int], k: int) -> list[int]:
    """Return the running sums of xs, starting at k."""
    out, total = [], k
    for x in xs:
        total += x
        out.append(total)
    return out


@template
def product_numbers_under_k(xs: list[int], k: int) -> int:
    """Return the product of the numbers in xs under k."""
    total = 1
    for x in xs:
        if x < k:
            total *= x
    return total


@template
def place_first_number_over_k(xs: list[int], k: int) -> int:
    """Return the place of the first number in xs over k, or -1."""
    for i, x in enumerate(xs):
        if x > k:
            return i
    return -1


@template
def without_repeated_numbers_same_order(xs: list[int], k: int) -> list[int]:
    """Return xs without repeated numbers, in the same order."""
    out: list[int] = []
    for x in xs:
        if x not in out:
            out.append(x)
    return out


@template
def count_how_often_word_more(ws: list[str], k: int) -> dict[str, int]:
    """Count how often each word of ws with more than k letters is in it."""
    out: dict[str, int] = {}
    for w in ws:
        if len(w) > k:
            out[w] = out.get(w, 0) + 1
    return out


@template
def how_often_can_be_halved(n: int, k: int) -> int:
    """Return how often n can be halved, rounding down, until it is under k."""
    total = 0
    while n >= k:
        n //= 2
        total += 1
    return total


@template
def add_last_two_k_times(n: int, k: int) -> int:
    """Start with n and n + 1, add the last two k times, return the number before the last."""
    a, b = n, n + 1
    for _ in range(k):
        a, b = b, a + b
    return b


@template
def written_base_k(n: int, k: int) -> str:
    """Return n written in base k."""
    out = ""
    while n > 0:
        out = str(n % k) + out
        n //= k
    return out
