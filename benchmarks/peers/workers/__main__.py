"""The loop of every worker: JSON lines in, JSON lines out.

python -m workers MODULE convert SOURCE TARGET PRECISION
python -m workers MODULE serve SETTINGS
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from workers.protocol import Settings, Worker


def main() -> None:
    """Answer what the command line asks for; the first line says whether loading or conversion worked."""
    # Libraries print. Their standard output goes where their errors go; the answers keep the real one.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, task, *rest = sys.argv[1:]
    try:
        module = importlib.import_module(f"workers.{name}")
        if task == "convert":
            source, target, precision = rest
            module.convert(Path(source), Path(target), precision)
            _say(channel, {"ready": True})
            return
        worker: Worker = module.load(Settings(**json.loads(rest[0])))
    except Exception as error:
        _say(channel, _failure(error))
        return
    _say(channel, {"ready": True})
    for line in sys.stdin:
        try:
            _say(channel, _answer(worker, json.loads(line)))
        except Exception as error:
            _say(channel, _failure(error))


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "begin":
        worker.begin(request["speculation"])
        return {"ready": True}
    if request["do"] == "logits":
        return {"told": _save(worker.logits(request["prompt"]), request["file"])}
    return asdict(worker.run(request["prompts"], request["max_tokens"], request["speculation"]))


def _save(logits: Any, file: str) -> bool:
    """Write logits as float32 and tokens as int64, for NumPy; whether there are any."""
    if logits is None:
        return False
    import numpy as np

    array = np.asarray(logits)
    np.save(file, array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))
    return True


def _failure(error: Exception) -> dict[str, str]:
    """The error in one line; all of it goes to the log."""
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _say(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
