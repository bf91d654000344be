"""Experts that stable-baselines3 trains: PPO on batched environments, and any of its models to demonstrate a task.

    OUT/expert.zip, expert_vecnormalize.pkl     the best policy that was seen
    OUT/medium.zip, medium_vecnormalize.pkl     the one nearest a third of its return
    OUT/expert.json                             the settings
    OUT/returns.json                            every evaluation on the way
    OUT/checkpoints/                            the policies of these evaluations

Files of stable-baselines3 hold pickles: open only those you trust.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dprl import checkpoint
from dprl.config import to_json
from dprl.cores import one_thread
from dprl.errors import EnvError, MissingDependencyError, check
from dprl.experiments.runs import ExpertConfig, Seen
from dprl.interop.sb3 import ChunkedVecEnv
from dprl.seeding import derive_seed
from dprl.spec import EnvSpec, FloatArray, build, env_seeds, resolve
from dprl.training.progress import ProgressBar

try:
    from stable_baselines3 import PPO, SAC, TD3
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.save_util import load_from_zip_file
    from stable_baselines3.common.vec_env import VecNormalize
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv
except ImportError as error:
    raise MissingDependencyError("stable-baselines3", "sb3", "an expert of stable-baselines3") from error

RETURNS_FILE, SETTINGS_FILE = "returns.json", "expert.json"
MEDIUM_SHARE = 1 / 3
"""Of the best return: what a `medium` policy reaches."""
ENDLESS = 10**12
"""Timesteps: training ends by the clock."""


def train_expert(config: ExpertConfig, out: Path, *, progress_bar: bool = True) -> tuple[Seen, Seen]:
    """Train for `config.minutes` in the folder `out`, or go on with what is there, and choose expert and medium.

    Returns how expert and medium did. A training that goes on from its newest checkpoint begins new episodes there: it
    is as good as one that never stopped, but not the same.
    """
    spec, checkpoints = resolve(config.env), out / "checkpoints"
    check(not spec.cameras, "env", config.env, "must be seen by its state: PPO's networks here see no images")
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / SETTINGS_FILE, to_json(config))
    seen = seen_in(out) if (out / RETURNS_FILE).exists() else []
    if not seen or seen[-1].minutes < config.minutes:
        env, eval_env = _environments(spec, config, "expert"), _environments(spec, config, "expert evaluations")
        try:
            with one_thread(), ProgressBar("PPO, minutes", round(config.minutes), shown=progress_bar) as bar:
                model = _model(env, config, checkpoints / seen[-1].name if seen else None)
                watch = _Watch(eval_env, config, out, seen, bar)
                model.learn(ENDLESS, callback=watch, reset_num_timesteps=not seen)
        finally:
            env.close()
            eval_env.close()
    return choose(out, seen)


def choose(out: Path, seen: list[Seen]) -> tuple[Seen, Seen]:
    """Copy the best policy to ``expert`` and the one before it nearest a third of its return to ``medium``."""
    best, medium = best_and_medium(seen)
    for name, row in (("expert", best), ("medium", medium)):
        for source, target in zip(_files(out / "checkpoints" / row.name), _files(out / name), strict=True):
            shutil.copyfile(source, target)
    return best, medium


def chosen(out: Path) -> tuple[Seen, Seen]:
    """Return how the expert and the medium policy of a training in the folder `out` did."""
    return best_and_medium(seen_in(out))


def seen_in(out: Path) -> list[Seen]:
    """Return every evaluation of a training in the folder `out`."""
    return [Seen(**row) for row in checkpoint.read_json(out / RETURNS_FILE)]


def best_and_medium(seen: list[Seen]) -> tuple[Seen, Seen]:
    """Return the best evaluation, and that before it nearest a third of its return."""
    best = max(seen, key=lambda row: row.return_mean)
    earlier = [row for row in seen if row.timesteps <= best.timesteps]
    start = min(0.0, seen[0].return_mean)  # where returns are negative, a third of the way
    aim = start + MEDIUM_SHARE * (best.return_mean - start)
    return best, min(earlier, key=lambda row: abs(row.return_mean - aim))


class SB3Expert:
    """Acts as a saved model of stable-baselines3 does, without its exploration noise; see `dprl.envs.experts`."""

    def __init__(self, path: Path, env_id: str) -> None:
        """Load ``NAME.zip``, and ``NAME_vecnormalize.pkl`` where that lies beside it.

        Raises:
            EnvError: there is no such file, it holds no model, or one of other sizes than the environment's.
        """
        model_file, normalize_file = _files(path.with_suffix(""))
        if not model_file.is_file():
            raise EnvError(f"the expert '{path}' does not exist: name a .zip of stable-baselines3")
        self._policy = _load(model_file).policy
        spec = resolve(env_id)
        shapes, own = (
            (self._policy.observation_space.shape, self._policy.action_space.shape),
            ((spec.observation_size,), (spec.action_size,)),
        )
        if shapes != own:
            raise EnvError(f"the expert '{path}' maps {shapes[0]} to {shapes[1]}, but '{env_id}' {own[0]} to {own[1]}")
        self._normalize: VecNormalize | None = None
        if normalize_file.is_file():
            env = ChunkedVecEnv(build(spec, [0]))
            self._normalize = VecNormalize.load(str(normalize_file), env)
            env.close()

    def act(self, observation: npt.NDArray[Any]) -> FloatArray:
        """Return actions (n, A) for states (n, D)."""
        shown = observation if self._normalize is None else self._normalize.normalize_obs(np.array(observation))
        with one_thread():
            actions, _ = self._policy.predict(shown, deterministic=True)
        return np.asarray(actions, np.float32)


def _load(file: Path) -> BaseAlgorithm:
    """The model in a file of any of stable-baselines3's algorithms for continuous actions; none says whose it is."""
    try:
        data, _, _ = load_from_zip_file(file, device="cpu")
    except ValueError:
        data = None
    if not data or "policy_class" not in data:
        raise EnvError(f"'{file}' holds no model of stable-baselines3")
    algorithm = data["policy_class"].__module__.removeprefix("stable_baselines3.").split(".")[0]
    kinds: dict[str, type[BaseAlgorithm]] = {"sac": SAC, "td3": TD3, "common": PPO}
    if algorithm not in kinds:
        raise EnvError(f"'{file}' holds a policy of a class of its own, {data['policy_class']}: write an expert for it")
    return kinds[algorithm].load(file, device="cpu")


