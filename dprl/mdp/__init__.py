"""Policies as Markov decision processes, to be tuned with reward."""

from dprl.mdp.action import ActionMDP
from dprl.mdp.base import Chain, ExplorationConfig, Gaussian, PolicyMDP
from dprl.mdp.denoising import DenoisingMDP

__all__ = ["ActionMDP", "Chain", "DenoisingMDP", "ExplorationConfig", "Gaussian", "PolicyMDP"]
