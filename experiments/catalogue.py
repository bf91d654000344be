"""Named experiments, from noisy demonstrations to a policy that succeeds, and studies. Each states what differs."""

from __future__ import annotations

from dataclasses import dataclass

from dprl.agents import DPPOConfig
from dprl.errors import ConfigError, did_you_mean
from dprl.experiments.runs import CollectConfig, FinetuneConfig, PretrainConfig


@dataclass(frozen=True)
class Experiment:
    """Three stages and a final evaluation. The folders of data and policy are known when it runs."""

    name: str
    summary: str
    collect: CollectConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    eval_episodes: int = 200


def _metaworld(task: str, summary: str) -> Experiment:
    env = f"metaworld/{task}-v3"
    return Experiment(
        name=task,
        summary=f"Meta-World, {summary}; a scripted expert with action noise 0.5",
        collect=CollectConfig(env=env, noise=0.5, episodes=100),
        pretrain=PretrainConfig(data=""),
        finetune=FinetuneConfig(policy="", env=env, total_timesteps=650_000),
    )


CATALOGUE = (
    _metaworld("push", "a puck to a goal on a table"),
    _metaworld("pick-place", "a puck to a goal in the air"),
    Experiment(
        name="smoke",
        summary="Push cut down to seconds, to see that everything runs; it does not learn",
        collect=CollectConfig(env="metaworld/push-v3", noise=0.5, episodes=4),
        pretrain=PretrainConfig(data="", steps=200),
        finetune=FinetuneConfig(
            policy="",
            env="metaworld/push-v3",
            total_timesteps=300,
            n_envs=4,
            eval_every=1,
            eval_episodes=4,
            dppo=DPPOConfig(n_steps=10, n_epochs=1, batch_size=100),
        ),
        eval_episodes=4,
    ),
)


GYM = ("hopper", "walker2d", "halfcheetah")
# Comparisons: name -> (what does it, what it shows)
STUDIES = {
    "multimodal": ("dprl.experiments.multimodal:run", "which policies keep both ways round the disc of Avoid-v0"),
    "imitation": ("dprl.experiments.imitation:run", "diffusion against its competitors on three Meta-World tasks"),
    "horizons": (
        "dprl.experiments.horizons:run",
        "success against executed actions, closed to open loop, and horizon",
    ),
    "solvers": ("dprl.experiments.solvers:run", "success and latency against solver and number of steps"),
    "vision": ("dprl.experiments.vision:run", "image encoders where disc and goal must be seen, and blindfolded"),
    "vision-metaworld": (
        "dprl.experiments.vision:run_metaworld",
        "the same for Push through a rendered camera; slow without a GPU, see --scale",
    ),
    "finetune-metaworld": (
        "dprl.experiments.finetuning:on_metaworld",
        "DPPO, and PPO of Gaussian policies, on Meta-World from noisy demonstrations",
    ),
    "finetune-gym": (
        "dprl.experiments.finetuning:on_gym",
        "the same on Hopper, Walker2d and HalfCheetah from a medium expert, whom stable-baselines3 trains first",
    ),
    **{
        name: (f"dprl.experiments.finetuning:{name}", f"finetune-gym on {name} alone; --paper: the paper's size")
        for name in GYM
    },
    "avoid": (
        "dprl.experiments.finetuning:on_avoid",
        "the same on Avoid-v0, whose clones keep both ways round the disc; --paper: the paper's numbers for D3IL's",
    ),
    "ablations": ("dprl.experiments.ablations:run", "what each of DPPO's choices does, on one Meta-World task"),
    "offline-stitch": (
        "dprl.experiments.offline:on_mazes",
        "IDQL and its neighbours beside cloning, in point mazes whose routes are shown in pieces only",
    ),
    "offline-metaworld": (
        "dprl.experiments.offline:on_metaworld",
        "the same on six Meta-World tasks, from demonstrations of three qualities",
    ),
    "offline-to-online": (
        "dprl.experiments.offline:to_online",
        "IDQL that goes on online, its policy frozen or not, beside DPPO of the same policy",
    ),
    "offline-mujoco": (
        "dprl.experiments.offline:on_all_of_mujoco",
        "the same on Hopper, Walker2d and HalfCheetah: medium, medium-replay and medium-expert, after D4RL's recipe; "
        "--paper: the paper's size",
    ),
    **{
        f"offline-{name}": (f"dprl.experiments.offline:on_{name}", f"offline-mujoco on {name} alone; --paper too")
        for name in GYM
    },
    "guidance": (
        "dprl.experiments.guidance:run",
        "filtering and steering by critics, and both, at matched compute: three Meta-World tasks and Hopper",
    ),
    "planners": (
        "dprl.experiments.planners:run",
        "Diffuser and Decision Diffuser beside IDQL, whose critics they ask, in offline-stitch's mazes",
    ),
    "obstacle": ("dprl.experiments.obstacle:run", "a reward of one's own steers a clone round a pillar it never saw"),
    "score-field": ("dprl.experiments.score_field:run", "what a denoiser learns of a 2-D distribution, drawn"),
}

SIZED = {"finetune-gym", "avoid", "offline-mujoco", *GYM, *(f"offline-{name}" for name in GYM)}
"""Studies that also have the paper's size."""


def find(name: str) -> Experiment:
    """Return the experiment `name`.

    Raises:
        ConfigError: there is none; the message offers the nearest names.
    """
    by_name = {experiment.name: experiment for experiment in CATALOGUE}
    if name in STUDIES:
        raise ConfigError(f"'{name}' is a study: dprl experiment {name} --out FOLDER")
    if name not in by_name:
        hint = did_you_mean(name, by_name)
        raise ConfigError(f"unknown experiment '{name}'.{hint} 'dprl list experiments' shows the names.")
    return by_name[name]
