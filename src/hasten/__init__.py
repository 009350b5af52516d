"""hasten: the same tokens, sooner.

from hasten import LLM, SamplingParams
llm = LLM("tiny", method="ngram")
print(llm.generate("Reverse the list: red cat moon\\nAnswer:")[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.engine import Constraint, SamplingParams, methods
    from hasten.llm import LLM

__all__ = ["LLM", "Constraint", "SamplingParams", "UserError", "methods"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import: `hasten --help` and `import hasten` must not wait for it.
    if name == "LLM":
        from hasten.llm import LLM

        return LLM
    if name in ("Constraint", "SamplingParams", "methods"):
        from hasten import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")
