"""`dprl tune-guidance`: how strongly to guide a policy, found by trying.

OUT/tuning.json   the settings, and what tells the weights apart that were tried
OUT/tried.json    what each combination did that was tried; those are not tried again
OUT/tuning.md, .csv, .png
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from dprl import checkpoint
from dprl.config import from_json, to_json, validate
from dprl.errors import CheckpointError, ConfigError, check
from dprl.experiments import plots, runs
from dprl.experiments.studies import write_files
from dprl.guidance.departure import Departure, departure
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.guidance.value import Gradient, Scaling
from dprl.observations import TensorObservation
from dprl.policy import InferenceConfig, Policy, RecedingHorizon, find_policy
from dprl.policy.candidates import Selection
from dprl.rollout.evaluation import Z95, check_evaluation, wilson
from dprl.seeding import derive_seed
from dprl.spec import EnvOptions, EnvSpec, resolve
from dprl.training.progress import ProgressBar
from dprl.training.run import RunFolder

SETTINGS_FILE, TRIED_FILE, WEIGHTS = "tuning.json", "tried.json", "weights"


@dataclass(frozen=True)
class TuneConfig:
    """Try scales, gates and candidates on start states that no evaluation has."""

    policy: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="POLICY")]]
    """Folder of the policy, or of a run."""
    guide: str
    """What steers it: see `dprl evaluate --help`."""
    env: str | None = None
    """Environment, see `dprl list envs`. Default: where the policy learned."""
    scales: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """How strongly; no guide is always tried, too."""
    skip_last: tuple[int, ...] = (0,)
    """How many last denoising steps are left alone."""
    candidates: tuple[int, ...] = (1,)
    """Among how many samples the scorer chooses."""
    gradient: Gradient = "held"
    """See `dprl evaluate --help`."""
    scaling: Scaling = "normalized"
    """See `dprl evaluate --help`; `normalized` has scales that do not depend on the value's units."""
    guide_steps: int = 1
    """Times at each denoising step."""
    scorer: str | None = None
    """What chooses among candidates, named as the guide is. Default: the policy's own critics."""
    selection: Selection = "argmax"
    """How it chooses, see `dprl evaluate --help`."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the policy acts; candidates are tried."""
    episodes: int = 100
    """Of each combination, the same for all."""
    seed: int = 0
    """Of start states and noise."""
    pool: Literal["local", "ray"] = "local"
    """Where episodes are played: in this process, or on Ray, with the same result."""
    workers: int = 2
    """Of Ray."""
    device: str = "cpu"
    options: EnvOptions = field(default_factory=EnvOptions)

    def __post_init__(self) -> None:
        least = dict.fromkeys(("episodes", "guide_steps"), 1)
        validate(self, at_least={**least, "seed": 0})
        for name, lowest in (("scales", -math.inf), ("skip_last", 0), ("candidates", 1)):
            values = getattr(self, name)
            fits = values and all(math.isfinite(v) and v >= lowest for v in values) and len(set(values)) == len(values)
            check(
                fits,
                name,
                values,
                f"must be at least one number, each once{f', of at least {lowest}' if lowest > -1 else ''}",
            )
        guided = 0 not in self.scales
        check(guided, "scales", self.scales, "must not have 0: no guide is always tried")
        asked = self.inference.candidates
        check(asked is None, "inference.candidates", asked, "must be left out: give candidates, which are tried")
        chooses = max(self.candidates) > 1 or self.selection == "argmax"
        check(chooses, "selection", self.selection, "needs candidates above 1 to choose among")

    @property
    def combinations(self) -> list[Combination]:
        """What is tried, the plainest first."""
        plain = [Combination(0.0, 0, n) for n in sorted(self.candidates)]
        product = itertools.product(sorted(self.candidates), sorted(self.skip_last), sorted(self.scales, key=abs))
        return plain + [Combination(scale, gate, n) for n, gate, scale in product]


class Combination(NamedTuple):
    """One way to guide."""

    scale: float
    skip_last: int
    candidates: int


