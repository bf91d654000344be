"""The command ``dprl``: one verb for each thing people do."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from dprl.agents import (
    BC,
    DPPO,
    IDQL,
    IQL,
    DecisionDiffuser,
    Diffuser,
    DiffusionQL,
    DPPOConfig,
    Energy,
    OnlineIDQL,
    Outcome,
)
from dprl.config import to_json
from dprl.data import DataOptions, open_dataset, summarize
from dprl.data import convert as convert_dataset
from dprl.data.load import FORMATS
from dprl.diffusion.solvers import SolverName
from dprl.doctor import examine
from dprl.errors import DprlError, check, did_you_mean
from dprl.experiments import demo as demo_module
from dprl.experiments import inspection, runs, tuning
from dprl.experiments.catalogue import CATALOGUE, SIZED, STUDIES, find
from dprl.experiments.studies import StudyConfig
from dprl.guidance.departure import Departure, Ensemble, climbed, departure
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.policy import (
    ChunkCritic,
    DiffusionConfig,
    DiffusionPolicy,
    GaussianConfig,
    GMMConfig,
    InferenceConfig,
    LSTMGMMConfig,
    PlannerConfig,
    Policy,
    RecedingHorizon,
    find_policy,
)
from dprl.rollout.evaluation import check_evaluation
from dprl.spec import EnvOptions, load, resolve
from dprl.training.progress import ProgressBar

app = tyro.extras.SubcommandApp()

Flat = tyro.conf.arg(name="")
Out = Annotated[Path, tyro.conf.arg(help="New folder to write; must not exist or be empty.")]
ExpertOut = Annotated[Path, tyro.conf.arg(help="Folder to write; one that this command left is continued.")]
TuneOut = Annotated[Path, tyro.conf.arg(help="Folder to write; one that this command left is continued.")]
Quiet = Annotated[bool, tyro.conf.arg(help="Show no progress bar.")]


@app.command
def demo(
    experiment: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]] = "push",
    *,
    denoiser: Literal["mlp", "unet", "transformer"] = "mlp",
    solver: SolverName = "ddpm",
    num_inference_steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    pictures: bool = True,
    quiet: Quiet = False,
) -> None:
    """The main job, end to end: noisy demonstrations, behaviour cloning, DPPO, and a table of what changed.

    Args:
        experiment: A name of 'dprl list experiments'.
        denoiser: The policy's network, of a size for two cores.
        solver: How the policy turns noise into actions; euler makes it a rectified flow.
        num_inference_steps: In so many steps. Default: 10.
        seed: Of everything.
        out: New folder, or that of an interrupted demo, which then goes on.
            Default: runs/NAME-DENOISER-seedS-DATE-TIME.
        pictures: Also draw trajectories and record a video.
        quiet: Show no progress bars.
    """
    chosen = demo_module.with_network(find(experiment), denoiser)
    if solver != "ddpm" or num_inference_steps is not None:
        chosen = demo_module.with_solver(chosen, solver, num_inference_steps)
    folder = out or Path("runs") / f"{chosen.name}-{denoiser}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    demo_module.run(chosen, seed, folder, progress_bar=not quiet, pictures=pictures)


@app.command
def experiment(
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME", help=f"Which: {', '.join(STUDIES)}.")]],
    config: Annotated[StudyConfig, Flat],
    *,
    quiet: Quiet = False,
) -> None:
    """Run one of the catalogue's comparisons: many trainings, a table and a figure. Interrupted, it goes on.

    Args:
        name: See 'dprl list experiments'.
        config: How much of it.
        quiet: Show no progress bar.
    """
    known = f"must be one of {', '.join(STUDIES)}.{did_you_mean(name, STUDIES)}"
    check(name in STUDIES, "experiment", name, known)
    check(not config.paper or name in SIZED, "paper", True, f"'{name}' has one size: leave it out")
    run, _ = STUDIES[name]
    table = load(run)(config, progress_bar=not quiet)
    print(f"\n{table.read_text(encoding='utf-8')}\nTable and figure are in {config.out}.")


@app.command(name="list")
def list_(what: tyro.conf.Positional[Literal["envs", "experts", "experiments", "agents", "formats"]]) -> None:
    """Show the names that other commands take.

    Args:
        what: Which names.
    """
    table = Table("name", "what it is", box=None)
    for name, about in _names(what):
        table.add_row(name, about)
    Console().print(table)


def _names(what: str) -> list[tuple[str, str]]:
    if what == "envs":
        from dprl.envs.catalogue import METAWORLD, MUJOCO

        rows = [
            ("Avoid-v0", "a point round a disc, left or right; 2 numbers, 2 actions, success, 100 steps"),
            ("AvoidPixels-v0", "the same, disc and goal elsewhere each time; 2 numbers and two 48-pixel images"),
            (
                "PointMaze-Halves-v0",
                "a maze whose route is shown in pieces only; 2 numbers, 2 actions, success, 150 steps",
            ),
            ("PointMaze-Thirds-v0", "the same, of three pieces, 250 steps"),
            ("PointMaze-Halves-Pieces-v0", "the same maze, begun in several places: for demonstrations"),
            ("PointMaze-Thirds-Pieces-v0", "the same of three pieces"),
            ("pusht/state", "gym-pusht: push the T into its outline; 5 numbers, 2 actions, success, 300 steps"),
            ("pusht/keypoints", "the same, the T's corners instead of its angle: 18 numbers"),
            ("pusht/pixels", "the same, the disc's position and a 96-pixel image"),
            ("metaworld/TASK-v3-pixels", "any Meta-World task through a camera: 4 numbers, an 84-pixel image; renders"),
        ]
        rows += [(name, "Meta-World v3, 39 numbers, 4 actions, success, 200 steps") for name in METAWORLD]
        rows += [(name, "Gymnasium MuJoCo, dense reward") for name in MUJOCO]
        return [
            *rows,
            ("any other Gymnasium id", "with a Box action space, e.g. your_module:YourEnv-v0"),
            (
                "  registered as nondeterministic",
                "cannot be replayed: what a lost worker played is left out (Rollout.environments)",
            ),
            (
                "a stable-baselines3 VecEnv",
                "in Python: dprl.envs.vec_env.from_vec_env, or make_spec for Ray workers; replayed and "
                "divided like any other",
            ),
        ]
    if what == "experts":
        from dprl.envs.experts import EXPERTS

        known = {name: list(builders) for name, builders in EXPERTS.items()}
        return [(name, f"{len(ids)} environments, {ids[0]} to {ids[-1]}") for name, ids in known.items()]
    if what == "formats":
        return [(kind.format, (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]) for kind in FORMATS]
    if what == "experiments":
        demos = [(f"dprl demo {experiment.name}", experiment.summary) for experiment in CATALOGUE]
        return demos + [(f"dprl experiment {name}", summary) for name, (_, summary) in STUDIES.items()]
    return [
        (agent.name, (sys.modules[agent.__module__].__doc__ or "").splitlines()[0])
        for agent in (BC, DPPO, IDQL, IQL, DiffusionQL, OnlineIDQL, Outcome, Energy, Diffuser, DecisionDiffuser)
    ]


@app.command(name="train-expert")
def train_expert(config: Annotated[runs.ExpertConfig, Flat], *, out: ExpertOut, quiet: Quiet = False) -> None:
    """Train an expert with stable-baselines3's PPO, for 'dprl collect'. Interrupted, the same command goes on."""
    expert, medium = runs.train_expert(config, out, progress_bar=not quiet)
    for name, seen in (("expert", expert), ("medium", medium)):
        print(f"{out / name}.zip: return {seen.return_mean:.0f} after {seen.timesteps:,} steps")
    print(f"Next: dprl collect {config.env} --expert {out / 'medium'}.zip --transitions 200000 --out runs/data")


