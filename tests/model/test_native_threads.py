"""Threads that take native steps, under the sanitizers: no race, no stray access, the same bits; how many take part."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hasten.model.native.library import LIBRARY

COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-g", "-pthread", "-Wno-psabi", "-DPORTABLE")
PROGRAMS = ("native_threads", "native_attendance")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "sanitizers, others",
    # Where there is no futex, as on macOS, threads sleep on a condition variable.
    [("thread", ["-O1"]), ("thread", ["-O1", "-DWITHOUT_FUTEX"]), ("address,undefined", ["-O0"])],
)
def test_teams_of_threads(tmp_path: Path, sanitizers: str, others: list[str], program: str) -> None:
    assert COMPILER is not None
    source, target, step = Path(__file__).with_name(f"{program}.cpp"), tmp_path / program, LIBRARY.with_name("step.cpp")
    options = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *others, f'-DSTEP="{step}"')
    built = subprocess.run(
        [COMPILER, *FLAGS, *options, str(source), "-ldl", "-o", str(target)], capture_output=True, text=True
    )
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no sanitizer for {sanitizers}")
    assert built.returncode == 0, built.stderr[-2000:]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run([str(target)], env=environment, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("the thread sanitizer cannot run on this kernel")
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout
