"""The three kinds of work: collect, pretrain, fine-tune. Each checks everything before it starts anything."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from dprl.agents import BC, DPPO, BCConfig, DPPOConfig
from dprl.config import from_json, to_json, validate
from dprl.data import Episodes, load_dataset, save_dataset
from dprl.data.minari import require_h5py
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.errors import CheckpointError, ConfigError, check
from dprl.experiments import plots
from dprl.log import read_metrics
from dprl.networks import MLPConfig
from dprl.policy import DiffusionPolicy, find_policy
from dprl.rollout import Evaluation, InProcessPool, RolloutPool, evaluate
from dprl.rollout.evaluation import require_fit, wilson
from dprl.rollout.pool import checked_slice_size
from dprl.seeding import derive_seed
from dprl.spec import EnvOptions, EnvSpec, resolve, with_n_obs_steps
from dprl.training import LoopConfig, RunFolder, train


@dataclass(frozen=True)
class CollectConfig:
    """Play episodes with an expert and write them as a Minari data set."""

    env: tyro.conf.Positional[str]
    """Environment, see `dprl list envs`."""
    expert: str = "scripted"
    """Who plays, see `dprl list experts`."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise added to every action, in action units."""
    episodes: int = 60
    """How many to keep."""
    seed: int = 0
    options: EnvOptions = field(default_factory=EnvOptions)

    def __post_init__(self) -> None:
        validate(self, at_least={"noise": 0, "episodes": 1, "seed": 0})


@dataclass(frozen=True)
class PretrainConfig:
    """Behaviour cloning on a data set."""

    data: tyro.conf.Positional[str]
    """Folder of the data set."""
    steps: int = 4_000
    """Gradient steps."""
    horizon: int = 4
    """Actions in a predicted chunk."""
    n_action_steps: int | None = None
    """How many of them are executed before the next decision. Default: all."""
    n_obs_steps: int = 1
    """How many of the latest observations the policy sees."""
    num_train_timesteps: int = 10
    """Denoising steps."""
    denoiser: MLPConfig = field(default_factory=MLPConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    checkpoint_every: int = 10
    """Iterations (of `bc.steps_per_iteration` gradient steps) between checkpoints."""
    eval_every: int = 0
    """Iterations between evaluations in the data set's environment; 0 never evaluates."""
    eval_episodes: int = 50
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        counts = ("steps", "horizon", "n_obs_steps", "num_train_timesteps", "checkpoint_every", "eval_episodes")
        validate(self, at_least={**dict.fromkeys(counts, 1), "eval_every": 0, "seed": 0})
        executed = self.horizon if self.n_action_steps is None else self.n_action_steps
        fits = 1 <= executed <= self.horizon
        check(fits, "n_action_steps", executed, f"must be from 1 to the horizon, which is {self.horizon}")


@dataclass(frozen=True)
class FinetuneConfig:
    """DPPO: improve a pretrained policy with reward."""

    policy: tyro.conf.Positional[str]
    """Folder of the policy, or of the run that trained it."""
    env: str
    """Environment, see `dprl list envs`."""
    total_timesteps: int = 500_000
    """Environment steps over all environments."""
    n_envs: int = 64
    """Environments."""
    n_action_steps: int | None = None
    """How many actions of a chunk are executed. Default: the policy's own."""
    workers: int = 0
    """Ray workers that share the environments; 0 runs them in this process."""
    slice_size: int | None = None
    """Environments per inference batch. Runs with equal slices give equal results on any number of workers."""
    dppo: DPPOConfig = field(default_factory=DPPOConfig)
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    eval_every: int = 10
    """Iterations between evaluations; 0 never evaluates."""
    eval_episodes: int = 50
    options: EnvOptions = field(default_factory=EnvOptions)
    seed: int = 0
    device: str = "cpu"
    wandb: str | None = None
    """Weights & Biases project to log to as well; offline without a login."""

    def __post_init__(self) -> None:
        counts = ("total_timesteps", "n_envs", "n_action_steps", "slice_size", "checkpoint_every", "eval_episodes")
        validate(self, at_least={**dict.fromkeys(counts, 1), "workers": 0, "eval_every": 0, "seed": 0})


KINDS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}


def collect(config: CollectConfig, out: Path, *, progress_bar: bool = True) -> Episodes:
    """Play `config.episodes` episodes and write them to the new folder `out`."""
    RunFolder.require_free(out)
    require_h5py()
    spec = resolve(config.env, config.options)
    expert = make_expert(config.expert, config.env)
    data = collect_episodes(spec, expert, config.noise, config.episodes, config.seed, progress_bar=progress_bar)
    save_dataset(data, out, spec, description=f"{config.expert} expert, action noise {config.noise}")
    return data


