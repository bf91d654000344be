"""Studies of offline learning: IDQL and its neighbours beside cloning, from the same data.

Cloning is IDQL with a single candidate: the behaviour policy is trained alike, with the same draws.

MuJoCo's data sets follow D4RL's recipe (arXiv:2004.07219, section 5): `medium` is of a policy of a third of the
expert's return, `medium-replay` of all its forerunners alike, exploring, `medium-expert` of it and as much again of the
expert. The experts are PPO's of stable-baselines3, which a study trains first where it needs to. There are a size for
two cores and the paper's (`--paper`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dprl.agents import BCConfig, DiffusionQLConfig, DPPOConfig, IDQLConfig, OnlineIDQLConfig
from dprl.experiments import plots, runs
from dprl.experiments.finetuning import (
    GYM,
    MEAN,
    demonstrators_of,
    expert_folder,
    mean_score,
    minutes_for,
    score,
    score_of,
)
from dprl.experiments.runs import CollectConfig, FinetuneConfig, OfflineConfig, PretrainConfig
from dprl.experiments.studies import (
    Cell,
    Look,
    Outcome,
    StudyConfig,
    curve_file,
    grouped,
    require_ready_for,
    run_cells,
    tuned,
    write_table,
)
from dprl.implicit import ValueObjective
from dprl.networks import LNResNetConfig, MLPConfig
from dprl.policy import CriticConfig, DiffusionConfig, GaussianConfig, InferenceConfig
from dprl.spec import build, env_seeds, resolve

CANDIDATES = (1, 4, 16, 64, 256)
DRAWN = InferenceConfig(candidates=50, selection="softmax")
"""How Diffusion-QL acts in its paper."""
BEST = 0.1
"""Share of the episodes that filtered cloning keeps."""
MLP_BEHAVIOUR = replace(runs.BEHAVIOUR, denoiser=MLPConfig())
"""IDQL's behaviour policy for two cores."""
METHODS = {
    "idql | 1": "BC",
    "filtered": f"BC of the best {BEST:.0%}",
    "iql": "IQL, Gaussian",
    "diffusion-ql": "Diffusion-QL (EDP)",
    "idql | 64": "IDQL, N = 64",
}


@dataclass(frozen=True)
class Recipe:
    """A data set and how it is learned from. Seeds and folders are filled in."""

    sources: tuple[CollectConfig, ...]
    """Whose episodes are put together."""
    steps: int
    idql: IDQLConfig
    env: str | None = None
    """Where policies are evaluated. Default: where the data are from."""
    policy: DiffusionConfig = MLP_BEHAVIOUR
    temperature: float = 1.0
    """At which clones draw, IDQL's too; Diffusion-QL draws at 1, as in its paper."""


@dataclass(frozen=True)
class References:
    """Returns between which a score is normalised: 0 is that of random actions, 100 the expert's."""

    random: float
    expert: float


def maze(name: str, episodes: int) -> Recipe:
    """A point maze, shown in pieces."""
    critic = CriticConfig(objective=ValueObjective("expectile", 0.9))
    return Recipe(
        (CollectConfig(f"{name}-Pieces-v0", noise=0.3, episodes=episodes),),
        steps=8_000,
        idql=IDQLConfig(critic=critic),
        env=f"{name}-v0",
    )


def metaworld(task: str) -> Recipe:
    """Demonstrations of three qualities: a scripted expert disturbed a little, much, and out of its wits."""
    env = f"metaworld/{task}-v3"
    return Recipe(
        tuple(CollectConfig(env, noise=noise, episodes=200) for noise in QUALITIES),
        steps=20_000,
        idql=IDQLConfig(critic=CriticConfig(objective=ValueObjective("expectile", 0.9)), learning_rate=1e-3),
    )


@dataclass(frozen=True)
class Size:
    """How large MuJoCo's data sets are, and how they are learned from."""

    transitions: int
    """Of each; `medium-expert` has twice as many."""
    steps: int
    idql: IDQLConfig
    policy: DiffusionConfig
    temperature: float = 1.0


