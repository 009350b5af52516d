"""What a command imports before it does anything: nobody waits for a library that is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
from hasten.cli import main
sys.argv = ["hasten", *sys.argv[1:]]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
print("\\n", *sys.modules)
"""


def imported(code: str, *arguments: str) -> set[str]:
    """The modules that a process of its own has imported at its end."""
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(ran.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["train", "lm", "--help"]])
def test_help_does_not_wait_for_pytorch(arguments: list[str]) -> None:
    modules = imported(RUN, *arguments)
    assert "hasten.cli.generate" in modules
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_listing_models_does_not_wait_for_pytorch() -> None:
    assert not imported(RUN, "models") & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    modules = imported("import sys, hasten; print(*sys.modules)")
    assert not modules & {"torch", "transformers", "numpy", "typer", "rich"}


def test_generating_imports_neither_transformers_nor_tasks() -> None:
    modules = imported(RUN, "generate", "Reverse the list: red cat", "--max-tokens", "2")
    assert {"torch", "hasten.llm"} <= modules
    heavy = {
        "transformers",
        "torch._dynamo",
        "torch.distributed.tensor",
        "sympy",
        "scipy",
        "matplotlib",
        "llguidance",
        "hasten.tasks",
    }
    assert not modules & heavy
