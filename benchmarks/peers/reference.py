"""transformers in float32: what answers and predictions of all peers are held against."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from catalogue import PEERS
from environments import Unavailable
from process import Process
from workers.protocol import Settings

from hasten.errors import UserError


class Reference:
    """Loaded when it is first asked, in the interpreter that runs the comparison; it sleeps while others are measured.

    Args:
        settings: what it loads.
        log: what it prints goes there.
        stack: ends it.
    """

    def __init__(
        self, settings: Settings, log: Path, timeout: float, say: Callable[[str], None], stack: ExitStack
    ) -> None:
        self.settings, self.log, self.timeout, self.say, self.stack = settings, log, timeout, say, stack
        self.process: Process | None = None

    @contextmanager
    def _awake(self) -> Iterator[Process]:
        """The process, while it may compute.

        Raises:
            UserError: it does not load, or fails.
        """
        try:
            if self.process is None:
                self.say("reference: transformers, float32")
                peer = PEERS["transformers"]
                self.process = Process(peer, self.settings, self.log, self.timeout, Path(sys.executable))
                self.stack.callback(self.process.close)
            with self.process.awake():
                yield self.process
        except Unavailable as error:
            raise UserError(f"transformers gives no reference: {error} ({self.log})") from error

    def answers(self, prompts: Sequence[list[int]], max_tokens: int) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy answers, prompt by prompt, and by how many logits each of their tokens is before the second one."""
        answers, gaps = [], []
        for number, prompt in enumerate(prompts, 1):
            with self._awake() as process:
                self.say(f"reference: answer {number} of {len(prompts)}")
                answer = process.run([prompt], max_tokens, None).tokens[0]
                logits = process.logits([*prompt, *answer[:-1]])
            assert logits is not None
            first, second = logits[-max_tokens:].topk(2).values.unbind(-1)
            answers.append(answer)
            gaps.append([round(gap, 4) for gap in (first - second).tolist()])
        return answers, gaps

    def logits(self, prompt: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] behind every token of a prompt."""
        with self._awake() as process:
            logits = process.logits(prompt)
        assert logits is not None
        return logits
