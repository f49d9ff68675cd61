"""Worlds of real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Launcher


@pytest.fixture(scope="session")
def one_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("ranks"))
    yield launcher
    launcher.close()


@pytest.fixture
def launcher(one_launcher: Launcher) -> Iterator[Launcher]:
    """Its jobs end with the test."""
    yield one_launcher
    one_launcher.end_jobs()
