"""Algorithms, one a file. Imported as `dprl.agents`, never under its bare name (that would make a second copy)."""

if __name__ != "dprl.agents":
    raise ImportError("import this package as 'dprl.agents', not as 'agents'")

from dprl.agents.bc import BC, BCConfig
from dprl.agents.decision_diffuser import DecisionDiffuser
from dprl.agents.diffuser import Diffuser, DiffuserConfig
from dprl.agents.diffusion_ql import DiffusionQL, DiffusionQLConfig
from dprl.agents.dppo import DPPO
from dprl.agents.dppo_config import DPPOConfig
from dprl.agents.energy import Energy, EnergyConfig
from dprl.agents.idql import IDQL, IDQLConfig
from dprl.agents.iql import IQL
from dprl.agents.online_idql import OnlineIDQL, OnlineIDQLConfig
from dprl.agents.outcome import Outcome, OutcomeConfig

__all__ = [
    "BC",
    "DPPO",
    "IDQL",
    "IQL",
    "BCConfig",
    "DPPOConfig",
    "DecisionDiffuser",
    "Diffuser",
    "DiffuserConfig",
    "DiffusionQL",
    "DiffusionQLConfig",
    "Energy",
    "EnergyConfig",
    "IDQLConfig",
    "OnlineIDQL",
    "OnlineIDQLConfig",
    "Outcome",
    "OutcomeConfig",
]