def pretrain(config: PretrainConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Train a policy by behaviour cloning in the new run folder `out`."""
    RunFolder.require_free(out)
    config = replace(config, data=str(Path(config.data).resolve()))
    prepared = _prepare_pretrain(config)  # everything that can be wrong is found before the folder is made
    run = RunFolder.create(out, "pretrain", to_json(config))
    _pretrain(config, run, prepared, resume=False, progress_bar=progress_bar)
    return run


def finetune(config: FinetuneConfig, out: Path, *, progress_bar: bool = True) -> RunFolder:
    """Fine-tune a policy with DPPO in the new run folder `out`."""
    RunFolder.require_free(out)
    config = replace(config, policy=str(Path(config.policy).resolve()))
    prepared = _prepare_finetune(config, find_policy(Path(config.policy)))
    with _pool(config, prepared.spec) as pool:
        run = RunFolder.create(out, "finetune", to_json(config))
        _finetune(config, run, prepared, pool, resume=False, progress_bar=progress_bar)
    return run


def resume(path: Path, *, progress_bar: bool = True) -> RunFolder:
    """Continue an interrupted run from its newest checkpoint, or from its start, as if it had never stopped.

    A complete run stays as it is.

    Raises:
        CheckpointError: there is no run, or it is damaged.
    """
    run, kind, data = RunFolder.open(path)
    if kind not in KINDS:
        raise CheckpointError(f"'{path}' is a run of the unknown kind '{kind}'")
    config = from_json(KINDS[kind], data, f"{path}/run.json")
    started = run.last is not None
    if isinstance(config, PretrainConfig):
        _pretrain(config, run, _prepare_pretrain(config), resume=started, progress_bar=progress_bar)
        return run
    prepared = _prepare_finetune(config, run.last or find_policy(Path(config.policy)))
    with _pool(config, prepared.spec) as pool:
        _finetune(config, run, prepared, pool, resume=started, progress_bar=progress_bar)
    return run


def wilson_of(data: Episodes) -> tuple[float, float]:
    """Return the 95 % interval of a data set's success rate."""
    return wilson(int(data.success.sum()), data.n_episodes)


def last_timesteps(run: RunFolder) -> int:
    """Return how many timesteps a run has logged."""
    return int(read_metrics(run.path)[-1]["timesteps"])


@dataclass(frozen=True)
class _Pretraining:
    """What behaviour cloning starts from."""

    data: Episodes
    policy: DiffusionPolicy
    spec: EnvSpec | None
    """Where to evaluate, if at all."""


@dataclass(frozen=True)
class _Finetuning:
    """What fine-tuning starts from."""

    policy: DiffusionPolicy
    spec: EnvSpec


def _prepare_pretrain(config: PretrainConfig) -> _Pretraining:
    check_device(config.device)
    data = load_dataset(config.data)
    policy = DiffusionPolicy.for_dataset(
        data,
        config.denoiser,
        horizon=config.horizon,
        n_action_steps=config.n_action_steps,
        n_obs_steps=config.n_obs_steps,
        num_train_timesteps=config.num_train_timesteps,
        seed=config.seed,
    ).to(config.device)
    data.chunk_indices(config.n_obs_steps, config.horizon)
    if not config.eval_every:
        return _Pretraining(data, policy, None)
    if data.env_id is None:
        raise ConfigError("eval_every: the data set does not say which environment it is from; set it to 0")
    spec = resolve(data.env_id)
    require_fit(policy, spec)
    return _Pretraining(data, policy, spec)


def _pretrain(
    config: PretrainConfig, run: RunFolder, prepared: _Pretraining, *, resume: bool, progress_bar: bool
) -> None:
    policy, spec = prepared.policy, prepared.spec
    agent = BC(policy, config.bc, seed=config.seed)
    agent.set_data(prepared.data, config.steps)
    train(
        agent,
        LoopConfig(config.steps, config.eval_every, config.checkpoint_every),
        run=run,
        evaluate=None if spec is None else lambda: _score(policy, spec, config.eval_episodes, config.seed),
        resume=resume,
        wandb_project=config.wandb,
        progress_bar=progress_bar,
    )
    plots.training_curves(run.path)


def _prepare_finetune(config: FinetuneConfig, folder: Path) -> _Finetuning:
    check_device(config.device)
    spec = resolve(config.env, config.options)
    policy = DiffusionPolicy.from_pretrained(folder, device=config.device)
    require_fit(policy, spec)
    policy.tune_below(config.dppo.tuned_steps)
    slices = config.n_envs // checked_slice_size(config.n_envs, config.slice_size)
    fits = config.workers == 0 or slices % config.workers == 0
    check(fits, "workers", config.workers, f"must divide the number of slices, which is {slices}; see slice_size")
    if config.n_action_steps is not None:
        policy.set_n_action_steps(config.n_action_steps)
    return _Finetuning(policy, with_n_obs_steps(spec, policy.config.n_obs_steps))


def _finetune(
    config: FinetuneConfig,
    run: RunFolder,
    prepared: _Finetuning,
    pool: RolloutPool,
    *,
    resume: bool,
    progress_bar: bool,
) -> None:
    policy, spec = prepared.policy, prepared.spec
    train(
        DPPO(policy, pool, config.dppo, seed=config.seed),
        LoopConfig(config.total_timesteps, config.eval_every, config.checkpoint_every),
        run=run,
        evaluate=lambda: _score(policy, spec, config.eval_episodes, config.seed),
        resume=resume,
        wandb_project=config.wandb,
        progress_bar=progress_bar,
    )
    plots.training_curves(run.path)


def _score(policy: DiffusionPolicy, spec: EnvSpec, episodes: int, seed: int) -> Evaluation:
    """Evaluate during training, on starts that no evaluation by hand has: the best checkpoint is chosen by them."""
    return evaluate(policy, spec, episodes, derive_seed(seed, "selection"))


def _pool(config: FinetuneConfig, spec: EnvSpec) -> RolloutPool:
    if config.workers == 0:
        return InProcessPool(spec, config.n_envs, seed=config.seed, slice_size=config.slice_size)
    from dprl.rollout.ray_pool import RayPool

    return RayPool(spec, config.n_envs, num_workers=config.workers, seed=config.seed, slice_size=config.slice_size)


def check_device(name: str) -> None:
    """Raise ConfigError unless torch can use the device `name`."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device = {name!r}: torch cannot use it here: {str(error).splitlines()[0]}") from error