@app.command
def collect(config: Annotated[runs.CollectConfig, Flat], *, out: Out, quiet: Quiet = False) -> None:
    """Play episodes with an expert and write them as a Minari data set."""
    data = runs.collect(config, out, progress_bar=not quiet)
    low, high = runs.wilson_of(data)
    success = f"success {data.success_rate:.2f} ({low:.2f} to {high:.2f}), " if resolve(config.env).has_success else ""
    print(
        f"{data.n_episodes} episodes, {data.ends[-1]:,} steps, {success}mean return "
        f"{np.sum(data.rewards) / data.n_episodes:,.1f} in {out}. Next: dprl pretrain {out} --out runs/pretrain, "
        f"or, where many fail: dprl offline {out} --out runs/offline"
    )


@app.command
def inspect(
    data: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]],
    *,
    filter_key: str | None = None,
    keys: tuple[str, ...] | None = None,
    plot: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """Show what a data set of any format holds: episodes, returns, ranges of actions, histograms.

    Args:
        data: File or folder; its format is told by what is in it, see 'dprl list formats'.
        filter_key: Of robomimic's files: only the episodes of this mask.
        keys: Parts of the observation that make up the state, and cameras. Default: the format's own.
        plot: Also draw the histograms into this PNG.
        quiet: Show no progress bar.
    """
    with (
        open_dataset(data, DataOptions(filter_key, keys)) as source,
        ProgressBar("reading", len(source.lengths), shown=not quiet) as bar,
    ):
        summary = summarize(source, bar.advance)
    Console().print(inspection.report(summary))
    if plot is not None:
        inspection.draw(summary, plot)
        print(f"The histograms are in {plot}.")


