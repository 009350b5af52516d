"""Requests, scheduler, step loop, sampling, verification, and the registry of methods."""

from hasten.engine.draft import ROOT, Draft, Drawn
from hasten.engine.drafter import Drafter, Observation
from hasten.engine.engine import Engine, Progress
from hasten.engine.grammar import Constraint
from hasten.engine.params import SamplingParams
from hasten.engine.registry import Method, Target, methods, register
from hasten.engine.request import Request, Statistics, TokenLogprobs
from hasten.engine.scheduler import Limits

__all__ = [
    "ROOT",
    "Constraint",
    "Draft",
    "Drafter",
    "Drawn",
    "Engine",
    "Limits",
    "Method",
    "Observation",
    "Progress",
    "Request",
    "SamplingParams",
    "Statistics",
    "Target",
    "TokenLogprobs",
    "methods",
    "register",
]