@dataclass(frozen=True)
class Tried:
    """What one combination did."""

    scale: float
    skip_last: int
    candidates: int
    episodes: int
    success: float | None
    """None where the environment reports none."""
    return_mean: float
    return_error: float | None
    """Its standard error."""
    latency_ms: float
    """Of a decision for one environment."""
    distance: float
    disagreement: float | None
    gain: float | None
    """See `Departure`."""

    @property
    def combination(self) -> Combination:
        """Which."""
        return Combination(self.scale, self.skip_last, self.candidates)

    @property
    def score(self) -> float:
        """Success, or where there is none the return."""
        return self.return_mean if self.success is None else self.success

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the score's."""
        if self.success is not None:
            return wilson(round(self.success * self.episodes), self.episodes)
        half = math.nan if self.return_error is None else Z95 * self.return_error
        return self.return_mean - half, self.return_mean + half


def tune(config: TuneConfig, out: Path, *, progress_bar: bool = True) -> Tried:
    """Try every combination in `out`, or those that are missing there; return the best.

    Of equals the best is the plainest. It is the best of many on the same episodes, so it will do somewhat worse on
    others: evaluate it.

    Raises:
        ConfigError: something does not fit; or what is in `out` was begun with other settings.
    """
    plots.new_figure()
    runs.check_device(config.device)
    policy = Policy.from_pretrained(config.policy, device=config.device)
    spec = resolve(config.env or runs.home_of(policy), config.options)
    seed = derive_seed(config.seed, "tuning")
    check_evaluation(policy, spec, config.episodes, seed)
    for combination in config.combinations:
        _control(config, policy, combination)  # or it is refused before anything is played
    obs = runs.watched(RecedingHorizon(policy, config.inference), spec, config.episodes, seed)
    for combination in {c.skip_last: c for c in config.combinations if c.scale}.values():  # one for each gate
        _require_moving(config, policy, combination, obs)
    done = _begun(config, out)
    n_done = len(done.keys() & set(config.combinations))
    with ProgressBar("tune", len(config.combinations), n_done, shown=progress_bar) as bar:
        for combination in config.combinations:
            if combination not in done:
                bar.note(
                    f"scale {combination.scale:g}, skip {combination.skip_last}, {combination.candidates} candidates"
                )
                done[combination] = _tried(config, policy, spec, seed, combination, obs)
                checkpoint.write_json(out / TRIED_FILE, [to_json(t) for t in done.values()])
                bar.advance(1)
    tried = [done[combination] for combination in config.combinations]
    best = max(tried, key=lambda t: t.score)  # the first of equals
    _write(config, tried, best, spec, out)
    return best


def command_of(config: TuneConfig, best: Combination) -> str:
    """Return the command that evaluates what acts, and is guided, so."""
    parts = ["dprl evaluate", config.policy]
    parts += [] if config.env is None else [f"--env {config.env}"]
    parts += options_of(config.options, "--options.") + options_of(config.inference)
    if best.scale:
        scale = str(best.scale).removesuffix(".0")
        parts += [f"--guide {config.guide} --scale {scale} --gradient {config.gradient} --scaling {config.scaling}"]
        parts += [f"--guide-steps {config.guide_steps}"] if config.guide_steps > 1 else []
        parts += [f"--skip-last {best.skip_last}"] if best.skip_last else []
    if best.candidates > 1:
        parts += [f"--candidates {best.candidates}"]
        parts += [] if config.scorer is None else [f"--scorer {config.scorer}"]
        parts += [] if config.selection == "argmax" else [f"--selection {config.selection}"]
    return " ".join(parts)


def options_of(chosen: EnvOptions | InferenceConfig | GuidanceConfig, prefix: str = "--") -> list[str]:
    """Return the options of `dprl evaluate` that choose so, but for what is usual."""
    usual = type(chosen)()
    given = {name: value for name, value in vars(chosen).items() if value not in (getattr(usual, name), "argmax")}
    said = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in given.items()}
    return [f"{prefix}{name.replace('_', '-')} {value}" for name, value in said.items()]