@app.command
def convert(
    src: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SRC")]],
    dst: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]],
    *,
    filter_key: str | None = None,
    keys: tuple[str, ...] | None = None,
    quiet: Quiet = False,
) -> None:
    """Write a data set of any format as a Minari data set, one episode in memory at a time.

    Args:
        src: File or folder; its format is told by what is in it, see 'dprl list formats'.
        dst: New folder to write.
        filter_key: Of robomimic's files: only the episodes of this mask.
        keys: Parts of the observation that make up the state, and cameras. Default: the format's own.
        quiet: Show no progress bar.
    """
    with open_dataset(src, DataOptions(filter_key, keys)) as source:
        with ProgressBar("writing", len(source.lengths), shown=not quiet) as bar:
            convert_dataset(source, dst, on_progress=bar.advance)
        print(f"{len(source.lengths)} episodes of {source.format} are in {dst}. Next: dprl inspect {dst}")


@app.command
def pretrain(config: Annotated[runs.PretrainConfig, Flat], *, out: Out, quiet: Quiet = False) -> None:
    """Train a policy on a data set by behaviour cloning: diffusion, or what it is measured against."""
    runs.pretrain(config, out, progress_bar=not quiet)
    features = Policy.from_pretrained(out).features
    env = features.env_id or "ENV"
    then = f"evaluate {out} --env {env}"
    tuned = isinstance(config.policy, DiffusionConfig | GaussianConfig | GMMConfig | LSTMGMMConfig)
    if tuned and not isinstance(config.policy, PlannerConfig):
        there = config.policy.num_train_timesteps if isinstance(config.policy, DiffusionConfig) else 1
        steps = "" if there >= DPPOConfig().tuned_steps else f" --dppo.tuned-steps {there}"
        then = f"finetune {out} --env {env}{steps} --out runs/finetune"
    print(f"The policy is in {out}. Next: dprl {then}")


@app.command
def offline(config: Annotated[runs.OfflineConfig, Flat], *, out: Out, quiet: Quiet = False) -> None:
    """Learn from rewards in a data set, without a simulator: IDQL, IQL, Diffusion-QL, or planners."""
    runs.offline(config, out, progress_bar=not quiet)
    learned_in = Policy.from_pretrained(out).features.env_id
    env = config.env or ("ENV" if learned_in is None else None)
    where = f" --env {env}" if env else ""
    how = _how(config.acting) + _how(config.steering)
    print(f"What was learned is in {out}. Next: dprl evaluate {out}{where}{how}")


