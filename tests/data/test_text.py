from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from slotmamba_data import open_text
from slotmamba_data.text import DOCUMENT_BYTES, EMBEDDED

TEXT = "One.\r\nTwo.\n\n\nThree \N{GRINNING FACE}.\n   \nFour.\tFive.\n\nSix, no end of line"


@pytest.mark.parametrize("document_bytes", [1, 5, 12, 30, 1000, None])
def test_documents_joined_are_the_file(tmp_path: Path, document_bytes: int | None) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    assert "".join(open_text(path, document_bytes=document_bytes)) == TEXT


@pytest.mark.parametrize("word", list(EMBEDDED))
def test_embedded_text_is_cut_at_blank_lines(word: str) -> None:
    whole = "".join(open_text(word, document_bytes=None))
    documents = list(open_text(word))
    assert "".join(documents) == whole
    assert len(documents) > 20
    for document in documents[:-1]:
        assert document.endswith("\n\n")
        assert DOCUMENT_BYTES <= len(document.encode()) < 2 * DOCUMENT_BYTES


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 1000)
    documents = list(open_text(path, document_bytes=100))
    assert "".join(documents) == path.read_text()
    assert {len(document) for document in documents[:-1]} == {405}  # the first line end after 4 * 100


def test_compressed_and_json_files_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["first\n\ndocument", "\0second\N{GRINNING FACE}", ""]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.xz", "a.jsonl.gz"):
        assert list(open_text(tmp_path / name)) == texts
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "a.xz").write_bytes(lzma.compress(TEXT.encode()))
    for name in ("a.txt.gz", "a.xz"):
        assert "".join(open_text(tmp_path / name, document_bytes=5)) == TEXT


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff bad", "a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "a.jsonl, line 2: `text` is int"),
        ("a.jsonl", b'{"tex": "a"}\n', "a.jsonl, line 1: expected an object with the field `text`"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b'{"text": "a"\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1: `text` holds half a surrogate pair"),
        ("a.xz", b"no xz at all", "a.xz is not a complete compressed file"),
        ("a.txt.xz", lzma.compress(b"text" * 9999)[:-20], "a.txt.xz is not a complete compressed file"),
        ("a.txt.gz", gzip.compress(b"text" * 9999, mtime=0)[:-20], "a.txt.gz is not a complete compressed file"),
    ],
)
def test_unreadable_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_text(tmp_path / name))


def test_missing_input_is_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        open_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder"):
        open_text(tmp_path)
    with pytest.raises(ValueError, match=r"austen:dev.*expected one of austen:train, austen:val, austen:test"):
        open_text("austen:dev")
