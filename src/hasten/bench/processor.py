"""What the processor is called."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

PARTS = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
}
"""Common ones of arm64, which Linux tells by the numbers of their makers only."""


def processor_name() -> str:
    """As its maker says, where the system tells; else the kind of machine."""
    return _told() or platform.processor() or platform.machine()


def _told() -> str | None:
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return name_in(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except (OSError, subprocess.SubprocessError):
        return None


def name_in(cpuinfo: str) -> str | None:
    """The first processor's name in Linux's list of them; None where it has none."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), re.sub(r"\s+", " ", value).strip())
    if fields.get("model name"):
        return fields["model name"]
    if "CPU part" not in fields:
        return None
    implementer, part = fields.get("CPU implementer", ""), fields["CPU part"]
    return PARTS.get((implementer, part), f"arm64 processor {implementer}:{part}")