@app.command(name="train-critic")
def train_critic(config: Annotated[runs.CriticTrainingConfig, Flat], *, out: Out, quiet: Quiet = False) -> None:
    """Learn from data what a policy's chunks are worth, to guide it or choose among its samples; the policy stays."""
    runs.train_critic(config, out, progress_bar=not quiet)
    env = "" if Policy.from_pretrained(out).features.env_id else " --env ENV"
    exact = " --gradient noisy --scaling score" if config.agent == "energy" else ""
    print(
        f"The policy and its critic are in {out}. Next: dprl evaluate {out}{env} --candidates 16, "
        f"or: dprl evaluate {out}{env} --guide critic{exact}"
    )


def _how(acting: InferenceConfig | GuidanceConfig) -> str:
    """The options that let a policy act so."""
    return "".join(f" {option}" for option in tuning.options_of(acting))


@app.command
def finetune(config: Annotated[runs.FinetuneConfig, Flat], *, out: Out, quiet: Quiet = False) -> None:
    """Improve a pretrained policy with reward: DPPO, or IDQL that goes on after 'dprl offline'."""
    runs.finetune(config, out, progress_bar=not quiet)
    print(f"The policy is in {out}. Next: dprl evaluate {out} --env {config.env} --episodes 100{_how(config.acting)}")


