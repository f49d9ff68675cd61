"""Text and JSON files that a crash leaves with the old content or the new, never a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slotmamba_data.files import write_file


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8.

    Raises:
        OSError: it could not be written; the error names ``path``, which keeps its old content.
    """
    write_file(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON; errors as for `write_text`.

    Raises:
        ValueError: ``value`` holds a NaN or an infinity, which JSON does not have.
        TypeError: ``value`` holds something that is not JSON.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
