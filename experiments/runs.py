"""The kinds of work: collect, pretrain, learn offline, train critics, fine-tune. Each checks all before it starts."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import numpy as np
import torch
import tyro
from tyro.conf import AvoidSubcommands

from dprl import checkpoint
from dprl.agents import (
    BC,
    DPPO,
    IDQL,
    IQL,
    BCConfig,
    DecisionDiffuser,
    Diffuser,
    DiffuserConfig,
    DiffusionQL,
    DiffusionQLConfig,
    DPPOConfig,
    Energy,
    EnergyConfig,
    IDQLConfig,
    OnlineIDQL,
    OnlineIDQLConfig,
    Outcome,
    OutcomeConfig,
)
from dprl.agents.prospects import StateValue
from dprl.config import from_json, to_json, validate
from dprl.data import Episodes, load_dataset, save_dataset
from dprl.data.images import require_pillow
from dprl.data.source import require_h5py
from dprl.diffusion import SolverConfig
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.errors import CheckpointError, ConfigError, DatasetError, check
from dprl.experiments import plots
from dprl.guidance.spec import GuidanceConfig, scorer_named, steering
from dprl.log import read_metrics, require_wandb
from dprl.mdp import mdp_of
from dprl.networks import LNResNetConfig, TransformerConfig, UNetConfig
from dprl.observations import TensorObservation, to_tensors
from dprl.policy import (
    BeTConfig,
    CategoricalConfig,
    DiffusionConfig,
    DiffusionPolicy,
    GaussianConfig,
    GMMConfig,
    IBCConfig,
    InferenceConfig,
    LSTMGMMConfig,
    MSEConfig,
    PlannerConfig,
    Policy,
    RecedingHorizon,
    find_policy,
)
from dprl.rollout import Evaluation, RolloutPool, evaluate
from dprl.rollout.evaluation import record, wilson
from dprl.rollout.pool import checked_slice_size, require_fit
from dprl.rollout.recording import visited
from dprl.seeding import derive_seed
from dprl.spec import EnvOptions, EnvSpec, resolve, with_n_obs_steps
from dprl.training import Evaluate, LoopConfig, RunFolder, train
from dprl.training.agent import STATE_NAME
from dprl.training.progress import ProgressBar
from dprl.training.run import RUN_FILE

log = logging.getLogger(__name__)
policy_name = partial(tyro.conf.subcommand, prefix_name=False)
FLOW = DiffusionConfig(
    num_train_timesteps=100,
    schedule="rectified_flow",
    prediction_type="velocity",
    sampling=SolverConfig(num_inference_steps=10),
)


@dataclass(frozen=True)
class ExpertConfig:
    """PPO of stable-baselines3, to have an expert. The numbers suit Gymnasium's MuJoCo tasks on one core."""

    env: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ENV")]]
    """Environment, see `dprl list envs`."""
    minutes: float = 20.0
    """Of training, evaluations included."""
    n_envs: int = 16
    n_steps: int = 256
    """Per environment and iteration."""
    batch_size: int = 256
    n_epochs: int = 10
    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    hidden_size: int = 64
    """Width of both layers of policy and value."""
    log_std: float = -1.0
    """Logarithm of the action noise that it begins with."""
    eval_every: int = 100_000
    """Environment steps between evaluations; each also keeps the policy."""
    eval_episodes: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("n_envs", "n_steps", "n_epochs", "hidden_size", "eval_every", "eval_episodes")
        validate(
            self,
            at_least={**dict.fromkeys(counts, 1), "batch_size": 2, "seed": 0},
            above={"minutes": 0, "learning_rate": 0, "clip_range": 0},
        )
        for name in ("gamma", "gae_lambda"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be from 0 to 1")
        pairs = self.n_envs * self.n_steps
        check(pairs >= 2, "n_envs * n_steps", pairs, "must be at least 2")


@dataclass(frozen=True)
class Seen:
    """One evaluation of an expert on its way, without exploration noise."""

    timesteps: int
    minutes: float
    return_mean: float
    return_std: float
    """Over episodes."""

    @property
    def name(self) -> str:
        """Of its policy's files."""
        return f"step-{self.timesteps:010d}"


@dataclass(frozen=True)
class CollectConfig:
    """Play episodes with an expert and write them as a Minari data set."""

    env: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ENV")]]
    """Environment, see `dprl list envs`."""
    expert: str = "scripted"
    """Who plays, see `dprl list experts`; or a model that stable-baselines3 saved, a .zip as `dprl train-expert` leaves
    it. Open only files that you trust: they hold pickles."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise added to every action, in action units."""
    episodes: int = 60
    """How many to keep."""
    transitions: int | None = None
    """Play until there are so many environment steps, however many episodes that takes. D4RL's sets have a million."""
    seed: int = 0
    options: EnvOptions = field(default_factory=EnvOptions)

    def __post_init__(self) -> None:
        validate(self, at_least={"noise": 0, "episodes": 1, "transitions": 1, "seed": 0})


BEHAVIOUR = DiffusionConfig(num_train_timesteps=5, schedule="vp", denoiser=LNResNetConfig())
"""IDQL's behaviour policy."""
STATE_PLANNER = PlannerConfig(denoised="states", command="return")
"""Decision Diffuser's."""

# The command line's names for the policies. What is chosen inside one of them (its network) is chosen by its name.
PolicyChoice = (
    Annotated[AvoidSubcommands[DiffusionConfig], policy_name("mlp", default=DiffusionConfig(num_train_timesteps=10))]
    | Annotated[
        AvoidSubcommands[DiffusionConfig],
        policy_name("unet", default=DiffusionConfig(num_train_timesteps=10, denoiser=UNetConfig())),
    ]
    | Annotated[
        AvoidSubcommands[DiffusionConfig],
        policy_name("transformer", default=DiffusionConfig(num_train_timesteps=10, denoiser=TransformerConfig())),
    ]
    | Annotated[
        AvoidSubcommands[DiffusionConfig],
        policy_name("flow", default=FLOW),
    ]
    | Annotated[AvoidSubcommands[DiffusionConfig], policy_name("ln-resnet", default=BEHAVIOUR)]
    | Annotated[AvoidSubcommands[PlannerConfig], policy_name("planner", default=PlannerConfig())]
    | Annotated[AvoidSubcommands[PlannerConfig], policy_name("state-planner", default=STATE_PLANNER)]
    | Annotated[MSEConfig, policy_name("mse")]
    | Annotated[GaussianConfig, policy_name("gaussian")]
    | Annotated[GMMConfig, policy_name("gmm")]
    | Annotated[LSTMGMMConfig, policy_name("lstm-gmm")]
    | Annotated[CategoricalConfig, policy_name("categorical")]
    | Annotated[BeTConfig, policy_name("bet")]
    | Annotated[IBCConfig, policy_name("ibc")]
)


@dataclass(frozen=True)
class PretrainConfig:
    """Behaviour cloning on a data set, of a diffusion policy or another."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Folder of the data set."""
    policy: PolicyChoice = field(default_factory=lambda: DiffusionConfig(num_train_timesteps=10))
    """Which policy: diffusion with an `mlp` (default), `unet` or `transformer`, a rectified `flow`, or another kind:
    IDQL's `ln-resnet`, `mse`, `gaussian`, `gmm`, `lstm-gmm`, `categorical`, `bet`, `ibc`; or one that plans, `planner`
    or `state-planner`, see `dprl offline`."""
    steps: int = 4_000
    """Gradient steps."""
    episodes: int | None = None
    """Use only the first so many episodes. Default: all."""
    best: float = 1.0
    """Use only this share of the episodes, those with the largest returns; 0.1 is known as filtered BC."""
    filter_key: str | None = None
    """Of robomimic's files: only the episodes of this mask."""
    keys: tuple[str, ...] | None = None
    """Parts of the observation that make up the state, in this order, and cameras. Default: the format's own."""
    memory_map: bool | None = None
    """Leave images on disk, where `bc.num_workers` read them. Default: if they would fill a third of the memory."""
    bc: BCConfig = field(default_factory=BCConfig)
    checkpoint_every: int = 10
    """Iterations (of `bc.steps_per_iteration` gradient steps) between checkpoints."""
    eval_every: int = 0
    """Iterations between evaluations in the data set's environment; 0 never evaluates."""
    eval_episodes: int = 50
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the policy acts in these evaluations."""
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        counts = ("steps", "episodes", "checkpoint_every", "eval_episodes")
        validate(self, at_least={**dict.fromkeys(counts, 1), "eval_every": 0, "seed": 0}, above={"best": 0})
        check(self.best <= 1, "best", self.best, "must be at most 1, which is all of them")
        read_by_workers = not self.memory_map or self.bc.num_workers != 0
        check(read_by_workers, "bc.num_workers", 0, "must be at least 1 with memory_map: workers read what is on disk")

    @property
    def acting(self) -> InferenceConfig:
        """How the policy is evaluated."""
        return self.inference


ACTING = {
    "idql": InferenceConfig(candidates=64),
    "iql": InferenceConfig(temperature=0.0),
    "diffusion-ql": InferenceConfig(candidates=50, selection="softmax"),
    "diffuser": InferenceConfig(candidates=16),
    "decision-diffuser": InferenceConfig(temperature=0.5),
}
"""How the policies of offline learning act, unless they are asked for otherwise."""
STEERED = {
    "diffuser": GuidanceConfig(guide="critic", gradient="noisy"),
    "decision-diffuser": GuidanceConfig(command=(1.0,)),
}
"""What those that plan are steered by."""
PLANNERS = {"diffuser": "planner", "decision-diffuser": "state-planner"}
"""Their policies, as the command line calls them."""


SETTINGS = {
    "idql": "idql",
    "iql": "idql",
    "diffusion-ql": "diffusion_ql",
    "diffuser": "diffuser",
    "decision-diffuser": "decision_diffuser",
}
"""Agent -> the field of its numbers."""


@dataclass(frozen=True)
class OfflineConfig:
    """Learn from rewards in a data set, without a simulator. IDQL: critics choose among a cloned policy's samples."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """File or folder of the data set."""
    policy: PolicyChoice = BEHAVIOUR
    """Which behaviour policy is cloned: IDQL's `ln-resnet` (default), or another; see `dprl pretrain --help`. For
    diffuser `planner`, for decision-diffuser `state-planner`."""
    steps: int = 20_000
    """Gradient steps."""
    episodes: int | None = None
    """Use only the first so many episodes. Default: all."""
    filter_key: str | None = None
    """Of robomimic's files: only the episodes of this mask."""
    keys: tuple[str, ...] | None = None
    """Parts of the observation that make up the state, in this order, and cameras. Default: the format's own."""
    memory_map: bool | None = None
    """Leave the data on disk, where `bc.num_workers` read them. Default: if they would fill a third of the memory."""
    agent: Literal["idql", "iql", "diffusion-ql", "diffuser", "decision-diffuser"] = "idql"
    """What learns: `idql`; `iql`, whose critics weigh what a policy with a density clones, such as `gaussian`;
    `diffusion-ql`, where a diffusion policy also follows the critics' gradient; or what plans states and actions:
    `diffuser`, steered by what plans earn, and `decision-diffuser`, told what they shall."""
    critics: str | None = None
    """For decision-diffuser: folder of a run or policy with critics, or of DPPO's run, that say what follows a plan.
    Default: what followed in the data."""
    idql: IDQLConfig = field(default_factory=IDQLConfig)
    """Of idql and iql."""
    diffusion_ql: DiffusionQLConfig = field(default_factory=DiffusionQLConfig)
    diffuser: DiffuserConfig = field(default_factory=DiffuserConfig)
    decision_diffuser: BCConfig = field(default_factory=BCConfig)
    checkpoint_every: int = 10
    """Iterations (of the agent's `bc.steps_per_iteration` gradient steps) between checkpoints."""
    env: str | None = None
    """Where to evaluate. Default: the data set's environment, if it says which."""
    eval_every: int = 0
    """Iterations between evaluations; 0 never evaluates."""
    eval_episodes: int = 50
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the policy acts in these evaluations. Without `candidates`, idql's takes the best of 64, diffuser's of 16,
    and diffusion-ql's draws one of 50 by softmax of Q. iql's acts by its mean, at temperature 0, and so where it is
    asked for 1; decision-diffuser's then at 0.5."""
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        counts = ("steps", "episodes", "checkpoint_every", "eval_episodes")
        validate(self, at_least={**dict.fromkeys(counts, 1), "eval_every": 0, "seed": 0})
        ours = self.settings
        for field_, default in (
            ("idql", IDQLConfig()),
            ("diffusion_ql", DiffusionQLConfig()),
            ("diffuser", DiffuserConfig()),
            ("decision_diffuser", BCConfig()),
        ):
            idle = field_ == ours or getattr(self, field_) == default
            check(idle, "agent", self.agent, f"must be another for the settings of {field_}: its own are of {ours}")
        if self.agent in PLANNERS:
            fits = isinstance(self.policy, PlannerConfig)
            check(fits, "policy", type(self.policy).__name__, f"must be {PLANNERS[self.agent]}: {self.agent} plans")
        told = self.agent == "decision-diffuser" or self.critics is None
        check(
            told,
            "critics",
            self.critics,
            "are for decision-diffuser; others take theirs when they act: --guide, --scorer",
        )
        read = not self.memory_map or self.bc.num_workers != 0
        check(read, f"{ours}.bc.num_workers", 0, "must be at least 1 with memory_map: workers read what is on disk")

    @property
    def acting(self) -> InferenceConfig:
        """How the policy is evaluated."""
        asked, usual = self.inference, ACTING[self.agent]
        if asked.candidates is None and usual.candidates is not None:
            asked = replace(asked, candidates=usual.candidates, selection=usual.selection)
        chooses, draws = asked.candidates is not None, not isinstance(self.policy, MSEConfig)
        if chooses or not draws or asked.temperature != 1:
            return asked
        return replace(asked, temperature=usual.temperature)

    @property
    def steering(self) -> GuidanceConfig:
        """What steers the policy when it is evaluated."""
        return STEERED.get(self.agent, GuidanceConfig())

    @property
    def settings(self) -> str:
        """The field of the agent's numbers."""
        return SETTINGS[self.agent]

    @property
    def bc(self) -> BCConfig:
        """Of what is cloned."""
        settings = getattr(self, self.settings)
        return settings if isinstance(settings, BCConfig) else cast("BCConfig", settings.bc)


@dataclass(frozen=True)
class FinetuneConfig:
    """DPPO, or IDQL going on online: improve a pretrained policy with reward."""

    policy: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="POLICY")]]
    """Folder of the policy, or of the run that trained it."""
    env: str
    """Environment, see `dprl list envs`."""
    total_timesteps: int = 500_000
    """Environment steps over all environments."""
    n_envs: int = 64
    """Environments."""
    n_action_steps: int | None = None
    """How many actions of a chunk are executed. Default: the policy's own."""
    workers: int | None = None
    """Ray workers that share the environments; 0 runs them in this process. Default: what suits the machine."""
    slice_size: int | None = None
    """Environments per inference batch. Runs with equal slices give equal results on any number of workers."""
    agent: Literal["dppo", "idql"] = "dppo"
    """What improves it: `dppo` tunes its denoising steps; `idql` lets critics go on learning, which choose its samples,
    best after `dprl offline`."""
    dppo: DPPOConfig = field(default_factory=DPPOConfig)
    idql: OnlineIDQLConfig = field(default_factory=OnlineIDQLConfig)
    data: str | None = None
    """With idql, the data set that the critics were learned from, to be mixed in."""
    data_keys: tuple[str, ...] | None = None
    """Parts of its observation, and cameras, as `keys` of `dprl offline`."""
    data_filter_key: str | None = None
    """Of robomimic's files: only the episodes of this mask."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    eval_every: int = 10
    """Iterations between evaluations; 0 never evaluates."""
    eval_episodes: int = 50
    eval_workers: int = 0
    """Ray workers that evaluate while training goes on; 0: training waits for its evaluations."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the policy acts in these evaluations; with idql by default as in training: candidates, selection and
    temperature."""
    options: EnvOptions = field(default_factory=EnvOptions)
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        counts = ("total_timesteps", "n_envs", "n_action_steps", "slice_size", "checkpoint_every", "eval_episodes")
        validate(
            self, at_least={**dict.fromkeys(counts, 1), "workers": 0, "eval_workers": 0, "eval_every": 0, "seed": 0}
        )
        check(self.data is None or self.agent == "idql", "data", self.data, "is for the agent idql only")
        for name in ("data_keys", "data_filter_key"):
            read = self.data is not None or getattr(self, name) is None
            check(read, name, getattr(self, name), "is of the data, and none are given")
        idle = (self.dppo == DPPOConfig()) if self.agent == "idql" else (self.idql == OnlineIDQLConfig())
        other = "dppo" if self.agent == "idql" else "idql"
        check(idle, "agent", self.agent, f"must be {other} for the settings of {other}")
        check(self.eval_every > 0 or self.eval_workers == 0, "eval_workers", self.eval_workers,
              "must be 0 with eval_every 0: nothing is evaluated")  # fmt: skip

    @property
    def acting(self) -> InferenceConfig:
        """How the policy is evaluated."""
        if self.agent == "dppo":
            return self.inference
        asked, idql = self.inference, self.idql
        n = idql.candidates if asked.candidates is None else asked.candidates
        return replace(
            asked,
            candidates=n,
            selection=asked.selection or (idql.chosen_by if n > 1 else None),
            temperature=idql.temperature if asked.temperature == 1 else asked.temperature,
        )


@dataclass(frozen=True)
class CriticTrainingConfig:
    """Learn what a policy's chunks are worth from a data set; the policy stays as it is. For guides and candidates."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """File or folder of the data set."""
    policy: str
    """Folder of the diffusion policy, or of its run; a copy of it lies beside what is learned."""
    agent: Literal["outcome", "energy"] = "outcome"
    """What is learned: `outcome`, the return or success that chunks of the data led to; or `energy`, which tilts the
    policy's own chunks exactly towards what its critics, or `scorer`, prefer."""
    scorer: str | None = None
    """For energy: what says how good chunks are: the folder of a policy with critics, or a function of yours as
    `module:function`. Default: the policy's own critics."""
    critics: str | None = None
    """For the return: the folder of a run or policy with critics, or of DPPO's run, that say what follows a chunk.
    Default: what followed in the data."""
    steps: int = 10_000
    """Gradient steps."""
    episodes: int | None = None
    """Use only the first so many episodes. Default: all."""
    filter_key: str | None = None
    """Of robomimic's files: only the episodes of this mask."""
    keys: tuple[str, ...] | None = None
    """Parts of the observation that make up the state, in this order, and cameras. Default: the format's own."""
    memory_map: bool | None = None
    """Leave images on disk. Default: if they would fill a third of the memory."""
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    checkpoint_every: int = 10
    """Iterations (of the agent's `steps_per_iteration` gradient steps) between checkpoints."""
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        validate(self, at_least={**dict.fromkeys(("steps", "episodes", "checkpoint_every"), 1), "seed": 0})
        for name, default in (("outcome", OutcomeConfig()), ("energy", EnergyConfig())):
            idle = name == self.agent or getattr(self, name) == default
            check(idle, "agent", self.agent, f"must be {name} for the settings of {name}")
        read = not self.memory_map or self.outcome.num_workers != 0
        check(read, "outcome.num_workers", 0, "must be at least 1 with memory_map: workers read what is on disk")
        judges = self.scorer is None or self.agent == "energy"
        check(judges, "scorer", self.scorer, "is for the agent energy: outcomes are learned from the data")
        follows = self.critics is None or self.agent == "outcome"
        check(follows, "critics", self.critics, "are for the agent outcome: the energy is of a scorer")