@app.command
def resume(
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    *,
    data: Path | None = None,
    critics: str | None = None,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run from its newest checkpoint, as if it had never stopped.

    Args:
        run: Folder of the run.
        data: Where its data are now. Default: where they were.
        critics: Where the critics are now that say what follows. Default: where they were.
        quiet: Show no progress bar.
    """
    runs.resume(run, data=data, critics=critics, progress_bar=not quiet)
    print(f"{run} is complete.")


@app.command
def evaluate(
    policy: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="POLICY")]],
    *,
    env: str | None = None,
    episodes: int = 100,
    seed: int = 0,
    inference: Annotated[InferenceConfig, Flat] = InferenceConfig(),  # noqa: B008  frozen
    guidance: Annotated[GuidanceConfig, Flat] = GuidanceConfig(),  # noqa: B008  frozen
    n_action_steps: int | None = None,
    pool: Literal["local", "ray"] = "local",
    workers: int = 2,
    device: str = "cpu",
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    options: EnvOptions = EnvOptions(),  # noqa: B008  frozen
    quiet: Quiet = False,
) -> None:
    """Play episodes with a policy, without exploration noise, and report how it did.

    Args:
        policy: Folder of the policy, or of a run (its best checkpoint, else its last).
        env: Environment, see 'dprl list envs'. Default: where the policy learned.
        episodes: How many.
        seed: Of the start states and the policy's noise; the same seed gives the same result.
        inference: How the policy acts.
        guidance: What steers it.
        n_action_steps: How many actions of a chunk are executed. Default: the policy's own number.
        pool: Where episodes are played: in this process, or on Ray, with the same result.
        workers: Of Ray.
        device: Where the policy runs.
        json_: Print one JSON object on standard output and nothing else.
        options: Of the environment.
        quiet: Show no progress bar.
    """
    runs.check_device(device)
    asked = None if env is None else resolve(env, options)
    loaded = Policy.from_pretrained(policy, device=device)
    spec = asked or resolve(runs.home_of(loaded), options)
    check_evaluation(loaded, spec, episodes, seed)
    if loaded.features.env_id not in (None, spec.id):
        print(f"note: the policy learned in {loaded.features.env_id}, not in {spec.id}", file=sys.stderr)
    guide, scorer = steering(guidance, loaded)
    chooses = (inference.candidates or 1) > 1
    used = scorer is None or chooses or (guide is not None and isinstance(scorer, Ensemble))
    check(used, "scorer", guidance.scorer, "needs candidates, above 1, to choose among")
    beyond = guidance.command is not None and isinstance(loaded, DiffusionPolicy) and not loaded.known(guidance.command)
    if beyond:
        print(f"note: command = {guidance.command}: beyond what came of any chunk of the data", file=sys.stderr)
    control = RecedingHorizon(loaded, inference, guide=guide, scorer=scorer)
    if n_action_steps is not None:
        ensembles = inference.temporal_ensembling is not None
        check(
            not ensembles, "n_action_steps", n_action_steps, "temporal_ensembling decides at every step; leave it out"
        )
        loaded.set_n_action_steps(n_action_steps)
    executed = control.n_action_steps
    for judge in (control.scorer if chooses else None, *([] if guide is None else climbed(guide))):
        if isinstance(judge, ChunkCritic) and judge.n_action_steps != executed:
            print(f"note: the critics judge {judge.n_action_steps} actions of a chunk, and {executed} are executed",
                  file=sys.stderr)  # fmt: skip
            break
    with ProgressBar("evaluate", episodes, shown=not quiet and not json_) as bar:
        result = runs.played(control, spec, episodes, seed, pool, workers, on_progress=bar.advance)
    how: dict[str, Any] = {
        "policy": str(policy),
        "n_action_steps": control.n_action_steps,
        "inference": to_json(inference),
    }
    how |= {"guidance": to_json(guidance)} if guidance != GuidanceConfig() else {}
    if guide is not None:
        seen = runs.watched(control, spec, episodes, seed)
        left = departure(loaded, seen, guide, inference, scorer=control.scorer, seed=seed)
        how |= {"departure": to_json(left)}
        _tell(left)
    if json_:
        print(json.dumps({**how, **result.to_json()}))
        return
    table = Table(title=f"{find_policy(policy)} on {spec.id}, {episodes} episodes, seed {seed}", show_header=False)
    for name, value in {**result.to_json(), **how.get("departure", {})}.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        table.add_row(name, f"{value[0]:.3f} to {value[1]:.3f}" if isinstance(value, list | tuple) else str(shown))
    Console().print(table)


def _tell(left: Departure) -> None:
    """Say if guided chunks leave the data."""
    if left.warning is not None:
        print(f"note: {left.warning}", file=sys.stderr)


@app.command(name="tune-guidance")
def tune_guidance(config: Annotated[tuning.TuneConfig, Flat], *, out: TuneOut, quiet: Quiet = False) -> None:
    """Try scales, gates and candidates of a guide, on start states of their own. Interrupted, it goes on."""
    best = tuning.tune(config, out, progress_bar=not quiet)
    print((out / "tuning.md").read_text(encoding="utf-8"))
    if best.scale:
        _tell(Departure(best.distance, best.disagreement))
    print(f"The figure is in {out / 'tuning.png'}. Next: {tuning.command_of(config, best.combination)}")


@app.command
def doctor() -> None:
    """Show versions, devices, Ray and rendering, and what to install for what is missing."""
    table = Table("", "found", "what to do", box=None)
    for finding in examine():
        mark = "[green]ok[/]" if finding.ok else "[yellow]missing[/]"
        table.add_row(f"{mark} {finding.what}", finding.found, finding.remedy.replace("[", r"\["))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a user's error, 128 + n after signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a function of the user's is looked for
    try:
        app.cli(
            prog="dprl",
            args=given,
            description=__doc__,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except DprlError as error:
        message = f"dprl: error: {_option_of(str(error), given)}{error}"
        print("; ".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"dprl: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        remedy = "a smaller network, batch or number of environments or candidates needs less"
        print(f"dprl: error: {str(error).splitlines()[0]}: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dprl: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _option_of(message: str, arguments: Sequence[str]) -> str:
    """``--idql.critic.hidden-size: `` for a message of `hidden_size`: the one nested option that was given for it."""
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    name = message.split(" = ", maxsplit=1)[0].replace("_", "-")
    found = [option for option in options if option.endswith(f".{name}")]
    return f"{found[0]}: " if len(found) == 1 else ""


def _is_memory_error(error: Exception) -> bool:
    """Whether memory ran out; torch says so of the CPU's in words only."""
    said = ("allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)
