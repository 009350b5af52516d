"""Builds the native step and the native sampling with the machine's C++ compiler; other code serves without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = {
    # A product and a sum are one operation: clang has to be asked for it.
    "src/hasten/model/native/step.cpp": (
        "_step.so",
        "-ffp-contract=fast",
        *(("-ldl",) if sys.platform == "linux" else ()),
    ),
    # Every instruction set gives the same bits.
    "src/hasten/engine/sampling/native/sample.cpp": ("_sample.so", "-ffp-contract=off"),
}
"""Each with the library's name and what the compiler is told beside `FLAGS`."""
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-pthread", "-Wno-psabi")


class NativeStep(BuildHookInterface):  # type: ignore[type-arg]
    """Wheels and editable installations get the libraries; a source distribution gets the source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            self.app.display_warning("hasten: no C++ compiler, so nothing native; PyTorch and NumPy do its work")
            return
        for source, (name, *options) in SOURCES.items():
            file = Path(self.root) / source
            # A wheel may be of other machines than this one, whose libraries stay where they are.
            target = file.with_name(name) if version == "editable" else Path(mkdtemp()) / name
            command = [compiler, *FLAGS, str(file), *options, "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                self.app.display_warning(f"hasten: {file.name} was not built; slower code does its work\n{done.stderr}")
                continue
            if version != "editable":
                build_data["force_include"][str(target)] = str(Path(source).relative_to("src").with_name(name))
            # The libraries know nothing of Python: one wheel serves all of its versions.
            build_data["pure_python"], build_data["tag"] = False, f"py3-none-{platform(compiler)}"


def platform(compiler: str) -> str:
    """The tag of the machines that a compiler makes code for, which may be others than this one."""
    own = sysconfig.get_platform()
    if sys.platform == "linux":
        machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
        own = f"linux-{machine.partition('-')[0]}" if machine else own
    return own.replace("-", "_").replace(".", "_")
