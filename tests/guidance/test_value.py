"""Guides of a policy's denoising steps: what they move, by how much, and what they refuse."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dprl.diffusion import CLEAN, Level
from dprl.errors import ConfigError
from dprl.guidance import DenoisingStep, DiffuserGuide, Guides, Reward, ValueGuide
from dprl.policy import CriticConfig, DiffusionPolicy
from dprl.policy.critic import ChunkCritic
from dprl.seeding import torch_generator
from tests.policy.small import small_policy

OBS = torch.linspace(-1, 2, 24).view(4, 2, 3)
SOLVERS = {"ddpm": {}, "ddim": {"solver": "ddim"}, "dpmsolver++": {"solver": "dpmsolver++", "num_inference_steps": 2}}


class Near:
    """Worth more the nearer all actions are to a place, in the environment's units; of noisy ones in normalised."""

    def __init__(self, place: float = 0.5) -> None:
        self.place, self.asked = place, []

    def __repr__(self) -> str:  # in the names of tests, which must be the same in every process
        return f"Near({self.place})"

    def at(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda actions: self.value(obs, actions)

    def noisy_at(self, obs: Tensor) -> Callable[[Tensor, int], Tensor]:
        return lambda noisy, timestep: -0.5 * ((noisy - self.place) ** 2).sum((1, 2))

    def value(self, obs: Tensor, actions: Tensor) -> Tensor:
        self.asked.append(actions.detach().clone())
        return -0.5 * ((actions - self.place) ** 2).sum((1, 2))


def sampled(policy: DiffusionPolicy, guide: object = None, **how: object) -> Tensor:
    return policy.sample(OBS, generator=torch_generator(0, "test"), guide=guide, **how)


def a_step(**changes: object) -> DenoisingStep:
    """Whose network says x̂_0 = 2 x_t."""
    step = DenoisingStep(
        OBS, torch.full((4, 3, 2), 0.1), 2, 5, Level(0.6, 0.8), Level(0.8, 0.6), lambda x: 2 * x, lambda clean: clean
    )
    return replace(step, **changes)


@pytest.mark.parametrize("how", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    "guide",
    [
        ValueGuide(Near(), 0.0),
        ValueGuide(Near(), 0.0, "through", "score"),
        ValueGuide(Near(), 0.0, "noisy"),
        DiffuserGuide(Near(), 0.0),
        Guides(()),
        ValueGuide(Near(), 5.0, skip_last=99),
    ],
    ids=repr,
)
def test_a_guide_that_does_nothing_changes_no_bit(guide: object, how: dict[str, object]) -> None:
    policy = small_policy("diffusion")
    assert sampled(policy, guide, **how).equal(sampled(policy, **how))


@pytest.mark.parametrize("how", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("gradient", ["held", "through", "noisy"])
@pytest.mark.parametrize("scaling", ["variance", "score", "noise", "constant", "normalized"])
def test_value_rises(gradient: str, scaling: str, how: dict[str, object]) -> None:
    policy, value = small_policy("diffusion"), Near(1.0)
    before, after = (
        value.value(OBS, sampled(policy, guide, **how)).mean()
        for guide in (None, ValueGuide(value, 0.2, gradient, scaling))
    )
    assert after > before


@pytest.mark.parametrize(
    ("scaling", "factor"), [("score", 0.64 / 0.6), ("variance", 0.36 / 0.8), ("noise", 0.8), ("constant", 1.0)]
)
def test_what_the_clean_actions_are_moved_by(scaling: str, factor: float) -> None:
    """Of x̂_0 = 0.2 = 2 x_t towards 0.5: g is 0.3 / α where the network is held, 0.3 times its slope 2 through it."""
    for gradient, g in (("held", 0.3 / 0.6), ("through", 0.6), ("noisy", 0.4)):
        step = ValueGuide(Near(), 0.1, gradient, scaling).shift(a_step())
        torch.testing.assert_close(step.clean, torch.full((4, 3, 2), 0.2 + 0.1 * factor * g))
        assert step.noisy.equal(a_step().noisy)


def test_normalized_moves_as_far_whatever_the_values_units() -> None:
    class Thousandfold(Near):
        def value(self, obs: Tensor, actions: Tensor) -> Tensor:
            return 1000 * super().value(obs, actions)

    moved = [ValueGuide(v, 0.1, "held", "normalized").shift(a_step()).clean for v in (Near(), Thousandfold())]
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0], torch.full((4, 3, 2), 0.2 + 0.1 * 0.8))


def test_a_flat_value_moves_nothing() -> None:
    flat = Reward(lambda obs, actions: 0 * actions.sum((1, 2)))
    for scaling in ("normalized", "score"):
        assert ValueGuide(flat, 1.0, "held", scaling).shift(a_step()).clean.equal(a_step().clean)


