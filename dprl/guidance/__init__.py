"""Guides: what moves the denoising steps of a policy whose weights stay as they are."""

from dprl.guidance.command import CommandGuide
from dprl.guidance.step import DenoisingStep, Guide, Guides, Told, guided
from dprl.guidance.value import DiffuserGuide, NoisyValue, Reward, Value, ValueGuide

__all__ = [
    "CommandGuide",
    "DenoisingStep",
    "DiffuserGuide",
    "Guide",
    "Guides",
    "NoisyValue",
    "Reward",
    "Told",
    "Value",
    "ValueGuide",
    "guided",
]
