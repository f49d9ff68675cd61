from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from slotmamba_data import open_text
from slotmamba_data.errors import InputError
from slotmamba_data.inputs import pieces
from slotmamba_data.text import DOCUMENT_BYTES, EMBEDDED, BadDocument, Document, TextOptions, TextReader

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
    first, second = lines.encode()[:30], lines.encode()[30:]
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(first) + zstandard.compress(b"") + zstandard.compress(second)
    )
    for name in ("a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.jsonl.zst"):
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
        ("a.txt.zst", zstandard.compress(b"text" * 9999)[:-2], "a.txt.zst is not a complete compressed file"),
        ("a.txt.zst", b"no zstd at all", "a.txt.zst is not a complete compressed file"),
        ("a.parquet", b"no parquet at all", "a.parquet is not a Parquet file that can be read"),
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


def test_parquet_files(tmp_path: Path) -> None:
    texts = ["one", "", None, "two\n\nparts", "3" * 100]
    table = pyarrow.table(
        {"text": texts, "id": list(range(5)), "source": ["a", "b", "c", None, "d"], "other": [1.5] * 5}
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    options = TextOptions()
    read = list(TextReader(str(tmp_path / "a.parquet"), options))
    assert [each.reason if isinstance(each, BadDocument) else each for each in read] == [
        ("one", "a", 0),
        ("", "b", 1),
        "text is no string",
        ("two\n\nparts", str(tmp_path / "a.parquet"), 3),
        ("3" * 100, "d", 4),
    ]
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 of group 1: `text` is NoneType"):
        list(open_text(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'content', but 'text', 'id', 'source', 'other'"):
        list(open_text(tmp_path / "a.parquet", text_field="content"))


def test_parts_of_inputs_are_the_inputs(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [rng.choice(["", "x", "ab\n", "y" * 500]) * rng.randrange(20) + str(number) for number in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" * rng.randrange(1, 3) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines[:-1].rstrip("\n"))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet", row_group_size=7)
    (tmp_path / "c.txt").write_text("one\n\n" * 5)
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt")]
    options = TextOptions(5)
    for shard_bytes in (10, 1000, 5000, 10**6):
        found = pieces(names, shard_bytes)
        assert len(found) > 10 or shard_bytes > 5000
        read = [
            document.text
            for piece in found
            for part in piece
            for document in TextReader(part.spec, options, part.start, part.stop)
            if isinstance(document, Document)
        ]
        assert read == [*texts, *texts, *["one\n\n"] * 5]


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"")
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "slotmamba_data.zstd_file", raising=False)
        with pytest.raises(ValueError, match=rf"{module}, which .* is not installed: pip install 'slotmamba\[data\]'"):
            list(open_text(tmp_path / name))


def test_lines_and_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Numbers of too many digits, brackets too deep, and bytes in a Parquet column of strings that are none."""
    lines = ['{"text": "good"}', "1" * 5000, "[" * 100_000, '{"text": "odd name", "id": "\\ud800"}']
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    found = list(TextReader(str(tmp_path / "some.jsonl"), TextOptions()))
    assert [type(each).__name__ for each in found] == ["Document", "BadDocument", "BadDocument", "Document"]
    assert "some.jsonl, line 2: not JSON" in found[1].message and "line 3: not JSON" in found[2].message
    assert found[3].id is None

    raw = pyarrow.array([b"one", b"\xff\xfe", b"three"]).cast(pyarrow.binary())
    strings = pyarrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    path = tmp_path / "some.parquet"
    parquet.write_table(pyarrow.table({"text": strings}), path)
    one, two, three = TextReader(str(path), TextOptions())
    assert (one.text, three.text) == ("one", "three")
    assert isinstance(two, BadDocument) and "some.parquet, row 2 of group 0: not UTF-8" in two.message


def test_a_damaged_page_is_named_by_the_row_before_it(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    texts = [f"{number:04} {'x' * 20}" for number in range(5000)]
    pages = {"use_dictionary": False, "data_page_size": 20_000, "row_group_size": 4000}
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="snappy", **pages)
    column = parquet.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    place = column.data_page_offset + column.total_compressed_size * 3500 // 4000
    content[place : place + 200] = bytes(200)
    path.write_bytes(content)
    read: list[object] = []
    message = r"some\.parquet is not a Parquet file that can be read beyond row 3072 of group 0: "
    with pytest.raises(InputError, match=message):
        read.extend(TextReader(str(path), TextOptions()))
    assert len(read) == 3072
