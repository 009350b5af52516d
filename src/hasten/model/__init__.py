"""The transformer as pieces, and Hugging Face checkpoints to fill them."""

from hasten.model.config import DiffusionConfig, LayerConfig, ModelConfig, Slots, SlotsOf, State
from hasten.model.decoder import Decoder, Model
from hasten.model.loading import load_model
from hasten.model.oracle import CanvasOracle, OracleModel
from hasten.model.rows import Join, Rows, Span
from hasten.model.taps import Taps

__all__ = [
    "CanvasOracle",
    "Decoder",
    "DiffusionConfig",
    "Join",
    "LayerConfig",
    "Model",
    "ModelConfig",
    "OracleModel",
    "Rows",
    "Slots",
    "SlotsOf",
    "Span",
    "State",
    "Taps",
    "load_model",
]
