"""Receding-horizon control: queues, histories, temporal ensembling and warm starts, each done by hand as well."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.diffusion import SolverConfig, n_draws, solve, solver_steps
from dprl.errors import ConfigError
from dprl.networks import MLPConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, InferenceConfig, Policy, RecedingHorizon
from dprl.rollout import evaluate, evaluation
from dprl.seeding import torch_generator
from dprl.spec import EnvSpec, build, env_seeds, with_n_obs_steps
from tests.toys import reach_spec

H, E, A, D = 4, 2, 1, 2
CONFIG = DiffusionConfig(horizon=H, n_action_steps=E, num_train_timesteps=6, denoiser=MLPConfig(hidden_size=16))
FLOW = replace(CONFIG, schedule="rectified_flow", prediction_type="velocity")
SOLVERS = {
    "default": InferenceConfig(),
    "ddpm-3": InferenceConfig("ddpm", 3),
    "ddim": InferenceConfig("ddim", 4),
    "ddim-eta": InferenceConfig("ddim", 3, 0.5, "trailing"),
    "dpmsolver++": InferenceConfig("dpmsolver++", 4),
    "sde-dpmsolver++": InferenceConfig("sde-dpmsolver++", 4),
    "cold": InferenceConfig("ddpm", temperature=0.5),
    "euler": InferenceConfig("euler", 4),
}


def make_policy(config: DiffusionConfig = CONFIG, seed: int = 0) -> DiffusionPolicy:
    policy = DiffusionPolicy(Features(D, A), config, seed=seed)
    policy.action_normalizer.fit(torch.tensor([[-1.0], [0.5]]))
    return policy


def policy_for(inference: InferenceConfig, **changes: object) -> DiffusionPolicy:
    return make_policy(replace(FLOW if inference.solver == "euler" else CONFIG, **changes))


class Numbered(DiffusionPolicy):
    """Its plans are random numbers; it keeps what it saw and what it planned."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(Features(D, A), config)
        self.seen: list[Tensor] = []
        self.planned: list[Tensor] = []
        self.random = torch.Generator().manual_seed(0)

    def draw(self, obs: Tensor, *_: object, **__: object) -> Tensor:
        self.seen.append(obs.clone())
        self.planned.append(torch.rand(len(obs), H, A, generator=self.random))
        return self.planned[-1]


def observations(steps: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (steps, n, D)).astype(np.float32)


STARTS = np.array(
    [[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]], bool
)
"""(steps, environments) where episodes begin."""


# ------------------------------------------------------------------------------------------------ queues, histories


@pytest.mark.parametrize("n_action_steps", [1, 2, 3, H, None])
def test_each_environment_has_a_queue_of_its_own(n_action_steps: int | None) -> None:
    policy = Numbered(replace(CONFIG, n_action_steps=n_action_steps))
    executed, state = n_action_steps or H, None
    queues: list[list[float]] = [[], [], []]
    for obs, start in zip(observations(9, 3), STARTS, strict=True):
        decisions = len(policy.planned)
        action, state = policy.predict(obs, state, start)
        due = [i for i in range(3) if start[i] or not queues[i]]
        assert len(policy.planned) == decisions + bool(due)
        for row, i in enumerate(due):
            queues[i] = policy.planned[-1][row, :executed, 0].tolist()
        assert action[:, 0].tolist() == [queue.pop(0) for queue in queues]


@pytest.mark.parametrize("n_obs_steps", [1, 2, 3])
def test_it_sees_the_latest_observations_of_the_episode(n_obs_steps: int) -> None:
    """At each decision; before an episode's second observation its first one stands for those missing."""
    policy = Numbered(replace(CONFIG, n_action_steps=1, n_obs_steps=n_obs_steps))
    state, episodes = None, [[], [], []]
    for obs, start in zip(observations(9, 3), STARTS, strict=True):
        _, state = policy.predict(obs, state, start)
        for i in range(3):
            episodes[i] = [obs[i]] if start[i] else [*episodes[i], obs[i]]
            expected = ([episodes[i][0]] * n_obs_steps + episodes[i])[-n_obs_steps:]
            if len(episodes[i]) < n_obs_steps:
                expected = [episodes[i][0]] * (n_obs_steps - len(episodes[i])) + episodes[i]
            np.testing.assert_array_equal(policy.seen[-1][i], expected)