def mujoco(env: str, kind: str, forerunners: Sequence[str], size: Size) -> Recipe:
    """One of `KINDS`; `forerunners` are the policies up to the medium one, by the names of their files."""
    folder = f"experts/{env}"
    experts = {
        "medium": [(f"{folder}/medium.zip", NOISE)],
        "medium-expert": [(f"{folder}/medium.zip", NOISE), (f"{folder}/expert.zip", NOISE)],
        REPLAY: [(f"{folder}/checkpoints/{name}.zip", EXPLORING) for name in forerunners],
    }[kind]
    share = size.transitions // (len(experts) if kind == REPLAY else 1)
    return Recipe(
        tuple(CollectConfig(env, expert, noise, transitions=share) for expert, noise in experts),
        steps=size.steps,
        idql=size.idql,
        policy=size.policy,
        temperature=size.temperature,
    )


QUALITIES = (0.3, 1.0, 2.0)
"""Standard deviations of the action noise."""
METAWORLD = ("push", "pick-place", "bin-picking", "box-close", "peg-insert-side", "hammer")
SINGLE = Size(
    100_000,
    20_000,
    IDQLConfig(return_range=100.0),
    replace(MLP_BEHAVIOUR, horizon=1, n_action_steps=1),
    temperature=0.5,
)
SMALL = {
    "Hopper-v5": Size(100_000, 20_000, IDQLConfig(return_range=10.0), MLP_BEHAVIOUR),
    "Walker2d-v5": SINGLE,
    "HalfCheetah-v5": SINGLE,
}
"""Chosen on a seed that no study's table has."""
PAPER = Size(
    1_000_000,
    3_000_000,
    IDQLConfig(
        BCConfig(batch_size=512, learning_rate=3e-4, final_learning_rate=1e-6, ema_decay=0.999),
        batch_size=512,
        return_range=1_000.0,
    ),
    replace(runs.BEHAVIOUR, horizon=1, n_action_steps=1),
)
"""D4RL's million of transitions, and the numbers of arXiv:2304.10573 for them: decisions are of one action."""
NOISE, EXPLORING = 0.1, 0.37
"""Of demonstrators, and of those that still explore: what PPO begins with."""
REPLAY = "medium-replay"
KINDS = ("medium", REPLAY, "medium-expert")
MAZES = {"halves": maze("PointMaze-Halves", 200), "thirds": maze("PointMaze-Thirds", 400)}


def cells_of(tasks: dict[str, Recipe], config: StudyConfig) -> list[Cell]:
    """Every method on every task and seed."""
    found = []
    for seed in config.seeds:
        for task, recipe in tasks.items():
            collect, *more = (replace(source, seed=seed) for source in recipe.sources)
            idql = recipe.idql
            cloned = PretrainConfig("", recipe.policy, recipe.steps, bc=idql.bc, seed=seed)
            gaussian = replace(cloned, policy=_gaussian(recipe.policy))

            def look(name: str, inference: InferenceConfig, recipe: Recipe = recipe) -> Look:
                own = inference in (MEAN, DRAWN)
                drawn = inference if own else replace(inference, temperature=recipe.temperature)
                return Look(name, drawn, episodes=config.episodes, env=recipe.env)

            every = tuple(look(str(n), InferenceConfig(candidates=n)) for n in CANDIDATES)
            ql = DiffusionQLConfig(**vars(idql))
            for method, pretrain, looks, offline in (
                ("idql", cloned, every, OfflineConfig("", idql=idql)),
                ("filtered", replace(cloned, best=BEST), (look("", InferenceConfig()),), None),
                ("iql", gaussian, (look("", MEAN),), OfflineConfig("", agent="iql", idql=idql)),
                ("diffusion-ql", cloned, (look("", DRAWN),), OfflineConfig("", agent="diffusion-ql", diffusion_ql=ql)),
            ):
                name = f"{task}.{method}.seed{seed}"
                found.append(Cell(name, collect, pretrain, looks, more=tuple(more), offline=offline))
    return found