def _begun(config: TuneConfig, out: Path) -> dict[Combination, Tried]:
    """What was tried in `out` before, which may be nothing; the folder is there afterwards."""
    file, settings, weights = out / SETTINGS_FILE, to_json(config), _weights(config)
    wider = ("scales", "skip_last", "candidates", "pool", "workers")  # no result depends on them
    if not file.exists():
        RunFolder.require_free(out)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, {"settings": settings, WEIGHTS: weights})
        return {}
    stored = checkpoint.read_json(file)
    if not isinstance(stored, dict) or not {"settings", WEIGHTS} <= stored.keys():
        raise CheckpointError(f"'{file}' is damaged: it must hold settings and weights. Choose another folder")
    begun = to_json(from_json(TuneConfig, stored["settings"], str(file)))
    for name, now in weights.items():
        same = stored[WEIGHTS].get(name) == now
        check(same, name, getattr(config, name), f"has changed since '{out}' was begun: choose another folder")
    for name in settings.keys() - set(wider):
        check(begun[name] == settings[name], name, settings[name], f"must be {begun[name]!r}, as in '{out}', which is "
              "begun: or choose another folder")  # fmt: skip
    rows = checkpoint.read_json(out / TRIED_FILE) if (out / TRIED_FILE).exists() else []
    try:
        tried = [from_json(Tried, row, str(out / TRIED_FILE)) for row in rows]
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"'{out / TRIED_FILE}' is damaged: {error}. Remove it, and all is tried again") from error
    return {t.combination: t for t in tried}


def _weights(config: TuneConfig) -> dict[str, str]:
    """What tells apart all that is named by its folder, or by the module that it is in."""
    found = {}
    for name in ("policy", "guide", "scorer"):
        value = getattr(config, name)
        if value and Path(value).exists():
            found[name] = checkpoint.fingerprint(find_policy(Path(value)))
        elif value and ":" in value:
            file = getattr(importlib.import_module(value.split(":")[0]), "__file__", None)
            found[name] = "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _control(config: TuneConfig, policy: Policy, tried: Combination) -> RecedingHorizon:
    """The policy as `tried` lets it act."""
    guided = GuidanceConfig(scorer=config.scorer)
    if tried.scale:
        guided = GuidanceConfig(
            guide=config.guide,
            scale=tried.scale,
            gradient=config.gradient,
            scaling=config.scaling,
            guide_steps=config.guide_steps,
            skip_last=tried.skip_last,
            scorer=config.scorer,
        )
    guide, scorer = steering(guided, policy)
    n = tried.candidates
    inference = replace(config.inference, candidates=n, selection=config.selection if n > 1 else None)
    return RecedingHorizon(policy, inference, guide=guide, scorer=scorer)


def _require_moving(config: TuneConfig, policy: Policy, tried: Combination, obs: TensorObservation) -> None:
    """Raise ConfigError where a guide moves nothing, or cannot be asked."""
    guide = _control(config, policy, tried).guide
    assert guide is not None
    still = departure(policy, obs, guide, config.inference, seed=config.seed).distance == 0
    check(not still, "skip_last", tried.skip_last, "the guide moves nothing: steps must be left that it moves, and "
          "where there is a single one `variance` has none")  # fmt: skip


def _tried(
    config: TuneConfig, policy: Policy, spec: EnvSpec, seed: int, tried: Combination, obs: TensorObservation
) -> Tried:
    control = _control(config, policy, tried)
    result = runs.played(control, spec, config.episodes, seed, config.pool, config.workers, on_progress=lambda _: None)
    left = Departure(0.0, None)
    if control.guide is not None:
        left = departure(policy, obs, control.guide, config.inference, scorer=control.scorer, seed=config.seed)
    half = None if result.return_ci95 is None else (result.return_ci95[1] - result.return_ci95[0]) / 2
    return Tried(
        *tried,
        episodes=config.episodes,
        success=result.success_rate,
        return_mean=result.return_mean,
        return_error=None if half is None else half / Z95,
        latency_ms=result.policy_latency_ms_p50,
        distance=left.distance,
        disagreement=left.disagreement,
        gain=left.gain,
    )


