"""Where a tokenizer lies; found without loading it."""

from __future__ import annotations

from pathlib import Path

from slotmamba_data.errors import InputError

MODEL_NAME = "tokenizer.model"


def find_tokenizer(path: str | Path) -> Path:
    """The model file that `path`, itself or its folder, means.

    Raises:
        InputError: there is none.
    """
    file = Path(path) / MODEL_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"there is no tokenizer {file}: make one with `slotmamba data tokenizer`")
    return file