def _gaussian(policy: DiffusionConfig) -> GaussianConfig:
    """A Gaussian policy of the same chunks and width."""
    assert isinstance(policy.denoiser, MLPConfig | LNResNetConfig)
    own = policy.denoiser
    return GaussianConfig(
        horizon=policy.horizon,
        n_action_steps=policy.n_action_steps,
        hidden_size=own.hidden_size,
        n_blocks=own.n_blocks,
        activation=own.activation,
    )


def on_mazes(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Study `offline-stitch`."""
    outcomes = run_cells(cells_of(MAZES, config), config, progress_bar=progress_bar)
    return _write("offline-stitch", outcomes, config, [CHUNKS])


def on_metaworld(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Study `offline-metaworld`."""
    tasks = {task: metaworld(task) for task in METAWORLD}
    outcomes = run_cells(cells_of(tasks, config), config, progress_bar=progress_bar)
    qualities = ", ".join(map(str, QUALITIES))
    recipe = tasks[METAWORLD[0]]
    note = (
        f"{CHUNKS} {recipe.sources[0].episodes} episodes each of a scripted expert whose actions are disturbed by "
        f"noise of {qualities}; sparse reward. Critics learn at {recipe.idql.learning_rate:g} for "
        f"{recipe.steps * config.scale:,.0f} gradient steps, where the paper has 3e-4 and millions."
    )
    return _write("offline-metaworld", outcomes, config, [note])


def on_mujoco(envs: Sequence[str], config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Study `offline-mujoco`, or of one of its environments."""
    tasks, notes, references = dict[str, Recipe](), [], dict[str, References]()
    sizes = {name: PAPER if config.paper else SMALL[GYM[name]] for name in envs}
    known = {
        name: {f"{name}-{kind}": mujoco(GYM[name], kind, (), size) for kind in KINDS if kind != REPLAY}
        for name, size in sizes.items()
    }  # medium-replay is of what its expert's training leaves
    require_ready_for([cell for recipes in known.values() for cell in cells_of(recipes, config)], config)
    for name in envs:
        env = GYM[name]
        expert, medium = demonstrators_of(env, cells_of(known[name], config), config, progress_bar=progress_bar)
        before = [seen.name for seen in runs.forerunners(expert_folder(env, config))]
        tasks |= known[name] | {f"{name}-{REPLAY}": mujoco(env, REPLAY, before, sizes[name])}
        references[name] = References(random_return(env), expert.return_mean)
        notes.append(
            f"{env}: scores are normalised between the returns of random actions, {references[name].random:,.0f}, and "
            f"of the expert, {expert.return_mean:,.0f} (the best of {minutes_for(config):g} minutes of PPO); the "
            f"medium one's is {medium.return_mean:,.0f}, and medium-replay is of {len(before)} policies up to it. "
            + ("Decisions are single actions" if sizes[name].policy.horizon == 1 else CHUNKS[:-1])
            + f"; clones draw at temperature {sizes[name].temperature:g}, Diffusion-QL at 1."
        )
    size = sizes[envs[0]]
    notes.append(
        f"A data set has {size.transitions:,} transitions, medium-expert twice as many, and is learned from in "
        f"{size.steps * config.scale:,.0f} gradient steps."
    )
    outcomes = run_cells(cells_of(tasks, config), config, progress_bar=progress_bar)
    scored = [normalised(o, references[_task(o).split("-")[0]]) for o in outcomes]
    name = "offline-mujoco" if len(envs) > 1 else f"offline-{envs[0]}"
    return _write(name, scored, config, [*notes, *map(_published, envs), DIFFERS])


def _published(name: str) -> str:
    """What others report of an environment."""
    kinds = zip(KINDS, PUBLISHED[name], strict=True)
    means = " / ".join(map(str, PUBLISHED_MEANS))
    return (
        f"Published for IDQL / Diffusion-QL / IQL on D4RL's {name} sets (as collected in arXiv:2310.05333): "
        + ", ".join(f"{' / '.join(map(str, scores))} on {kind}" for kind, scores in kinds)
        + f"; means of its nine MuJoCo sets {means}."
    )


def normalised(outcome: Outcome, references: References) -> Outcome:
    """The outcome with its return between the references, in percent."""
    scale = 100 / (references.expert - references.random)
    score, error = scale * (outcome.return_mean - references.random), scale * outcome.return_error
    return replace(outcome, return_mean=score, return_error=error)


def random_return(env: str, episodes: int = 100) -> float:
    """Return the mean return of uniform random actions, of `episodes` episodes that are always the same."""
    spec = resolve(env)
    rng, simulator = np.random.default_rng(0), build(spec, env_seeds(0, episodes, purpose="random"))
    try:
        simulator.reset()
        returns, over = np.zeros(episodes), np.zeros(episodes, np.bool_)
        while not over.all():
            actions = rng.uniform(spec.action_low, spec.action_high, (episodes, 1, spec.action_size))
            step = simulator.step_chunk(actions.astype(np.float32))
            returns += np.where(over, 0.0, step.reward)
            over |= step.terminated | step.truncated
    finally:
        simulator.close()
    return float(returns.mean())


def _write(name: str, outcomes: Sequence[Outcome], config: StudyConfig, notes: Sequence[str]) -> Path:
    """Write ``NAME.md``, ``.csv`` and ``.png`` and return the first."""
    by_task = {task: grouped(own, _method) for task, own in grouped(outcomes, _task).items()}
    rows = [
        [task, shown, score(found[method]), ", ".join(f"{score_of(o):.2f}" for o in found[method])]
        for task, found in by_task.items()
        for method, shown in METHODS.items()
    ]
    for method, shown in METHODS.items() if len(by_task) > 1 else ():
        rows.append(["mean", shown, f"{np.mean([mean_score(found[method]) for found in by_task.values()]):.2f}", ""])
    _against_candidates(by_task, config.out / f"{name}.png")
    columns = ["data", "method", "score (95 %)", "each seed"]
    return write_table(config, name, "Offline learning", columns, rows, [_setting(config), *notes], outcomes)


def _against_candidates(by_task: dict[str, dict[str, list[Outcome]]], file: Path) -> None:
    """Draw the score of IDQL against N, every seed thin, and of the other methods as lines."""
    columns = min(len(by_task), 3)
    rows = math.ceil(len(by_task) / columns)
    figure = plots.new_figure(figsize=(4.2 * columns, 3.6 * rows))
    for axis, (task, found) in zip(figure.subplots(rows, columns, squeeze=False).flat, by_task.items(), strict=False):
        groups = [found[f"idql | {n}"] for n in CANDIDATES]
        axis.plot(CANDIDATES, [[score_of(o) for o in group] for group in groups], color="C0", lw=0.6, alpha=0.5)
        axis.plot(CANDIDATES, [mean_score(group) for group in groups], "o-", color="C0", label="IDQL")
        for i, method in enumerate(("filtered", "iql", "diffusion-ql"), start=1):
            axis.axhline(mean_score(found[method]), color=f"C{i}", ls="--", lw=1, label=METHODS[method])
        axis.set_title(task, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(CANDIDATES, [str(n) for n in CANDIDATES])
        axis.set_xlabel("candidates N (1: BC)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def _task(outcome: Outcome) -> str:
    return outcome.cell.split(".")[0]


def _method(outcome: Outcome) -> str:
    method = outcome.cell.split(".")[1]
    return f"{method} | {outcome.look}" if method == "idql" else method


def _setting(config: StudyConfig) -> str:
    return (
        f"Seeds {', '.join(map(str, config.seeds))}, of data and learning; {config.episodes} held-out episodes each, "
        "the same for every method. BC is IDQL's behaviour policy: one candidate. IQL's Gaussian acts by its mean; "
        "Diffusion-QL draws among 50 samples by softmax of Q." + ("" if config.paper else SMALLER)
    )


def online_cells(config: StudyConfig) -> list[Cell]:
    """Offline learning, and from its policy and critics IDQL that goes on in both ways, and DPPO."""
    found = []
    for seed in config.seeds:
        for task in ONLINE:
            recipe = metaworld(task)
            collect, *more = (replace(source, seed=seed) for source in recipe.sources)
            look = Look("", InferenceConfig(candidates=64), episodes=config.episodes)
            base = Cell(
                f"{task}.offline.seed{seed}",
                collect,
                PretrainConfig("", recipe.policy, recipe.steps, bc=recipe.idql.bc, seed=seed),
                (look,),
                more=tuple(more),
                offline=OfflineConfig("", idql=recipe.idql),
            )
            found.append(base)
            common = FinetuneConfig("", collect.env, ONLINE_STEPS, n_envs=32, eval_every=5, eval_episodes=100)
            for way in ("frozen", "continues"):
                idql = OnlineIDQLConfig(recipe.idql, way)
                cell = tuned(base, f"{task}.{way}.seed{seed}", replace(common, agent="idql", idql=idql))
                acting = replace(look.inference, selection=idql.chosen_by)
                found.append(replace(cell, looks=(replace(look, inference=acting),)))
            dppo = DPPOConfig(tuned_steps=recipe.policy.num_train_timesteps)
            cell = tuned(base, f"{task}.dppo.seed{seed}", replace(common, n_envs=64, dppo=dppo))
            found.append(replace(cell, looks=(replace(look, inference=InferenceConfig()),)))
    return found


def to_online(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Study `offline-to-online`."""
    name = "offline-to-online"
    outcomes = run_cells(online_cells(config), config, progress_bar=progress_bar)
    rows, panels = [], dict[str, dict[str, list[Path]]]()
    for task, own in grouped(outcomes, _task).items():
        found = grouped(own, _method)
        for method, shown in WAYS.items():
            o = found[method]
            minutes = f"{np.mean([x.train_s for x in o]) / 60:.1f}"
            rows.append([task, shown, score(o), ", ".join(f"{score_of(x):.2f}" for x in o), minutes])
            if method != "offline":
                panels.setdefault(task, {})[shown] = [curve_file(config, x.cell) for x in o]
    plots.over_seeds(panels, config.out / f"{name}.png")
    setting = (
        f"Seeds {', '.join(map(str, config.seeds))}; {config.episodes} held-out episodes each. IDQL is learned from "
        f"offline-metaworld's data, and goes on for {ONLINE_STEPS * config.scale:,.0f} environment steps, from "
        "minibatches of half data and half replay buffer; DPPO tunes the same cloned policy, without its critics, for "
        "as many."
    )
    columns = ["task", "method", "success (95 %)", "each seed", "minutes"]
    return write_table(config, name, "From offline to online", columns, rows, [setting], outcomes)


ONLINE = ("pick-place", "box-close")
ONLINE_STEPS = 150_000
WAYS = {
    "offline": "IDQL, offline",
    "frozen": "IDQL, the policy frozen",
    "continues": "IDQL, the policy goes on",
    "dppo": "DPPO",
}
SMALLER = " Denoisers are MLPs 256 wide, where the paper has its LN-ResNet, which is `dprl offline`'s default."
CHUNKS = "Decisions are chunks of four actions, where the paper's are single ones."
DIFFERS = (
    "Those are scores against D4RL's references, of sets that SAC made, larger than these; IDQL learned from them in "
    "1.5 to 3 million gradient steps, and was tuned for each set."
)
PUBLISHED = {
    "hopper": ((65.4, 90.5, 66.3), (92.1, 101.3, 94.7), (108.6, 111.1, 91.5)),
    "walker2d": ((82.5, 87.0, 78.3), (85.1, 95.5, 73.9), (112.7, 110.1, 109.6)),
    "halfcheetah": ((51.0, 51.1, 47.4), (45.9, 47.8, 44.2), (95.9, 96.8, 86.7)),
}
"""Of IDQL, Diffusion-QL and IQL on D4RL's sets, in the order of `KINDS`; as collected in arXiv:2310.05333."""
PUBLISHED_MEANS = (82.1, 87.9, 76.9)
"""Of all nine."""
on_all_of_mujoco = partial(on_mujoco, tuple(GYM))
on_hopper, on_walker2d, on_halfcheetah = (partial(on_mujoco, (name,)) for name in GYM)
