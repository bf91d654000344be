"""Packaging: `agents`, `envs` and `experiments` install inside `dprl`, never as top-level names."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dprl" / "__init__.py").read_text(encoding="utf-8"))[1]

FOLDERS = ("agents", "envs", "experiments")
subpackages = [f"{folder}.{name}" for folder in FOLDERS for name in find_packages(folder)]
packages = [
    *find_packages(include=["dprl", "dprl.*"]),
    *(f"dprl.{name}" for name in (*FOLDERS, *subpackages)),
]

extras = {
    "envs": ["gymnasium[mujoco]>=1.0,<2", "mujoco>=3.3.0,<3.9", "metaworld>=3.1", "h5py>=3.10", "pillow>=10",
             'envpool>=1.2; sys_platform == "linux"'],
    "data": ["h5py>=3.10", "minari>=0.5", "pillow>=10", "zarr>=3.1", "pyarrow>=15,<26", "imageio-ffmpeg>=0.5"],
    "plots": ["matplotlib>=3.8", "pillow>=10", "scipy>=1.11"],
    "tensorboard": ["tensorboard>=2.16"],
    "pusht": ["gym-pusht>=0.1.8"],
    "ray": ["ray>=2.60,<2.61", "pyarrow<26"],
    "sb3": ["stable-baselines3>=2.3"],
    "wandb": ["wandb>=0.25"],
}  # fmt: skip
extras["demo"] = [*extras["envs"], *extras["plots"], *extras["tensorboard"]]
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
extras["dev"] = [
    *extras["all"],
    "diffusers>=0.35", "hypothesis>=6", "minari>=0.5", "mypy>=2", "psutil>=6", "pytest>=8", "pytest-cov>=5",
    "pytest-timeout>=2", "pytest-xdist>=3", "ray[default]>=2.60,<2.61", "ruff>=0.17", "setuptools>=77", "wheel",
]  # fmt: skip

setup(
    name="dprl",
    version=VERSION,
    description="Diffusion policies that learn from reward",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=packages,
    package_dir={"dprl": "dprl", **{f"dprl.{folder}": folder for folder in FOLDERS}},
    package_data={"dprl": ["py.typed"]},
    install_requires=["torch>=2.4", "numpy>=1.26", "safetensors>=0.4", "tyro>=0.9", "rich>=13", "filelock>=3.16"],
    extras_require=extras,
    entry_points={"console_scripts": ["dprl=dprl.cli:main"]},
)