def _write(config: TuneConfig, tried: list[Tried], best: Tried, spec: EnvSpec, out: Path) -> None:
    """Write table and figure."""
    measure, digits = ("success", 2) if spec.has_success else ("return", 0)
    columns = [
        "candidates",
        "skip_last",
        "scale",
        f"{measure} (95 %)",
        "ms per decision",
        "distance",
        "disagreement",
        "gain",
    ]
    rows = []
    for t in tried:
        low, high = t.interval
        score = f"{t.score:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
        away = ["" if value is None else f"{value:.2f}" for value in (t.distance, t.disagreement, t.gain)]
        rows.append([str(t.candidates), str(t.skip_last), f"{t.scale:g}", score, f"{t.latency_ms:.2f}", *away])
    note = NOTE.format(episodes=config.episodes, scaling=config.scaling, gradient=config.gradient)
    command = f"Best here: `{command_of(config, best.combination)}`"
    title = f"Guidance of {spec.id} by {config.guide}"
    write_files(out, "tuning", title, columns, rows, [note, "", command])
    _draw(tried, measure, out / "tuning.png")


def _draw(tried: list[Tried], measure: str, file: Path) -> None:
    """Draw scores and departures against scales, a line for each number of candidates and gate."""
    figure = plots.new_figure(figsize=(12, 3.8))
    scores, costs, away = figure.subplots(1, 3)
    lines = dict.fromkeys((t.candidates, t.skip_last) for t in tried if t.scale)
    for i, (candidates, gate) in enumerate(lines):
        own = sorted(
            (t for t in tried if (t.candidates, t.skip_last) == (candidates, gate) and t.scale), key=lambda t: t.scale
        )
        plain = next(t for t in tried if t.candidates == candidates and not t.scale)
        label = f"{candidates} candidate{'s' if candidates > 1 else ''}" + (f", last {gate} skipped" if gate else "")
        bounds = np.abs(np.array([t.interval for t in own]).T - np.array([t.score for t in own]))
        x = [t.scale for t in own]
        scores.errorbar(x, [t.score for t in own], yerr=bounds, fmt="o-", color=f"C{i}", ms=4, capsize=2, label=label)
        scores.axhline(plain.score, color=f"C{i}", ls="--", lw=1)
        costs.plot([t.latency_ms for t in own], [t.score for t in own], "o", color=f"C{i}", ms=4)
        costs.plot([plain.latency_ms], [plain.score], "*", color=f"C{i}", ms=11)
        if candidates == min(t.candidates for t in tried):
            away.plot(x, [t.distance for t in own], "o-", color=f"C{i}", ms=4, label=f"distance, last {gate} skipped")
            for name, style, label in (
                ("disagreement", "s:", "critics' disagreement"),
                ("gain", "^--", "gain by critic"),
            ):
                if all(getattr(t, name) is not None for t in own):
                    away.plot(x, [getattr(t, name) for t in own], style, color=f"C{i}", ms=4, label=label)
    for axis, label, name in (
        (scores, "scale (dashed: not guided)", measure),
        (costs, "milliseconds per decision (star: not guided)", measure),
        (away, "scale", "times the policy's own"),
    ):
        axis.set_xlabel(label)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    for axis in (scores, away):
        axis.set_xscale("log" if all(t.scale >= 0 for t in tried) else "linear")
        axis.legend(fontsize=7)
    away.axhline(1, color="grey", lw=0.8)
    figure.savefig(file, dpi=120)


NOTE = (
    "{episodes} episodes each, the same for all; gradient {gradient}, scaling {scaling}. Distance: of guided chunks "
    "from those of the same noise, over that of the policy's own from each other. Disagreement: of the critic's "
    "networks about guided chunks, over that about the policy's own. Gain: of the critic's value, over its differences "
    "among the policy's own. The best of many is somewhat worse on others."
)
"""What the table's columns mean."""