Training = PretrainConfig | OfflineConfig | CriticTrainingConfig
KINDS: dict[str, type[Training] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "offline": OfflineConfig,
    "train-critic": CriticTrainingConfig,
    "finetune": FinetuneConfig,
}


AnyTraining = TypeVar("AnyTraining", PretrainConfig, OfflineConfig, CriticTrainingConfig)


def train_expert(config: ExpertConfig, out: Path, *, progress_bar: bool = True) -> tuple[Seen, Seen]:
    """Train an expert in `out`, or go on with what is there; return how it and its `medium` forerunner did.

    Raises:
        ConfigError: what is there was begun with other settings; only `minutes` may differ.
    """
    from dprl.interop import sb3_experts

    resolve(config.env)
    settings = out / sb3_experts.SETTINGS_FILE
    if settings.exists():
        begun = from_json(ExpertConfig, checkpoint.read_json(settings), str(settings))
        for name, value in to_json(replace(begun, minutes=config.minutes)).items():
            own = getattr(config, name)
            check(
                value == own, name, own, f"must be {value!r}, as in '{out}', which is begun: or choose another folder"
            )
    else:
        RunFolder.require_free(out)
    return sb3_experts.train_expert(config, out, progress_bar=progress_bar)


def trained_expert(out: Path) -> tuple[Seen, Seen] | None:
    """Return how the expert that was trained in `out` and its `medium` forerunner did; None if none was."""
    from dprl.interop import sb3_experts

    return sb3_experts.chosen(out) if (out / sb3_experts.RETURNS_FILE).exists() else None


