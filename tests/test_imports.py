"""Who may import whom, what `import slotmamba` loads, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import slotmamba
from slotmamba.config import installed_recipes

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "slotmamba": ROOT / "slotmamba",
    "slotmamba_kernels": ROOT / "kernels" / "slotmamba_kernels",
    "slotmamba_data": ROOT / "data_pipeline" / "slotmamba_data",
    "slotmamba_slurm": ROOT / "slurm" / "slotmamba_slurm",
}
FORBIDDEN: dict[str, set[str]] = {
    "slotmamba": set(),
    "slotmamba_kernels": {"slotmamba", "slotmamba_data", "slotmamba_slurm"},
    "slotmamba_data": {"slotmamba", "slotmamba_kernels", "slotmamba_slurm"},
    "slotmamba_slurm": {"slotmamba_kernels", "slotmamba_data"},
}


def sources(package: str) -> list[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files, f"no sources under {PACKAGES[package]}"
    return files


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level packages of absolute imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        wrong = FORBIDDEN[package] & set(imported(ast.parse(path.read_text())))
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_slurm_needs_only_recipes_of_slotmamba() -> None:
    """`slotmamba.config`, the errors that it raises, notes, and what a run folder is and who holds it."""
    for path in sources("slotmamba_slurm"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            ours = [name for name in names if name.partition(".")[0] == "slotmamba"]
            allowed = ("config", "errors", "notes", "run_lock", "runs.folder")
            wrong = [name for name in ours if not any(f"{name}.".startswith(f"slotmamba.{each}.") for each in allowed)]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def whole_environment_uses(tree: ast.Module) -> Iterator[int]:
    """Lines where os.environ is used as a whole, not for one variable nor as the environment of a child process."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os" and any(n.name == "environ" for n in node.names):
            yield node.lineno
        if not (isinstance(node, ast.Attribute) and node.attr == "environ"):
            continue
        parent = parents[node]
        one_variable = (
            (isinstance(parent, ast.Subscript) and parent.value is node)
            or (isinstance(parent, ast.Attribute) and parent.attr in {"get", "setdefault", "pop"})
            or isinstance(parent, ast.Compare)
        )
        ancestor: ast.AST | None = parent
        while ancestor is not None and not (isinstance(ancestor, ast.keyword) and ancestor.arg == "env"):
            ancestor = parents.get(ancestor)
        if not one_variable and ancestor is None:
            yield node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_the_environment_is_never_dumped(package: str) -> None:
    for path in sources(package):
        lines = list(whole_environment_uses(ast.parse(path.read_text())))
        assert not lines, f"{path.relative_to(ROOT)} uses the whole of os.environ in lines {lines}"


@pytest.mark.parametrize(
    ("code", "dumps"),
    [
        ("print(os.environ)", True),
        ("dict(os.environ)", True),
        ("x = {**os.environ}", True),
        ("os.environ.items()", True),
        ("from os import environ", True),
        ("os.environ['A']", False),
        ("os.environ.get('A')", False),
        ("'A' in os.environ", False),
        ("subprocess.run(c, env={**os.environ, 'A': '1'})", False),
    ],
)
def test_the_check_for_dumps_sees_them(code: str, dumps: bool) -> None:
    assert bool(list(whole_environment_uses(ast.parse(code)))) == dumps


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=environment.get("PYTHONPATH"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_importing_slotmamba_is_light() -> None:
    loaded = run_python("import sys, slotmamba; print(*sys.modules)").split()
    heavy = {"torch", "numpy", "deepspeed", "wandb", "submitit", "transformers", "matplotlib", "pydantic"}
    assert heavy & set(loaded) == set()


def test_importing_the_model_loads_no_engine_and_no_sink() -> None:
    loaded = run_python("import sys, slotmamba; slotmamba.SlotMambaForCausalLM; print(*sys.modules)").split()
    heavy = {
        "deepspeed",
        "wandb",
        "submitit",
        "transformers",
        "matplotlib",
        "torch.distributed.fsdp",
    }
    assert heavy & set(loaded) == set()


def test_exports() -> None:
    from slotmamba.checkpoint import load_model
    from slotmamba.config.schema import ModelConfig
    from slotmamba.models.slotmamba import SlotMambaForCausalLM, SlotMambaForSeq2Seq

    assert slotmamba.load is load_model
    assert slotmamba.SlotMambaConfig is ModelConfig
    assert slotmamba.SlotMambaForCausalLM is SlotMambaForCausalLM
    assert slotmamba.SlotMambaForSeq2Seq is SlotMambaForSeq2Seq
    assert all(getattr(slotmamba, name) is not None for name in slotmamba.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = slotmamba.lod


@pytest.mark.slow
def test_the_wheel_holds_packages_recipes_and_tested_versions(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    printed = run_python(
        "import slotmamba, slotmamba_kernels, slotmamba_data, slotmamba_slurm\n"
        "from slotmamba.config import installed_recipes, load_recipe\n"
        "from slotmamba.dependencies import install_command, tested_versions\n"
        "from slotmamba.environment import git_state\n"
        "print(*(m.__file__ for m in (slotmamba, slotmamba_kernels, slotmamba_data, slotmamba_slurm)))\n"
        "print(*(load_recipe(name).name for name in installed_recipes()))\n"
        "print(tested_versions()['torch'], git_state(), install_command('eval'))\n",
        PYTHONPATH=str(site),
    )
    files, recipes, versions = printed.splitlines()
    assert all(Path(file).is_relative_to(site) for file in files.split())
    assert recipes.split() == list(installed_recipes())
    assert versions.endswith(" None pip install 'slotmamba[eval]'")
