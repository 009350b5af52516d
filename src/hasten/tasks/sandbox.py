"""Running a function that a model wrote, in a process of its own with little time, memory and rights.

This keeps accidents in (endless loops, huge lists, stray file names). It is no defence against an attacker:
for code of unknown origin, use a container or a virtual machine around it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CPU_SECONDS = 2
WALL_SECONDS = 5
MEMORY_BYTES = 512 * 2**20

# The child reads the code and the arguments, and writes the results. It never sees the expected ones.
CHILD = """
import collections, contextlib, functools, io, itertools, json, math, re, resource, string, sys

job = json.load(sys.stdin)
out, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()

def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems, such as macOS, lack some limits
        resource.setrlimit(kind, (value, value))

limit(resource.RLIMIT_CPU, job["cpu"])
limit(resource.RLIMIT_AS, job["memory"])
limit(resource.RLIMIT_FSIZE, 0)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NOFILE, 3)

DENIED = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "fcntl.", "mmap.")

def refuse(event, args):
    if event.startswith(DENIED):
        raise PermissionError(event)

sys.addaudithook(refuse)
space = {"__name__": "answer"}
exec(compile(job["code"], "answer", "exec"), space)
results = [json.dumps(space[job["name"]](*args), sort_keys=True) for args in job["arguments"]]
out.write(json.dumps(results))
"""


def call_all(code: str, name: str, arguments: Sequence[Sequence[Any]]) -> list[str] | None:
    """Define `name` by `code` and call it with each of the arguments: the results as JSON, or None."""
    job = {"code": code, "name": name, "arguments": arguments, "cpu": CPU_SECONDS, "memory": MEMORY_BYTES}
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
        text=True,
        encoding="utf-8",
    )
    try:
        written, _ = child.communicate(json.dumps(job), timeout=WALL_SECONDS)
    except (subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # its own session, so this ends what it started too
            child.communicate()
    try:
        results = json.loads(written)
    except ValueError:
        return None
    if child.returncode != 0 or not isinstance(results, list):
        return None
    return [str(result) for result in results]
