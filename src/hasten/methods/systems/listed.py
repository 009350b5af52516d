"""Published systems that are no decoders of their own: kernels, recipes, evaluations. Each says what runs it."""

from __future__ import annotations

from hasten.engine.registry import register_system

register_system(
    "flashdecoding-pp",
    role="kernel",
    family="model/cuda",
    exactness="lossless",
    paper="2311.01282",
    title="FlashDecoding++: splits need no common maximum (GPU)",
    command="hasten generate PROMPT --backend cuda",
)
register_system(
    "scylla",
    role="recipe",
    family="bench",
    paper="2505.07858",
    title="Scylla: what a drafter's training and size are worth",
    command="hasten train scylla --output DIR",
)
register_system(
    "parallelbench",
    role="evaluation",
    family="tasks/parallelbench",
    paper="2510.04767",
    title="ParallelBench: what filling positions at once costs",
    command="hasten bench --model tiny-block --suite parallelbench-n15",
)
register_system(
    "hydragen",
    role="batching",
    family="model",
    exactness="lossless",
    paper="2402.05099",
    title="Hydragen: what requests share is read once for all",
    command="hasten serve",
)
