"""Names and the specs behind them."""

import warnings

import pytest

from dprl.envs import catalogue
from dprl.errors import ConfigError, EnvError, MissingDependencyError
from dprl.spec import EnvOptions, resolve


@pytest.fixture
def _with_envpool(monkeypatch):
    monkeypatch.setattr("dprl.envs.envpool.available", lambda: True)


@pytest.fixture
def _without_envpool(monkeypatch):
    monkeypatch.setattr("dprl.envs.envpool.available", lambda: False)


def test_there_are_fifty_metaworld_tasks():
    assert len(set(catalogue.METAWORLD)) == 50


@pytest.mark.usefixtures("_with_envpool")
@pytest.mark.parametrize("name", catalogue.METAWORLD)
def test_metaworld_resolves_to_envpool(name):
    spec = resolve(name)
    assert spec.id == name
    assert spec.builder == "dprl.envs.envpool:build"
    assert (spec.observation_size, spec.action_size, spec.max_episode_steps) == (39, 4, 200)
    assert (spec.reward, spec.has_success) == ("sparse", True)


def test_metaworld_names_are_those_of_envpool():
    registered = set(pytest.importorskip("envpool").list_all_envs())
    missing = [name for name in catalogue.METAWORLD if resolve(name).backend_id not in registered]
    assert missing == []


def test_metaworld_names_are_those_of_its_package():
    tasks = set(pytest.importorskip("metaworld.env_dict").ENV_CLS_MAP)
    assert {name.removeprefix("metaworld/") for name in catalogue.METAWORLD} == tasks


@pytest.mark.usefixtures("_with_envpool")
@pytest.mark.parametrize("name", catalogue.MUJOCO)
def test_mujoco_resolves_to_envpool(name):
    spec = resolve(name)
    assert (spec.id, spec.backend_id) == (name, name)
    assert spec.builder == "dprl.envs.envpool:build"
    assert (spec.reward, spec.has_success) == ("dense", False)


def test_other_gymnasium_ids_resolve_to_gymnasium():
    assert resolve("Pendulum-v1").builder == "dprl.envs.gymnasium:build"


def test_options_reach_the_spec():
    options = EnvOptions(reward="dense", max_episode_steps=7, backend="gymnasium", vectorization="async")
    for name in ("metaworld/push-v3", "Hopper-v5"):
        spec = resolve(name, options)
        assert (spec.reward, spec.max_episode_steps) == ("dense", 7)
        assert (spec.builder, spec.vectorization) == ("dprl.envs.gymnasium:build", "async")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("metaworld/puhs-v3", "metaworld/push-v3"), ("metaworld/push", "metaworld/push-v3"), ("Hoper-v5", "Hopper-v5")],
)
def test_unknown_name_offers_the_nearest(typed, meant):
    with pytest.raises(EnvError, match=f"unknown environment '{typed}'") as error:
        resolve(typed)
    hint = str(error.value).partition("Did you mean ")[2].partition("?")[0].replace(" or ", ", ").split(", ")
    assert hint[0] == meant
    assert len(set(hint)) == len(hint), "a name should be offered once"


@pytest.mark.usefixtures("_without_envpool")
@pytest.mark.parametrize("name", ["metaworld/push-v3", "Hopper-v5"])
def test_without_envpool_it_warns_and_falls_back(name):
    with pytest.warns(UserWarning, match=rf"EnvPool .*{name} runs on its own Python environment.*slower"):
        spec = resolve(name)
    assert spec.builder == "dprl.envs.gymnasium:build"


@pytest.mark.usefixtures("_without_envpool")
@pytest.mark.parametrize("name", ["metaworld/push-v3", "Hopper-v5"])
def test_gymnasium_backend_by_choice_does_not_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(name, EnvOptions(backend="gymnasium")).builder == "dprl.envs.gymnasium:build"


@pytest.mark.usefixtures("_without_envpool")
@pytest.mark.parametrize("name", ["metaworld/push-v3", "Hopper-v5"])
def test_envpool_by_choice_needs_envpool(name):
    with pytest.raises(MissingDependencyError, match=rf"'envpool' for {name} needs the package 'envpool'"):
        resolve(name, EnvOptions(backend="envpool"))


def test_envpool_backend_is_refused_for_what_it_does_not_have():
    with pytest.raises(ConfigError, match="backend = 'envpool': EnvPool here has no 'Pendulum-v1'"):
        resolve("Pendulum-v1", EnvOptions(backend="envpool"))
    with pytest.raises(EnvError, match="unknown environment 'Nothing-v0'"):
        resolve("Nothing-v0", EnvOptions(backend="envpool"))


@pytest.mark.parametrize("name", ["Hopper-v5", "Pendulum-v1"])
def test_sparse_reward_needs_success(name):
    with pytest.raises(ConfigError, match=f"reward = 'sparse': {name} reports no success"):
        resolve(name, EnvOptions(reward="sparse"))


@pytest.mark.parametrize("name", ["metaworld/push-v3", "Pendulum-v1"])
@pytest.mark.parametrize("option", ["max_episode_steps"])
def test_options_below_one_are_refused(name, option):
    with pytest.raises(ConfigError, match=f"{option} = 0: must be at least 1"):
        resolve(name, EnvOptions(**{option: 0}))