def forerunners(out: Path) -> list[Seen]:
    """Return how the policies did that an expert's training in `out` kept, up to the medium one."""
    from dprl.interop import sb3_experts

    _, medium = sb3_experts.chosen(out)
    return [seen for seen in sb3_experts.seen_in(out) if seen.timesteps <= medium.timesteps]


def collect(
    config: CollectConfig, out: Path, *, more: Sequence[CollectConfig] = (), progress_bar: bool = True
) -> Episodes:
    """Play `config.episodes` episodes, and those of `more` in the same environment; write them to the folder `out`."""
    RunFolder.require_free(out)
    require_h5py()
    sources = [config, *more]
    for other in more:
        check(other.env == config.env, "env", other.env, f"must be {config.env}, as of what it is collected with")
    spec = resolve(config.env, config.options)
    if spec.cameras:
        require_pillow()
    experts = [make_expert(source.expert, source.env) for source in sources]
    played = [
        collect_episodes(
            spec,
            expert,
            source.noise,
            source.episodes,
            source.seed,
            transitions=source.transitions,
            progress_bar=progress_bar,
        )
        for source, expert in zip(sources, experts, strict=True)
    ]
    data = Episodes.concatenate(played)
    shown = dict.fromkeys(f"{source.expert} expert, action noise {source.noise}" for source in sources)
    save_dataset(data, out, spec, description="; ".join(shown))
    return data


