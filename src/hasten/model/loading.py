"""Load a checkpoint, a Hugging Face folder or a GGUF file: one function, every architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hasten.errors import Notice, UserError, one_line
from hasten.model import cuda, native
from hasten.model.architectures import ARCHITECTURES
from hasten.model.architectures.base import TENSORS
from hasten.model.assembly import assemble
from hasten.model.checkpoint import Tensors, read_json, resolve, tensor_shapes, weight_bytes
from hasten.model.config import ModelConfig
from hasten.model.decoder import Backend, Decoder, TorchBackend
from hasten.model.native import NativeBackend, Rounded
from hasten.model.quantization import read_quantization
from hasten.model.threads import settle
from hasten.model.weights import Transform

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SMALL_MODEL_BYTES = 64 * 2**20
"""Checkpoints up to this size stay in the processor's caches: there float32 costs no more than bf16."""


def read_config(folder: Path) -> ModelConfig:
    """The model configuration of a checkpoint folder, or of a GGUF file.

    Raises:
        UserError: no or unusable config.json, an unknown architecture (the message lists the known ones), or quantised
            weights; for a file, see `gguf.read_config`.
    """
    if folder.is_file():
        from hasten.model import gguf

        return gguf.read_config(gguf.open_gguf(folder))
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"architecture {kind!r} is not supported; supported are {known}")
    if quantised := read_quantization(raw.get("quantization_config")):
        raise UserError(f"{folder} is quantised ({quantised}): not supported yet; hasten loads plain weights only")
    try:
        _refuse_sizes(raw, folder)
        return ARCHITECTURES[kind].config(raw)
    except UserError:
        raise
    except Exception as error:
        # A bad field raises one of a dozen unrelated classes.
        raise UserError(f"{folder / 'config.json'} is not usable: {one_line(error)}") from error


def _refuse_sizes(raw: Mapping[str, Any], folder: Path) -> None:
    """Refuse more layers than there are tensors, and widths that no tensor has: a billion takes long to lay out.

    Raises:
        UserError: with the field's name. Where there are no tensors to compare with, whoever reads them says so.
    """
    shapes = tensor_shapes(folder)
    largest = max((axis for shape in shapes for axis in shape), default=0)
    for field, most in (("num_hidden_layers", len(shapes)), ("hidden_size", largest), ("head_dim", largest)):
        size = raw.get(field)
        if shapes and isinstance(size, int) and size > most:
            raise UserError(f"config.json has {field} {size}, which is more than the tensors in {folder} can hold")


def choose_dtype(folder: Path, dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: float32 for small models on CPU, else what the checkpoint says (bf16 where it is silent, as GGUF is).

    Raises:
        UserError: an unknown name; no weights to choose for.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
        return DTYPES[dtype]
    if device.type == "cpu" and weight_bytes(folder) <= SMALL_MODEL_BYTES:
        return torch.float32
    if folder.is_file():
        return torch.bfloat16
    raw = read_json(folder / "config.json")
    return DTYPES.get(str(raw.get("dtype", raw.get("torch_dtype"))), torch.bfloat16)


def choose_device(device: str) -> torch.device:
    """`auto`: the GPU if there is one.

    Raises:
        UserError: a device that does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device {device!r} is not available here") from error
    return chosen


WEIGHTS: dict[str, tuple[Rounded | None, Rounded | None]] = {
    "dense": (None, None),
    "int8": ("Q8_0", "Q8_0"),
    "int4": ("Q4_1", "Q8_0"),
}
"""What those of layers and of the head are rounded to."""
BACKENDS = ("auto", "torch", "native", "cuda")
NUMERICS = ("default", "invariant")


def load_model(
    model: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    weights: str = "dense",
    numerics: str = "default",
    transforms: Sequence[Transform] = (),
) -> Decoder:
    """Load a model for decoding.

    Args:
        model: a checkpoint folder, a GGUF file or a hub id.
        dtype: `auto`, `float32`, `bfloat16`, `float16` or `float64`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        backend: what runs the default forward pass: `torch`, `native` (`hasten.model.native`, on CPU), `cuda`
            (`hasten.model.cuda`), or `auto`: native where it can run the model, else torch.
        weights: `dense`, or rounded to `int8` or `int4` (Q8_0 and Q4_1, the head to Q8_0) as they are loaded;
            native only.
        numerics: `invariant` for rows whose results never depend on the rows beside them: the native backend, whose
            rows never do, or the cuda backend with passes of a fixed size.
        transforms: what is made of the weights, one after the other, before the backend stores them.

    Raises:
        UserError: anything wrong with the checkpoint or the arguments, in one sentence.
    """
    settle()
    folder = resolve(model)
    config = read_config(folder)
    target = choose_device(device)
    chosen = choose_dtype(folder, dtype, target)
    # A bf16 model's cache on CPU is float32: for few rows attention is several times as fast on it.
    cache_dtype = torch.promote_types(chosen, torch.float32) if target.type == "cpu" else chosen
    runner = choose_backend(backend, weights, numerics, config, chosen, target)
    tensors = open_tensors(folder, config, chosen, target)
    pieces = ARCHITECTURES[config.architecture].pieces(config, tensors)
    loaded = assemble(config, pieces, runner, cache_dtype, transforms)
    if tensors.expanded:
        kinds = ", ".join(sorted(set(tensors.expanded.values())))
        table = [*tensors.expanded] == [f"{TENSORS['embedding']}.weight"]
        which = f"its table of tokens, {kinds}, is" if table else f"weights of {kinds} are"
        what = f"{folder.name}: {which} expanded to {str(chosen).removeprefix('torch.')}"
        warnings.warn(what, Notice, stacklevel=2)
    if numerics == "invariant" and isinstance(runner, NativeBackend) and not runner.runs(loaded):
        raise UserError("invariant numerics: transforms made layers that the native step does not know")
    return loaded


def open_tensors(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The tensors of a checkpoint folder, or of a GGUF file.

    Raises:
        UserError: as `Tensors` and `gguf.open_gguf` say.
    """
    if folder.is_file():
        from hasten.model import gguf

        return gguf.GGUFTensors(gguf.open_gguf(folder), config, dtype, device)
    return Tensors(folder, dtype, device)


def choose_backend(
    name: str, weights: str, numerics: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Backend:
    """A backend by name.

    Raises:
        UserError: unknown, or not for this model.
    """
    for what, given, known in (
        ("backend", name, BACKENDS),
        ("weights", weights, WEIGHTS),
        ("numerics", numerics, NUMERICS),
    ):
        if given not in known:
            raise UserError(f"{what} must be one of {', '.join(known)}, not {given!r}")
    invariant = numerics == "invariant"
    optional = name == "auto" and not invariant and weights == "dense"
    if name == "auto":
        name = "cuda" if device.type == "cuda" and invariant else "native" if device.type == "cpu" else "torch"
    refusals = {"native": native.refusal, "cuda": cuda.refusal}
    reason = refusals[name](config, dtype, device) if name in refusals else None
    if reason is not None and not optional:
        raise UserError(f"the {name} backend cannot run this model: {reason}")
    if reason is None and name == "native":
        return NativeBackend(dtype, *WEIGHTS[weights])
    if weights != "dense":
        raise UserError(f"{weights} weights need the native backend")
    if reason is None and name == "cuda":
        from hasten.model.cuda.backend import CudaBackend

        return CudaBackend(invariant=invariant)
    if invariant:
        raise UserError("invariant numerics need the native or the cuda backend")
    return TorchBackend()
