"""Files that come with the package but are not Python: recipes and the tested versions."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def data_path(name: str) -> Path:
    """Where `name` lies: inside the package when it was installed from a wheel, beside it in a source checkout."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name


def checkout_root() -> Path | None:
    """The git checkout that this package runs from, or None when it was installed from a wheel."""
    root = PACKAGE.parent
    return root if (root / ".git").exists() and (root / "pyproject.toml").exists() else None