def pretrain(config: PretrainConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Train a policy by behaviour cloning in the new run folder `out`."""
    return _on_data(config, "pretrain", out, progress_bar=progress_bar)


def offline(config: OfflineConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Train a policy and its critics on a data set in the new run folder `out`."""
    if config.critics is not None:
        config = replace(config, critics=str(Path(config.critics).resolve()))
    return _on_data(config, "offline", out, progress_bar=progress_bar)


def train_critic(config: CriticTrainingConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Train what a policy's chunks are worth in the new run folder `out`, which holds both."""
    config = replace(config, policy=str(Path(config.policy).resolve()))
    if config.scorer is not None and Path(config.scorer).exists():
        config = replace(config, scorer=str(Path(config.scorer).resolve()))
    if config.critics is not None:
        config = replace(config, critics=str(Path(config.critics).resolve()))
    return _on_data(config, "train-critic", out, progress_bar=progress_bar)


def _on_data(config: AnyTraining, kind: str, out: Path, *, progress_bar: bool) -> RunFolder:
    RunFolder.require_free(out)
    config = replace(config, data=str(Path(config.data).resolve()))
    prepared = _prepared(config, progress_bar)  # everything that can be wrong is found before the folder is made
    run = RunFolder.create(out, kind, to_json(config))
    _train_on_data(config, run, prepared, resume=False, progress_bar=progress_bar)
    return run


def finetune(config: FinetuneConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Fine-tune a policy with DPPO, or let IDQL go on, in the new run folder `out`."""
    RunFolder.require_free(out)
    config = replace(config, policy=str(Path(config.policy).resolve()))
    config = config if config.data is None else replace(config, data=str(Path(config.data).resolve()))
    prepared = _prepare_finetune(config, find_policy(Path(config.policy)))
    with _pool(config, prepared.spec, shown=progress_bar) as pool, _scoring(config, prepared, pool) as score:
        agent = _agent(config, prepared, pool)
        run = RunFolder.create(out, "finetune", to_json(config))
        _finetune(config, run, agent, score, resume=False, progress_bar=progress_bar)
    return run


def resume(path: Path, *, data: Path | None = None, critics: str | None = None, progress_bar: bool = True) -> RunFolder:
    """Continue an interrupted run from its newest checkpoint, or from its start, as if it had never stopped.

    A complete run stays as it is. `data` is where a training's data are now, if they were moved, and `critics` where
    those that say what follows are.

    Raises:
        CheckpointError: there is no run, or it is damaged.
    """
    run, kind, about = RunFolder.open(path)
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"'{path}' is a run of the unknown kind '{kind}'")
    config = from_json(KINDS[kind], about, f"{path}/run.json")
    with run.locked():  # from before its newest checkpoint is read
        started = run.last is not None
        if not isinstance(config, FinetuneConfig):
            config = replace(config, data=str(data)) if data else config
            if critics is not None and isinstance(config, OfflineConfig | CriticTrainingConfig):
                config = replace(config, critics=critics)
            _train_on_data(config, run, _prepared(config, progress_bar), resume=started, progress_bar=progress_bar)
            return run
        prepared = _prepare_finetune(config, run.last or find_policy(Path(config.policy)))
        with _pool(config, prepared.spec, shown=progress_bar) as pool, _scoring(config, prepared, pool) as score:
            agent = _agent(config, prepared, pool)
            _finetune(config, run, agent, score, resume=started, progress_bar=progress_bar)
    return run


def run_or_resume(
    config: PretrainConfig | OfflineConfig | FinetuneConfig, out: Path, *, progress_bar: bool = True
) -> RunFolder:
    """Do what `config` says in `out`, or go on with the run that is there."""
    if (out / RUN_FILE).exists():
        data = None if isinstance(config, FinetuneConfig) else Path(config.data)
        critics = config.critics if isinstance(config, OfflineConfig) else None
        return resume(out, data=data, critics=critics, progress_bar=progress_bar)
    if isinstance(config, PretrainConfig):
        return pretrain(config, out, progress_bar=progress_bar)
    if isinstance(config, OfflineConfig):
        return offline(config, out, progress_bar=progress_bar)
    return finetune(config, out, progress_bar=progress_bar)


def minutes_of(run: RunFolder) -> float:
    """Return the minutes that a run has taken, those before it was resumed included."""
    return float(run.progress()["elapsed_s"]) / 60


def wilson_of(data: Episodes) -> tuple[float, float]:
    """Return the 95 % interval of a data set's success rate; NaN where nobody knows what succeeded."""
    if not data.success_known:
        return math.nan, math.nan
    return wilson(int(data.success.sum()), data.n_episodes)


def last_timesteps(run: RunFolder) -> int:
    """Return how many timesteps a run has logged.

    Raises:
        CheckpointError: it has no log.
    """
    rows = read_metrics(run.path)
    if not rows:
        raise CheckpointError(f"'{run.path}' has lost its metrics.jsonl")
    return int(rows[-1]["timesteps"])


OnData = BC[Policy] | IDQL | Diffuser | DecisionDiffuser | Outcome | Energy


@dataclass(frozen=True)
class _Training:
    """What training on a data set starts from."""

    agent: OnData
    """With its data."""
    score: Evaluate | None = None
    """Evaluates the policy, if it is at all."""
    eval_every: int = 0


@dataclass(frozen=True)
class _Finetuning:
    """What fine-tuning starts from."""

    policy: Policy
    spec: EnvSpec
    data: Episodes | None = None


def _prepared(config: Training, progress_bar: bool) -> _Training:
    check_device(config.device)
    if config.wandb is not None:
        require_wandb()
    if isinstance(config, CriticTrainingConfig):
        return _prepare_critic(config, progress_bar)
    return _prepare_training(config)


def _load(config: Training) -> Episodes:
    """The data that are learned from."""
    data = load_dataset(config.data, memory_map=config.memory_map, filter_key=config.filter_key, keys=config.keys)
    if config.episodes is None:
        return data
    fits = config.episodes <= data.n_episodes
    check(fits, "episodes", config.episodes, f"the data set has {data.n_episodes}")
    return data.select(np.arange(config.episodes))


def _prepare_critic(config: CriticTrainingConfig, progress_bar: bool) -> _Training:
    policy, data = Policy.from_pretrained(config.policy, device=config.device), _load(config)
    if config.agent == "outcome":
        agent = Outcome(policy, config.outcome, critics=_following(config), seed=config.seed)
        with _named(config.data):
            agent.set_data(data, config.steps)
        return _Training(agent)
    scorer = None if config.scorer is None else scorer_named(config.scorer, policy)
    energy = Energy(policy, scorer, config.energy, seed=config.seed)
    with (
        _named(config.data),
        ProgressBar("sample", min(len(data.actions), config.energy.observations), shown=progress_bar) as bar,
    ):
        energy.set_data(data, config.steps, bar.advance)
    return _Training(energy)


def _prepare_training(config: PretrainConfig | OfflineConfig) -> _Training:
    data = _load(config)
    kind = next(kind for kind in Policy.kinds.values() if kind.config_class is type(config.policy))
    agent: BC[Policy] | IDQL | Diffuser | DecisionDiffuser
    with _named(config.data):
        if isinstance(config, PretrainConfig):
            data = data.best(config.best)
        shown, _ = data.split(config.bc.validation_share, config.seed)  # ranges and bins come from these alone
        policy = kind.for_dataset(shown, config.policy, seed=config.seed).to(config.device)
        if isinstance(config, OfflineConfig):
            agent = _offline_agent(policy, config)
            steering(config.steering, policy)
        else:
            agent = BC(policy, config.bc, seed=config.seed)
        RecedingHorizon(policy, config.acting)  # or the way it is evaluated is refused
        agent.set_data(data, config.steps)
    asked = config.env if isinstance(config, OfflineConfig) else None
    if not config.eval_every and asked is None:
        return _Training(agent)
    env = asked or data.env_id
    if env is None:
        raise ConfigError("eval_every: the data set does not say which environment it is from; set it to 0")
    spec = resolve(env)
    require_fit(policy, spec)
    score = lambda: _score(agent.policy, spec, config)  # noqa: E731
    return _Training(agent, score if config.eval_every else None, config.eval_every)


def _following(config: OfflineConfig | CriticTrainingConfig) -> StateValue | None:
    """What says what follows a chunk or plan, if that is asked for: V of a policy's critics, or of DPPO's run."""
    if config.critics is None:
        return None
    folder = Path(config.critics)
    policy = Policy.from_pretrained(folder, device=config.device)
    if not (folder / RUN_FILE).exists():
        return StateValue.of_critics(policy)
    _, kind, about = RunFolder.open(folder)
    tuning = from_json(FinetuneConfig, about, str(folder / RUN_FILE)) if kind == "finetune" else None
    if tuning is None or tuning.agent != "dppo":
        return StateValue.of_critics(policy)
    state = checkpoint.load_state(find_policy(folder), STATE_NAME)
    return StateValue.of_dppo(policy, tuning.dppo, state, resolve(tuning.env, tuning.options).reward)


def _offline_agent(policy: Policy, config: OfflineConfig) -> IDQL | Diffuser | DecisionDiffuser:
    if config.agent == "diffuser":
        return Diffuser(policy, config.diffuser, seed=config.seed)
    if config.agent == "decision-diffuser":
        return DecisionDiffuser(policy, config.decision_diffuser, critics=_following(config), seed=config.seed)
    if config.agent == "diffusion-ql":
        return DiffusionQL(policy, config.diffusion_ql, seed=config.seed)
    return (IQL if config.agent == "iql" else IDQL)(policy, config.idql, seed=config.seed)


def _train_on_data(config: Training, run: RunFolder, prepared: _Training, *, resume: bool, progress_bar: bool) -> None:
    train(
        prepared.agent,
        LoopConfig(config.steps, prepared.eval_every, config.checkpoint_every),
        run=run,
        evaluate=prepared.score,
        resume=resume,
        wandb_project=config.wandb,
        progress_bar=progress_bar,
    )
    plots.training_curves(run.path)


def _prepare_finetune(config: FinetuneConfig, folder: Path) -> _Finetuning:
    check_device(config.device)
    if config.wandb is not None:
        require_wandb()
    dppo, spec = config.dppo, resolve(config.env, config.options)
    policy = Policy.from_pretrained(folder, device=config.device)
    require_fit(policy, spec)
    _tell_of_others("the policy learned in", policy.features.env_id, spec)
    data: Episodes | None = None
    if config.agent == "dppo":
        mdp_of(policy, dppo.tuned_steps, dppo.exploration, dppo.solver, exact=dppo.likelihood == "exact")
        RecedingHorizon(policy, config.inference)  # of the way that it samples from now on
    elif config.data is not None:
        data = load_dataset(config.data, filter_key=config.data_filter_key, keys=config.data_keys)
        _tell_of_others("the data are from", data.env_id, spec)
    slices = config.n_envs // checked_slice_size(config.n_envs, config.slice_size)
    fits = not config.workers or slices % config.workers == 0
    check(fits, "workers", config.workers, f"must divide the number of slices, which is {slices}; see slice_size")
    if config.n_action_steps is not None:
        policy.set_n_action_steps(config.n_action_steps)
    return _Finetuning(policy, with_n_obs_steps(spec, policy.config.n_obs_steps), data)


def _tell_of_others(what: str, env_id: str | None, spec: EnvSpec) -> None:
    """Say where policy or data are of another environment that has the same sizes."""
    if env_id not in (None, spec.id):
        log.warning("note: %s %s, not %s", what, env_id, spec.id)


def _agent(config: FinetuneConfig, prepared: _Finetuning, pool: RolloutPool) -> DPPO | OnlineIDQL:
    """What learns; everything that can be wrong with it is found here."""
    if config.agent == "dppo":
        return DPPO(prepared.policy, pool, config.dppo, seed=config.seed)
    policy = cast("DiffusionPolicy", prepared.policy)  # or it is refused
    fewest, start = config.total_timesteps // policy.n_action_steps, config.idql.start_decisions
    check(fewest >= start, "total_timesteps", config.total_timesteps, f"are about {fewest} decisions; nothing is "
          f"learned before idql.start_decisions, which are {start}")  # fmt: skip
    with _named(config.data):
        agent = OnlineIDQL(policy, pool, config.idql, data=prepared.data, seed=config.seed)
    RecedingHorizon(policy, config.acting)
    return agent


def _finetune(
    config: FinetuneConfig,
    run: RunFolder,
    agent: DPPO | OnlineIDQL,
    score: Evaluate,
    *,
    resume: bool,
    progress_bar: bool,
) -> None:
    train(
        agent,
        LoopConfig(config.total_timesteps, config.eval_every, config.checkpoint_every),
        run=run,
        evaluate=score,
        resume=resume,
        wandb_project=config.wandb,
        progress_bar=progress_bar,
    )
    plots.training_curves(run.path)


@contextmanager
def _scoring(config: FinetuneConfig, prepared: _Finetuning, pool: RolloutPool) -> Iterator[Evaluate]:
    """Let the pool evaluate, while training waits; or workers that have nothing else to do, while it goes on."""
    policy, episodes, seed = prepared.policy, config.eval_episodes, _selection(config)
    if not config.eval_workers:
        yield lambda: pool.evaluate(policy, episodes, seed, inference=config.acting)
        return
    from dprl.rollout.ray_pool import RayEvaluator

    with _called("eval_workers"):
        evaluator = RayEvaluator(prepared.spec, num_workers=config.eval_workers)
    with evaluator:
        yield lambda: evaluator.start(policy, episodes, seed, inference=config.acting)


def played(
    control: RecedingHorizon,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    pool: Literal["local", "ray"],
    workers: int,
    *,
    on_progress: Callable[[int], None],
) -> Evaluation:
    """Evaluate in this process or on Ray workers, with the same result. See `dprl.rollout.evaluate`."""
    policy, inference, guide, scorer = control.policy, control.inference, control.guide, control.scorer
    if pool == "local":
        return evaluate(
            policy, spec, episodes, seed, inference=inference, guide=guide, scorer=scorer, on_progress=on_progress
        )
    from dprl.rollout.ray_pool import RayEvaluator

    with _called("workers"):
        evaluator = RayEvaluator(spec, num_workers=workers)
    with evaluator:
        return evaluator.start(
            policy, episodes, seed, inference=inference, guide=guide, scorer=scorer, on_progress=on_progress
        ).result()


def watched(control: RecedingHorizon, spec: EnvSpec, episodes: int, seed: int) -> TensorObservation:
    """Return what a policy sees on its way in the first few episodes of an evaluation: (B, O, D), or named parts."""
    played = record(
        control.policy,
        spec,
        min(episodes, WATCHED_EPISODES),
        seed,
        inference=control.inference,
        guide=control.guide,
        scorer=control.scorer,
    )
    return to_tensors(visited(played, control.policy.config.n_obs_steps, WATCHED_OBSERVATIONS))


WATCHED_EPISODES, WATCHED_OBSERVATIONS = 4, 256


def home_of(policy: Policy) -> str:
    """Return where a policy learned. Raises ConfigError: it does not say."""
    if policy.features.env_id is None:
        raise ConfigError("env: the policy does not say where it learned; give one, see 'dprl list envs'")
    return policy.features.env_id


def _selection(config: PretrainConfig | OfflineConfig | FinetuneConfig) -> int:
    """The seed of starts that no evaluation by hand has: the best checkpoint is chosen by them."""
    return derive_seed(config.seed, "selection")


def _score(policy: Policy, spec: EnvSpec, config: PretrainConfig | OfflineConfig) -> Evaluation:
    guide = steering(config.steering, policy).guide if isinstance(config, OfflineConfig) else None
    return evaluate(policy, spec, config.eval_episodes, _selection(config), inference=config.acting, guide=guide)


def _pool(config: FinetuneConfig, spec: EnvSpec, *, shown: bool) -> RolloutPool:
    """Build the environments, and say how they run."""
    with _called("workers"):
        pool = RolloutPool.auto(
            spec,
            config.n_envs,
            seed=config.seed,
            slice_size=config.slice_size,
            device=config.device,
            num_workers=config.workers,
            other_workers=config.eval_workers,
        )
    if shown:
        print(f"rollouts {pool.choice}")
    return pool


@contextmanager
def _called(field: str) -> Iterator[None]:
    """Let a refusal of `num_workers` name the field that says so here."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"^num_workers\b", field, str(error))) from error


@contextmanager
def _named(data: str | None) -> Iterator[None]:
    """Let a refusal of data that were read say which they are."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"'{data}': {error}") from error


def check_device(name: str) -> None:
    """Raise ConfigError unless torch can use the device `name`."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"device = {name!r}: torch cannot use it here: {str(error).splitlines()[0]}") from error
