"""Guides: what moves the denoising steps of a policy whose weights stay as they are."""

from dprl.guidance.step import DenoisingStep, Guide, Guides, guided
from dprl.guidance.value import DiffuserGuide, NoisyValue, Reward, Value, ValueGuide

__all__ = ["DenoisingStep", "DiffuserGuide", "Guide", "Guides", "NoisyValue", "Reward", "Value", "ValueGuide", "guided"]