def test_substeps_go_on_from_where_the_last_led() -> None:
    value = Near()
    step = ValueGuide(value, 0.06, "held", "constant", n_steps=2).shift(a_step())
    first = 0.2 + 0.1 * 0.3
    torch.testing.assert_close(value.asked[1], torch.full((4, 3, 2), first))
    torch.testing.assert_close(step.clean, torch.full((4, 3, 2), first + 0.1 * (0.5 - first)))
    step = ValueGuide(Near(), 0.05, "through", "constant", n_steps=2).shift(a_step())
    torch.testing.assert_close(step.clean, torch.full((4, 3, 2), first + 0.1 * (0.5 - first)))


def test_the_network_is_taken_once_where_it_is_differentiated() -> None:
    calls = []

    def network(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return 2 * x

    for gradient, taken in (("held", [False]), ("through", [True]), ("noisy", [False])):
        calls.clear()
        _ = ValueGuide(Near(), 0.1, gradient).shift(a_step(predict=network)).clean
        assert calls == taken


def test_every_substep_is_clamped_and_what_is_clamped_comes_back() -> None:
    high = a_step(predict=lambda x: 30 * x, allowed=lambda x: x.clamp(-1, 1))  # x̂_0 = 3, clamped to 1
    assert high.clean.equal(torch.ones(4, 3, 2))
    assert ValueGuide(Near(9.0), 5.0, "through").shift(high).clean.equal(torch.ones(4, 3, 2))
    back = ValueGuide(Near(0.5), 0.1 / 30, "through", "constant").shift(high).clean
    torch.testing.assert_close(back, torch.full((4, 3, 2), 1 - 0.05))


def test_the_last_steps_are_left_alone() -> None:
    guide = ValueGuide(Near(), 0.1, skip_last=2)
    assert not guide.shift(a_step(k=2)).clean.equal(a_step().clean)
    for k in (0, 1):
        step = a_step(k=k)
        assert guide.shift(step) is step
    last = ValueGuide(Near(), 0.1, scaling="variance").shift(a_step(following=CLEAN))
    assert last.clean.equal(a_step().clean)  # ddpm's last step has no variance


def test_nothing_is_moved_where_nothing_is_known() -> None:
    for gradient in ("held", "through", "noisy"):
        assert ValueGuide(Near(), 0.1, gradient, "score").shift(a_step(level=Level(0.0, 1.0))).moved is None


def test_diffusers_guide_moves_what_the_network_sees() -> None:
    """X += scale β̃ ∇J, twice; β̃ = (1 - ᾱ') / (1 - ᾱ) β, β = 1 - ᾱ / ᾱ'."""
    variance = 0.36 / 0.64 * (1 - 0.36 / 0.64)
    step = DiffuserGuide(Near(), 0.1).shift(a_step())
    x = 0.1
    for _ in range(2):
        x += 0.1 * variance * (0.5 - x)
    torch.testing.assert_close(step.noisy, torch.full((4, 3, 2), x))
    torch.testing.assert_close(step.clean, torch.full((4, 3, 2), 2 * x))
    plain = DiffuserGuide(Near(), 0.1, by_variance=False, n_steps=1).shift(a_step())
    torch.testing.assert_close(plain.noisy, torch.full((4, 3, 2), 0.1 + 0.1 * 0.4))
    assert DiffuserGuide(Near(), 0.1, skip_last=3).shift(a_step()).noisy.equal(a_step().noisy)


def test_guides_are_composed_in_order() -> None:
    first, second = DiffuserGuide(Near(), 0.1), ValueGuide(Near(), 0.1)
    both = Guides((first, second)).shift(a_step())
    torch.testing.assert_close(both.clean, second.shift(first.shift(a_step())).clean)
    with pytest.raises(ConfigError, match="must come before"):
        Guides((second, first)).shift(a_step())


def test_samples_are_guided_in_the_environments_units() -> None:
    policy, value = small_policy("diffusion"), Near()
    policy.action_normalizer.fit(torch.tensor([[-3.0, 0.0], [5.0, 1.0]]))
    sampled(policy, ValueGuide(value, 1e-3))
    low, high = torch.tensor([-3.0, 0.0]), torch.tensor([5.0, 1.0])
    for actions in value.asked:
        assert (actions >= low - 1e-5).all()
        assert (actions <= high + 1e-5).all()
    assert max(float(actions.max()) for actions in value.asked) > 1


def test_candidates_are_each_guided_and_no_weight_gets_a_gradient() -> None:
    policy = small_policy("diffusion")
    critic = ChunkCritic(policy, CriticConfig(hidden_size=64))
    policy.scorer = critic
    value = Near()
    sampled(policy, ValueGuide(value, 0.1, "through"), candidates=5)
    assert {len(actions) for actions in value.asked} == {20}
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueGuide(object()), r"of = 'object': must have a method at\(obs\) for gradient = held"),
        (lambda: ValueGuide(object(), gradient="noisy"), "noisy_at"),
        (lambda: DiffuserGuide(object()), "noisy_at"),
        (lambda: ValueGuide(Near(), gradient="noisy", n_steps=2), "n_steps = 2: must be 1 with gradient = noisy"),
        (lambda: ValueGuide(Near(), n_steps=0), "n_steps = 0"),
        (lambda: ValueGuide(Near(), skip_last=-1), "skip_last = -1"),
        (lambda: ValueGuide(Near(), scale=float("nan")), "scale"),
        (lambda: ValueGuide(Near(), gradient="hold"), "gradient = 'hold'"),
        (lambda: ValueGuide(Near(), scaling="std"), "scaling = 'std'"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_value_that_is_none_is_refused() -> None:
    for nothing, shown in ((lambda a: a.sum(), r"\(\)"), (lambda a: 1.0, "'float'"), (lambda a: None, "'NoneType'")):
        with pytest.raises(ConfigError, match=f"value = {shown}: must be a tensor of one number for each of 4 chunks"):
            ValueGuide(Reward(lambda obs, actions, of=nothing: of(actions))).shift(a_step())
    other = torch.zeros(4, requires_grad=True)
    for still in (lambda a: a.detach().sum((1, 2)), lambda a: 1 * other):
        with pytest.raises(ConfigError, match="must be differentiable in the actions"):
            ValueGuide(Reward(lambda obs, actions, of=still: of(actions))).shift(a_step())


def test_a_gradient_that_is_none_comes_to_light() -> None:
    """Where two chunks are the same their distance has none."""
    still = Reward(lambda obs, actions: ((actions - actions.detach()) ** 2).sum((1, 2)).sqrt())
    with pytest.raises(ConfigError, match="guide = 'not finite': its gradients and commands must be finite"):
        sampled(small_policy("diffusion"), ValueGuide(still))


def test_what_a_function_writes_into_its_arguments_changes_nothing_else() -> None:
    def writes(obs: Tensor, actions: Tensor) -> Tensor:
        obs -= 1
        return actions.mul_(0).sum((1, 2))

    before, policy = OBS.clone(), small_policy("diffusion")
    chosen = sampled(policy, candidates=3, scorer=Reward(writes))
    assert OBS.equal(before)
    assert chosen.abs().sum() > 0


def test_what_a_function_raises_says_what_it_was_given() -> None:
    def narrow(obs: Tensor, actions: Tensor) -> Tensor:
        return actions @ torch.zeros(5, 1)

    with pytest.raises(ConfigError, match=r"narrow\(obs, actions\) raised RuntimeError: .* actions \(4, 3, 2\)"):
        sampled(small_policy("diffusion"), ValueGuide(Reward(narrow)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reward(None), "function = None: must be a function"),
        (lambda: Guides((lambda step: step,)), "must be a tuple of guides"),
        (lambda: Guides(ValueGuide(Near())), "must be a tuple of guides"),
    ],
)
def test_what_is_no_guide_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_observations_are_seen_once_for_all_steps_of_a_sample() -> None:
    policy, seen = small_policy("diffusion"), []

    class Looking(Near):
        def at(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
            seen.append(tuple(obs.shape))
            return super().at(obs)

    value = Looking()
    sampled(policy, ValueGuide(value, 0.1))
    assert seen == [(4, 2, 3)]
    assert len(value.asked) == policy.config.num_train_timesteps - 1, "`variance` moves nothing at the last"


def test_a_critic_is_climbed_as_it_scores() -> None:
    policy = small_policy("diffusion")
    critic = ChunkCritic(policy, CriticConfig(hidden_size=64))
    before, after = (sampled(policy, guide) for guide in (None, ValueGuide(critic, 3.0)))
    assert critic.score(OBS, after).mean() > critic.score(OBS, before).mean()
    assert all(p.grad is None for p in critic.parameters())
    assert critic.at(OBS)(before).detach().equal(critic.score(OBS, before))


def test_a_function_is_a_value_and_a_scorer() -> None:
    policy = small_policy("diffusion")
    near = Reward(lambda obs, actions: -((actions - 0.5) ** 2).sum((1, 2)))
    policy.scorer = near
    plain, best, both = (
        sampled(policy, guide, candidates=n) for guide, n in ((None, 1), (None, 8), (ValueGuide(near, 0.2), 8))
    )
    scores = [near.score(OBS, actions).mean() for actions in (plain, best, both)]
    assert scores[0] < scores[1] < scores[2]