def expert(path: str, env_id: str) -> SB3Expert:
    """Return the expert in the file `path`."""
    return SB3Expert(Path(path), env_id)


class _Watch(BaseCallback):
    """Evaluates, keeps what was evaluated, and ends the training when its time is up."""

    def __init__(self, env: VecEnv, config: ExpertConfig, out: Path, seen: list[Seen], bar: ProgressBar) -> None:
        super().__init__()
        self._env, self._config, self._out, self._seen, self._bar = env, config, out, seen, bar
        self._start = time.perf_counter() - 60 * (seen[-1].minutes if seen else 0.0)

    def _on_step(self) -> bool:
        minutes = (time.perf_counter() - self._start) / 60
        since = self.num_timesteps - (self._seen[-1].timesteps if self._seen else 0)
        finished = minutes >= self._config.minutes
        if since >= self._config.eval_every or finished:
            self._evaluate()
        self._bar.update(int(min(minutes, self._config.minutes)), {})
        return not finished

    def _evaluate(self) -> None:
        training = self.model.get_env()
        assert isinstance(training, VecNormalize)
        assert isinstance(self._env, VecNormalize)
        self._env.obs_rms = training.obs_rms
        returns, _ = evaluate_policy(
            self.model, self._env, self._config.eval_episodes, return_episode_rewards=True, warn=False
        )
        minutes = (time.perf_counter() - self._start) / 60
        row = Seen(self.num_timesteps, minutes, float(np.mean(returns)), float(np.std(returns)))
        model_file, normalize_file = _files(self._out / "checkpoints" / row.name)
        self.model.save(model_file)
        training.save(str(normalize_file))
        self._seen.append(row)
        checkpoint.write_json(self._out / RETURNS_FILE, [asdict(seen) for seen in self._seen])
        self._bar.note(f"return {row.return_mean:.0f} at {row.timesteps:,} steps")


def _model(env: VecNormalize, config: ExpertConfig, last: Path | None) -> PPO:
    """Make the learner, or load it as it was."""
    if last is not None:
        model_file, normalize_file = _files(last)
        env = VecNormalize.load(str(normalize_file), env.venv)
        return PPO.load(model_file, env, device="cpu")
    sizes = [config.hidden_size] * 2
    networks = {"net_arch": {"pi": sizes, "vf": sizes}, "log_std_init": config.log_std, "activation_fn": nn.Tanh}
    return PPO(
        "MlpPolicy", env, learning_rate=config.learning_rate, n_steps=config.n_steps, batch_size=config.batch_size,
        n_epochs=config.n_epochs, gamma=config.gamma, gae_lambda=config.gae_lambda, clip_range=config.clip_range,
        policy_kwargs=networks, seed=derive_seed(config.seed, "expert model") % 2**32, device="cpu",
    )  # fmt: skip


def _environments(spec: EnvSpec, config: ExpertConfig, purpose: str) -> VecNormalize:
    """Environments that step one action at a time; for training (`purpose` "expert") or evaluation."""
    training = purpose == "expert"
    n_envs = config.n_envs if training else config.eval_episodes
    env = ChunkedVecEnv(build(spec, env_seeds(config.seed, n_envs, purpose=purpose)))
    return VecNormalize(env, training=training, norm_reward=training, gamma=config.gamma)


def _files(stem: Path) -> tuple[Path, Path]:
    """The files of a model and of what normalises its observations."""
    return stem.with_name(f"{stem.name}.zip"), stem.with_name(f"{stem.name}_vecnormalize.pkl")
