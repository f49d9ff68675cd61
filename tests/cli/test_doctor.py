"""The doctor and the environment record say what is there, and nothing secret."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import slotmamba_kernels
from slotmamba import dependencies, doctor
from slotmamba.cli import main
from slotmamba.dependencies import Dependency, extra_that_installs
from slotmamba.environment import describe_environment, git_state
from slotmamba.installed import checkout_root


def test_a_good_installation_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert report.splitlines()[-1] == "usable"
    assert "slot memory on cpu: ok" in report
    assert f" {metadata.version('torch')} " in report


def test_wrong_values_are_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = slotmamba_kernels.hksa

    def off(*args: torch.Tensor, backend: str, num_slots: int) -> tuple[torch.Tensor, object]:
        output, state = right(*args, backend=backend, num_slots=num_slots)
        return (output * (1 + 1e-6) if backend == "torch" else output), state

    monkeypatch.setattr(slotmamba_kernels, "hksa", off)
    assert doctor.run() == 1
    assert "problem: the slot memory computes wrong values on cpu, off by 1e-06\n" in capsys.readouterr().out


def test_a_core_package_outside_its_range_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = [Dependency(Requirement("numpy>=99"), None), Dependency(Requirement("no-such-package"), None)]
    monkeypatch.setattr(doctor, "dependencies", lambda: needed)
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert f"problem: numpy>=99 is required, {metadata.version('numpy')} is installed: pip install" in report
    assert "problem: no-such-package is required, nothing is installed: pip install" in report
    assert report.splitlines()[-1] == "not usable"


def test_every_package_of_the_development_install_has_a_tested_version() -> None:
    tested = dependencies.tested_versions()
    for each in dependencies.dependencies():
        if each.extra in (None, "dev"):
            assert each.requirement.specifier.contains(tested[each.name]), each


def test_constraints_hold_no_local_version_and_no_cuda_package() -> None:
    tested = dependencies.tested_versions()
    assert [name for name, version in tested.items() if "+" in version] == []
    assert [name for name in tested if name.startswith(("nvidia-", "cuda-"))] == []


def test_extras_are_named_for_users() -> None:
    assert extra_that_installs("lm_eval.api") == "eval"
    assert extra_that_installs("triton") == "gpu"
    assert extra_that_installs("torch") is None


def test_environment_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-write-me")
    record = describe_environment()
    text = json.dumps(record)
    assert "SECRET_TOKEN" not in text
    assert "do-not-write-me" not in text
    assert record["packages"]["torch"] == metadata.version("torch")
    assert record["torch"]["threads"] == torch.get_num_threads()
    assert len(record["gpus"]) == torch.cuda.device_count()


def test_git_state_is_that_of_the_checkout() -> None:
    root = checkout_root()
    assert root is not None
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    state = git_state()
    assert state is not None
    assert state["commit"] == head.stdout.strip()


def test_git_state_sees_a_change(tmp_path: Path) -> None:
    """In a small checkout of its own, so that the state of the real one does not matter."""
    root = checkout_root()
    assert root is not None
    package = tmp_path / "slotmamba"
    package.mkdir()
    for name in ("__init__.py", "installed.py", "dependencies.py", "environment.py"):
        (package / name).write_bytes((root / "slotmamba" / name).read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)

    def state() -> str:
        code = "from slotmamba.environment import git_state; print(git_state())"
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert "'dirty': False" in state()
    (package / "environment.py").write_text((package / "environment.py").read_text() + "\n")
    assert "'dirty': True" in state()
