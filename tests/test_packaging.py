"""The wheel: everything lies inside `dprl`, it imports from anywhere, and `import dprl` stays light."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dprl.policy import DiffusionConfig, DiffusionPolicy, Features

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dprl", "agents", "envs", "experiments")
OPTIONAL = ("ray", "gymnasium", "mujoco", "wandb", "h5py", "envpool", "matplotlib", "tyro")


def python(*arguments, cwd, path=None):
    """Run this interpreter without this process's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)  # before the finder of an editable install
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gains no build folder and a stale one cannot leak in."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    built = python(*pip_wheel, "--wheel-dir", folder, folder / "source", cwd=folder)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def target(wheel):
    folder = wheel.parent / "target"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    installed = python(*install, folder, wheel, cwd=wheel.parent)
    assert installed.returncode == 0, installed.stderr
    return folder


def test_the_wheel_imports_from_another_folder(target, tmp_path):
    script = "import dprl, dprl.agents, dprl.envs, dprl.experiments.catalogue, dprl.envs.catalogue, dprl.rollout, sys;"
    script += "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'dprl'), sep='\\n')"
    result = python("-c", script, cwd=tmp_path, path=target)
    assert result.returncode == 0, result.stderr
    files = [Path(line) for line in result.stdout.split()]
    assert len(files) > 20
    assert [file for file in files if not file.is_relative_to(target / "dprl")] == []


def test_the_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dprl"}


def test_the_wheel_holds_every_module_and_the_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"dprl/py.typed"}
    for folder in FOLDERS:
        prefix = "" if folder == "dprl" else "dprl/"
        expected |= {prefix + file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")}
    assert expected - names == set()


def test_a_checkout_finds_its_own_parts():
    script = "import dprl, dprl.agents, dprl.envs, dprl.experiments as e; print(dprl.__file__, dprl.agents.__file__, "
    script += "dprl.envs.__file__, e.__file__, sep='\\n')"
    result = python("-c", script, cwd=ROOT)
    assert result.stdout.split() == [str(ROOT / folder / "__init__.py") for folder in FOLDERS], result.stderr


@pytest.mark.parametrize("name", ["agents", "envs", "experiments"])
def test_bare_names_are_refused(name):
    result = python("-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: import this package as 'dprl.{name}'" in result.stderr


def test_import_dprl_is_light(tmp_path):
    script = f"import dprl, sys; print(*({set(OPTIONAL)} & sys.modules.keys()))"
    result = python("-c", script, cwd=tmp_path, path=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "evaluate policy --env Avoid-v0 --episodes 2",
        *(pytest.param(c, marks=pytest.mark.full) for c in ("--help", "list envs")),
    ],
)
def test_the_core_alone_can_be_used(command, tmp_path):
    """Without any optional package."""
    absent = f"sys.modules.update(dict.fromkeys({[name for name in OPTIONAL if name != 'tyro']}))"
    DiffusionPolicy(Features(2, 2), DiffusionConfig(num_train_timesteps=2)).save_pretrained(tmp_path / "policy")
    script = f"import sys; {absent}; from dprl.cli import main; sys.exit(main({command.split()}))"
    result = python("-c", script, cwd=tmp_path, path=ROOT)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
