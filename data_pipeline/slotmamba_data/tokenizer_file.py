"""Where a tokenizer lies; found without loading it."""

from __future__ import annotations

from pathlib import Path

from slotmamba_data.errors import InputError

MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"


def find_tokenizer(path: str | Path) -> Path:
    """The file that `path`, itself or its folder, means; in a folder with both kinds it is the sentencepiece model.

    Raises:
        InputError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in (MODEL_NAME, JSON_NAME) if (file / name).is_file()), file / MODEL_NAME)
    if not file.is_file():
        raise InputError(f"there is no tokenizer {file}: make one with `slotmamba data tokenizer`")
    return file


def tokenizer_name(path: Path) -> str:
    """The name under which a tokenizer is kept in a folder, by its kind."""
    return JSON_NAME if path.suffix == ".json" else MODEL_NAME
