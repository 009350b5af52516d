"""Requests, scheduler, step loop, sampling, verification, and the registry of methods."""

from hasten.engine.canvas.canvas import Canvas
from hasten.engine.canvas.denoiser import Denoiser
from hasten.engine.canvas.view import Hypothesis, View
from hasten.engine.canvas.window import BlockWindow, FullWindow, Passes, Window
from hasten.engine.context import ContextPolicy
from hasten.engine.drafting.approximation import Approximation
from hasten.engine.drafting.draft import ROOT, Draft, Drawn, Probe, SoftRows
from hasten.engine.drafting.drafter import Drafter, Observation
from hasten.engine.engine import Engine
from hasten.engine.job import Job
from hasten.engine.prompt import Embedded
from hasten.engine.registry import Knob, Method, Target, decoders, methods, register
from hasten.engine.report import Statistics, TokenLogprobs
from hasten.engine.request import Progress, Request
from hasten.engine.sampling.grammar import Constraint
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.scheduler import Limits

__all__ = [
    "ROOT",
    "Approximation",
    "BlockWindow",
    "Canvas",
    "Constraint",
    "ContextPolicy",
    "Denoiser",
    "Draft",
    "Drafter",
    "Drawn",
    "Embedded",
    "Engine",
    "FullWindow",
    "Hypothesis",
    "Job",
    "Knob",
    "Limits",
    "Method",
    "Observation",
    "Passes",
    "Probe",
    "Progress",
    "Request",
    "SamplingParams",
    "SoftRows",
    "Statistics",
    "Target",
    "TokenLogprobs",
    "View",
    "Window",
    "decoders",
    "methods",
    "register",
]