def test_observations_between_decisions_are_remembered() -> None:
    policy = Numbered(replace(CONFIG, n_obs_steps=2))
    state = None
    for step in range(5):
        _, state = policy.predict(np.full((1, D), step), state, np.array([step == 0]))
    assert [seen[0, :, 0].tolist() for seen in policy.seen] == [[0, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["ensembling", "warm-start", *SOLVERS])
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_a_batch_is_the_same_as_each_alone(name: str, n_obs_steps: int) -> None:
    """With the same draws for every row: deterministic."""
    special = {
        "ensembling": InferenceConfig(temporal_ensembling=0.3),
        "warm-start": InferenceConfig("ddim", 4, warm_start_steps=2),
    }
    inference = (SOLVERS | special)[name]
    policy = policy_for(inference, n_obs_steps=n_obs_steps)
    sequence = observations(9, 3)

    def play(rows: list[int]) -> np.ndarray:
        state, actions = None, []
        for obs, start in zip(sequence, STARTS, strict=True):
            action, state = policy.predict(obs[rows], state, start[rows], True, inference=inference)
            actions.append(action)
        return np.stack(actions)

    batch = play([0, 1, 2])
    for i in range(3):
        np.testing.assert_allclose(play([i])[:, 0], batch[:, i], atol=1e-5)
    np.testing.assert_allclose(play([2, 0])[:, 1], batch[:, 0], atol=1e-5)
    assert np.abs(np.diff(batch, axis=1)).max() > 1e-3


def test_a_state_of_other_environments_is_refused() -> None:
    policy = make_policy()
    _, state = policy.predict(np.zeros((3, D)))
    with pytest.raises(ConfigError, match=r"the state is of 3 environments"):
        policy.predict(np.zeros((2, D)), state)


@pytest.mark.parametrize("features", [Features(D, A + 1), Features(D + 1, A)])
def test_a_state_of_another_policy_is_not_executed(features: Features) -> None:
    """Of other actions it is decided anew; of other observations nothing is remembered."""
    _, state = DiffusionPolicy(features, CONFIG).predict(np.zeros((3, features.observation_size)))
    policy = make_policy()
    if features.observation_size != D:
        with pytest.raises(ConfigError, match=r"state = .*: is of another policy"):
            policy.predict(np.zeros((3, D)), state)
        return
    action, _ = policy.predict(np.zeros((3, D)), state, deterministic=True)
    np.testing.assert_array_equal(action, policy.predict(np.zeros((3, D)), deterministic=True)[0])


def test_a_plan_of_another_horizon_is_decided_anew() -> None:
    _, state = DiffusionPolicy(Features(D, A), replace(CONFIG, horizon=2 * H)).predict(np.zeros((3, D)))
    action, _ = make_policy().predict(np.zeros((3, D)), state, deterministic=True)
    np.testing.assert_array_equal(action, make_policy().predict(np.zeros((3, D)), deterministic=True)[0])


def test_a_solver_alone_is_no_way_to_act() -> None:
    with pytest.raises(ConfigError, match=r"inference = SolverConfig\(.*: must be an InferenceConfig"):
        make_policy().predict(np.zeros((3, D)), inference=SolverConfig("ddim"))


# ---------------------------------------------------------------------------------------------- temporal ensembling


@pytest.mark.parametrize("decay", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("n_action_steps", [1, 3])
def test_ensembling_is_the_weighted_mean_of_all_plans_for_the_step(decay: float, n_action_steps: int) -> None:
    """Brute force: every plan of the episode that reaches to this step, the i-th oldest weighted exp(-decay i)."""
    policy = Numbered(replace(CONFIG, n_action_steps=n_action_steps))
    inference, state = InferenceConfig(temporal_ensembling=decay), None
    began = np.zeros(3, int)
    for step, (obs, start) in enumerate(zip(observations(9, 3), STARTS, strict=True)):
        action, state = policy.predict(obs, state, start, inference=inference)
        assert len(policy.planned) == step + 1, "it decides at every step"
        assert len(policy.planned[-1]) == 3
        began[start] = step
        for i in range(3):
            oldest = max(began[i], step - H + 1)
            said = [float(policy.planned[made][i, step - made, 0]) for made in range(oldest, step + 1)]
            weights = [math.exp(-decay * age) for age in range(len(said))]
            expected = sum(w * a for w, a in zip(weights, said, strict=True)) / sum(weights)
            assert float(action[i, 0]) == pytest.approx(expected, rel=1e-5)


def test_ensembling_does_not_change_the_state_passed_in() -> None:
    policy, inference = make_policy(), InferenceConfig(temporal_ensembling=0.1)
    sequence = observations(3, 2)
    _, first = policy.predict(sequence[0], None, None, True, inference=inference)
    once, _ = policy.predict(sequence[1], first, None, True, inference=inference)
    policy.predict(sequence[2], first, np.array([True, False]), True, inference=inference)
    again, _ = policy.predict(sequence[1], first, None, True, inference=inference)
    np.testing.assert_array_equal(once, again)


# ------------------------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_warm_start_denoises_the_shifted_plan(name: str, steps: int) -> None:
    """By hand: the last plan, less what was executed, its end repeated, noised to the first of the last steps."""
    inference = replace(SOLVERS[name], warm_start_steps=steps)
    policy = policy_for(inference)
    control, obs = RecedingHorizon(policy, inference), torch.from_numpy(observations(2, 3))[:, :, None]
    generator, by_hand = torch_generator(0), torch_generator(0)
    first, memory = control.plan(obs[0], control.start(3), generator)
    second, memory = control.plan(obs[1], memory, generator)

    config, normalizer = policy.config, policy.action_normalizer
    solver = solver_steps(
        policy.schedule.config,
        SolverConfig(inference.solver, inference.num_inference_steps, inference.eta, inference.timestep_spacing),
    )

    def denoise(obs: Tensor, last_steps: int, plan: Tensor | None) -> Tensor:
        part = solver[-last_steps:]
        draws = torch.randn(n_draws(part), 3, H, A, generator=by_hand)
        x = draws[0]
        if plan is not None:
            signal, noise = (float(table[part[0].timestep]) for table in policy.schedule.config.levels())
            x = signal * normalizer.normalize(plan) + noise * draws[0]
        condition = policy.condition(obs)

        def predict(x: Tensor, t: int) -> Tensor:
            prediction = policy.base(x, torch.tensor([t]), condition)
            return policy.schedule.predict_clean(x, prediction, t, config.clip_sample)

        with torch.no_grad():
            return normalizer.unnormalize(solve(part, predict, x, draws[1:], inference.temperature))

    plan = denoise(obs[0], len(solver), None)
    torch.testing.assert_close(first, plan[:, :E])
    shifted = torch.cat([plan[:, E:], plan[:, -1:].repeat(1, E, 1)], dim=1)
    expected = denoise(obs[1], steps, shifted)
    torch.testing.assert_close(second, expected[:, :E])
    torch.testing.assert_close(memory.plans[:, 0], expected)
    assert torch.equal(generator.get_state(), by_hand.get_state()), "it draws what the steps taken need, no more"


def test_an_episode_starts_cold_among_warm_ones() -> None:
    inference = InferenceConfig("ddim", 4, warm_start_steps=1)
    policy = make_policy()
    counted: list[tuple[int, bool]] = []
    draw = policy.draw

    def spy(obs: Tensor, *args: object, plan: Tensor | None = None, **kwargs: object) -> Tensor:
        counted.append((len(obs), plan is not None))
        return draw(obs, *args, plan=plan, **kwargs)

    policy.draw = spy
    state, no = None, [False] * 3
    starts = [[True] * 3, [False, True, False], no, no, [False, True, False]]
    for obs, start in zip(observations(5, 3), starts, strict=True):
        _, state = policy.predict(obs, state, np.array(start), inference=inference)
    alone = [(3, False), (1, False), (2, True), (1, True)]
    assert counted == [*alone, (1, False), (2, True)]


# ------------------------------------------------------------------------------------------------- with environments


@pytest.mark.parametrize("name", ["ensembling", "warm-start", *SOLVERS])
@pytest.mark.parametrize(("n_action_steps", "n_obs_steps"), [(E, 1), (3, 2), (None, 1)])
def test_evaluating_by_chunks_is_stepping_predict(
    name: str, n_action_steps: int | None, n_obs_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one environment, where both draw the same noise: every episode has the same return and length."""
    special = {
        "ensembling": InferenceConfig(temporal_ensembling=0.3),
        "warm-start": InferenceConfig("ddim", 4, warm_start_steps=2),
    }
    inference = (SOLVERS | special)[name]
    policy = policy_for(inference, n_action_steps=n_action_steps, n_obs_steps=n_obs_steps)
    monkeypatch.setattr(evaluation, "MAX_ENVS", 1)
    spec, episodes, seed = short_reach(), 3, 5
    result = evaluate(policy, spec, episodes, seed, inference=inference)

    env = build(with_n_obs_steps(spec, 1), env_seeds(seed, 1, purpose="evaluation"))
    generator, state, returns, lengths = torch_generator(seed, "evaluation", 0), None, [], []
    for _ in range(episodes):
        observation, start = env.reset()[:, -1], True
        while True:
            action, state = policy.predict(
                observation, state, np.array([start]), generator=generator, inference=inference
            )
            step = env.step_chunk(action[:, None], autoreset=False)
            observation, start = step.observation[:, -1], False
            if step.ended[0]:
                returns.append(float(step.episode_return[0]))
                lengths.append(int(step.episode_length[0]))
                break
    assert result.return_mean == pytest.approx(np.mean(returns), rel=1e-6)
    assert result.episode_length_mean == np.mean(lengths)


def short_reach() -> EnvSpec:
    """Dense, so that every action counts; not a multiple of the chunks."""
    return replace(reach_spec(), reward="dense", max_episode_steps=11)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_acts(name: str) -> None:
    inference = SOLVERS[name]
    policy = policy_for(inference)
    first, _ = policy.predict(np.zeros((3, D)), generator=torch_generator(0), inference=inference)
    again, _ = policy.predict(np.zeros((3, D)), generator=torch_generator(0), inference=inference)
    other, _ = policy.predict(np.zeros((3, D)), generator=torch_generator(1), inference=inference)
    assert first.shape == (3, A)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    deterministic = [policy.predict(np.zeros((3, D)), deterministic=True, inference=inference)[0] for _ in range(2)]
    np.testing.assert_array_equal(*deterministic)
    np.testing.assert_allclose(deterministic[0], deterministic[0][:1].repeat(3, 0), atol=1e-6)
    result = evaluate(policy, short_reach(), 4, seed=0, inference=inference)
    assert math.isfinite(result.return_mean)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "inference", [InferenceConfig(warm_start_steps=7), InferenceConfig("ddim", 3, warm_start_steps=4)]
)
def test_more_warm_steps_than_the_solver_has_are_refused(inference: InferenceConfig) -> None:
    n, steps = inference.warm_start_steps, inference.num_inference_steps or 6
    with pytest.raises(ConfigError, match=rf"warm_start_steps = {n}: must be at most the solver's steps, .* {steps}"):
        make_policy().predict(np.zeros((1, D)), inference=inference)
    with pytest.raises(ConfigError, match=rf"warm_start_steps = {n}"):
        RecedingHorizon(make_policy(), inference)


def test_a_warm_start_and_ensembling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"warm_start_steps = 1: cannot be combined with temporal_ensembling"):
        InferenceConfig(temporal_ensembling=0.1, warm_start_steps=1)


@pytest.mark.parametrize(
    "inference",
    [
        InferenceConfig("ddim"),
        InferenceConfig("ddim", eta=0.5),
        InferenceConfig(num_inference_steps=3),
        InferenceConfig(timestep_spacing="leading"),
        InferenceConfig(warm_start_steps=1),
    ],
    ids=["solver", "eta", "num_inference_steps", "timestep_spacing", "warm_start_steps"],
)
@pytest.mark.parametrize("kind", [name for name, kind in Policy.kinds.items() if not issubclass(kind, DiffusionPolicy)])
def test_what_only_diffusion_policies_have_is_refused_elsewhere(kind: str, inference: InferenceConfig) -> None:
    policy = Policy.kinds[kind](Features(D, A))
    with pytest.raises(ConfigError, match=rf"policies of type {kind} have none"):
        policy.predict(np.zeros((1, D)), inference=inference)


def test_a_temperature_that_would_change_nothing_is_refused() -> None:
    hot, policy = InferenceConfig(temperature=0.5), make_policy()
    with pytest.raises(ConfigError, match=r"temperature = 0.5: policies of type mse draw nothing"):
        Policy.kinds["mse"](Features(D, A)).check_inference(hot)
    with pytest.raises(ConfigError, match=r"temperature = 0.5: the solver draws no noise after the initial one"):
        policy.check_inference(replace(hot, solver="ddim"))
    for fits in (replace(hot, solver="ddim", eta=0.5), replace(hot, solver="ddpm"), replace(hot, solver="ddpm",
                 num_inference_steps=1), InferenceConfig("ddim")):  # fmt: skip
        policy.check_inference(fits)


@pytest.mark.parametrize("kind", [kind for kind in Policy.kinds if kind != "planner"])
def test_every_policy_can_be_ensembled(kind: str) -> None:
    policy = Policy.kinds[kind](Features(D, A))
    inference, state = InferenceConfig(temporal_ensembling=0.1), None
    for obs in observations(4, 2):
        action, state = policy.predict(obs, state, None, True, inference=inference)
        assert action.shape == (2, A)
        assert np.isfinite(action).all()
