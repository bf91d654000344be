"""Imports point down only, and optional packages stay in the files that adapt them. Read from source, never run."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"dprl": "dprl", "agents": "dprl.agents", "envs": "dprl.envs", "experiments": "dprl.experiments"}
LAYERS = (
    "dprl.config dprl.cuda_graphs dprl.schedules dprl.cores dprl.checkpoint dprl.log dprl.seeding dprl.errors",
    "dprl.diffusion dprl.networks dprl.observations dprl.returns dprl.implicit",
    "dprl.policy dprl.mdp dprl.guidance dprl.data dprl.spec dprl",
    "dprl.training dprl.rollout",
    "dprl.agents dprl.envs",
    "dprl.experiments dprl.interop",
    "dprl.cli dprl.doctor dprl.__main__",
)
LAYER_OF = {prefix: layer for layer, prefixes in enumerate(LAYERS) for prefix in prefixes.split()}
LAZY_DOORS = ("dprl", "__getattr__")

# optional package -> the modules (with what lies below them) that may import it
HOMES = {
    "ray": ("dprl.rollout.ray_pool", "dprl.interop", "dprl.experiments.benchmarks.scaling"),
    "wandb": ("dprl.log",),
    **dict.fromkeys(
        ("gymnasium", "envpool", "metaworld", "mujoco"),
        (
            "dprl.envs",
            "dprl.experiments.video",
            "dprl.experiments.benchmarks.rollout",
            "dprl.experiments.benchmarks.dppo",
            "dprl.interop.sb3",
        ),
    ),
}
# modules -> what they never import
BANNED = {
    "dprl.agents": ("dprl.envs", "dprl.rollout.ray_pool", "ray", "wandb"),
    "dprl.envs": ("torch",),
}

Sources = dict[str, str]


@dataclass(frozen=True)
class Import:
    source: str
    target: str
    line: int
    function: str | None
    """The outermost function it stands in."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def read_sources() -> Sources:
    sources = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@cache
def imports_of(source: str, text: str, modules: frozenset[str]) -> list[Import]:
    """Every import of a module, those in functions too, but for those under TYPE_CHECKING."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, function)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = function or node.name
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = any(name.startswith(source + ".") for name in modules)
                parents = source.split(".")[: len(source.split(".")) + is_package - node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else base for name in names]
        found.extend(Import(source, target, node.lineno, function) for target in dict.fromkeys(targets))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(text), None)
    return found


def layer_of(module: str) -> int | None:
    if module.startswith("dprl."):
        return next((layer for prefix, layer in LAYER_OF.items() if prefix != "dprl" and within(module, prefix)), None)
    return LAYER_OF.get(module)


def all_imports(sources: Sources) -> list[Import]:
    modules = frozenset(sources)
    found = (i for source, text in sources.items() for i in imports_of(source, text, modules))
    return [i for i in found if (i.source, i.function) != LAZY_DOORS]


def upward_imports(sources: Sources) -> list[str]:
    ours = [i for i in all_imports(sources) if within(i.target, "dprl")]
    return [str(i) for i in ours if (layer_of(i.target) or 0) > (layer_of(i.source) or 0)]


def import_cycle(sources: Sources) -> list[str]:
    """A cycle of module-level imports, or nothing. Importing a module imports the packages it lies in, too."""
    graph: dict[str, set[str]] = {source: set() for source in sources}
    for i in all_imports(sources):
        if i.function is None:
            parts = i.target.split(".")
            packages = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            graph[i.source] |= {p for p in packages & sources.keys() if p == i.target or not within(i.source, p)}
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(graph[module]):
            if cycle := search(target, [*path, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := search(module, []))), [])


def misplaced_imports(sources: Sources) -> list[str]:
    """Optional packages outside their homes, and what agents and envs must not import."""
    found = []
    for i in all_imports(sources):
        homes = HOMES.get(i.target.split(".")[0])
        strayed = homes is not None and not any(within(i.source, home) for home in homes)
        banned = any(within(i.source, m) and within(i.target, b) for m, names in BANNED.items() for b in names)
        if strayed or banned:
            found.append(str(i))
    return found


def test_every_module_has_a_layer():
    sources = read_sources()
    assert len(sources) > 30
    assert [name for name in sources if layer_of(name) is None] == []


def test_imports_point_down():
    assert upward_imports(read_sources()) == []


def test_module_level_imports_are_acyclic():
    assert import_cycle(read_sources()) == []


def test_optional_packages_stay_at_home():
    assert misplaced_imports(read_sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dprl.checkpoint", "import dprl.policy"),
        ("dprl.checkpoint", "from dprl import policy"),
        ("dprl.checkpoint", "from . import policy"),
        ("dprl.networks.vision", "from dprl.policy.base import Policy"),
        ("dprl.observations", "from dprl.spec import EnvSpec"),
        ("dprl.policy", "from dprl.training.loop import train"),
        ("dprl.policy.control", "from dprl.rollout.evaluation import evaluate"),
        ("dprl.policy.diffusion", "def f():\n    from dprl.agents import BC"),
        ("dprl.policy.base", "class C:\n    def f(self):\n        import dprl.cli"),
        ("dprl.rollout.pool", "from ..agents.bc import BC"),
        ("dprl.envs.gymnasium", "try:\n    import dprl.experiments.runs\nexcept ImportError:\n    pass"),
        ("dprl", "from dprl.rollout.ray_pool import RayPool"),
    ],
)
def test_an_upward_import_is_found(module, line):
    sources = read_sources()
    sources[module] = f"\n{line}\n"
    assert any(found.startswith(f"{module}:") for found in upward_imports(sources))


def test_type_checking_and_the_lazy_doors_are_exempt():
    line = "if TYPE_CHECKING:\n    from dprl.cli import main\n"
    door = "def __getattr__(name):\n    from dprl.rollout.ray_pool import RayPool\n"
    assert upward_imports(read_sources() | {"dprl.errors": line, "dprl": door}) == []


def test_a_cycle_is_found():
    assert import_cycle({"dprl.mdp": "from dprl.policy import x", "dprl.policy": "import dprl.mdp"})
    assert not import_cycle({"dprl.mdp": "from dprl.policy import x", "dprl.policy": "def f():\n    import dprl.mdp"})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dprl.agents.bc", "import ray"),
        ("dprl.agents.bc", "from dprl.envs import catalogue"),
        ("dprl.agents.bc", "def f():\n    from dprl.rollout.ray_pool import RayPool"),
        ("dprl.envs.chunked", "from torch import nn"),
        ("dprl.cli", "def f():\n    import gymnasium.vector"),
        ("dprl.policy.base", "import wandb"),
    ],
)
def test_a_misplaced_import_is_found(module, line):
    assert misplaced_imports(read_sources() | {module: line})
