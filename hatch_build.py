"""Builds the native step (src/hasten/model/native) with the machine's C++ compiler; without one PyTorch does it all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = ("-ldl",) if sys.platform == "linux" else ()
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-pthread", "-Wno-psabi")


class NativeStep(BuildHookInterface):  # type: ignore[type-arg]
    """Wheels and editable installations get `_step.so`; a source distribution gets the source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "src/hasten/model/native"
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            self.app.display_warning("hasten: no C++ compiler, so no native step; PyTorch does its work")
            return
        target = folder / "_step.so"
        command = [compiler, *FLAGS, str(folder / "step.cpp"), *LIBRARIES, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(f"hasten: the native step was not built; PyTorch does its work\n{done.stderr}")
            return
        build_data["artifacts"].append(str(target.relative_to(self.root)))
        build_data["pure_python"], build_data["infer_tag"] = False, True
