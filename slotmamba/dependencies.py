"""The packages SlotMamba builds on: accepted, tested and installed versions, and the command that installs the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slotmamba.installed import checkout_root, data_path


@dataclass(frozen=True)
class Dependency:
    requirement: Requirement
    extra: str | None
    """The extra that installs it; None for what every installation has."""

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def installed(self) -> str | None:
        """The installed version."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    @property
    def accepted(self) -> bool:
        """Whether it is installed in a version that SlotMamba accepts."""
        return self.installed is not None and self.requirement.specifier.contains(self.installed, prereleases=True)


@cache
def dependencies() -> list[Dependency]:
    """What the distribution declares for this platform: core packages first, then extra by extra."""
    distribution = metadata.distribution("slotmamba")
    found = []
    for extra in (None, *(distribution.metadata.get_all("Provides-Extra") or [])):
        for text in distribution.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            without = marker is None or marker.evaluate({"extra": ""})
            if without if extra is None else not without and marker is not None and marker.evaluate({"extra": extra}):
                found.append(Dependency(requirement, extra))
    return found


def extra_that_installs(module: str) -> str | None:
    """The extra whose package provides the import package `module`, or None."""
    name = canonicalize_name(module.partition(".")[0])
    return next((each.extra for each in dependencies() if each.name == name and each.extra not in (None, "dev")), None)


def install_command(extra: str | None) -> str:
    """The command that installs an extra, or the core packages."""
    suffix = f"[{extra}]" if extra else ""
    if checkout_root() is not None:
        return f"pip install -c constraints.txt -e '.{suffix}'"
    return f"pip install 'slotmamba{suffix}'"


def tested_versions() -> dict[str, str]:
    """The versions of constraints.txt by canonical package name."""
    lines = data_path("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}
