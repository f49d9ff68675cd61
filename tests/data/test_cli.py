from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from slotmamba_data import ShardFolder, Tokenizer
from slotmamba_data.cli import add_data_commands


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    code = args.handler(args)
    assert isinstance(code, int)
    return code


def test_from_text_to_inspected_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("A paragraph of text.\n\n" * 500)
    arguments = ("--input", text, "--input", "austen:val", "--output", tmp_path / "tok", "--vocab-size", 400)
    assert run("tokenizer", *arguments, "--type", "bpe") == 0
    printed = capsys.readouterr().out
    assert "444,269 bytes" in printed and "0 lines skipped" in printed and "bytes per token" in printed
    assert "tokens/word" in printed and "\n  austen:val" in printed and "MB of text a second" in printed
    assert json.loads((tmp_path / "tok/report.json").read_text())["inputs"][1]["name"] == "austen:val"

    inputs = ("--input", text, "austen:val", "--tokenizer", tmp_path / "tok", "--output", tmp_path / "shards")
    assert run("build", *inputs, "--validation", 0.2, "--document-kib", 2) == 0
    printed = capsys.readouterr().out
    manifests = {split: ShardFolder(tmp_path / "shards" / split).manifest for split in ("train", "val")}
    for split, manifest in manifests.items():
        assert f"{split:<11} {manifest.documents:,} documents, {manifest.tokens:,} tokens" in printed

    assert run("inspect", tmp_path / "shards/train", "--tokenizer", tmp_path / "tok/tokenizer.model") == 0
    printed = capsys.readouterr().out
    assert "every byte is as it was written" in printed
    assert "document 0 begins\nA paragraph of text.\n\nA paragraph" in printed
    lines = printed[printed.index("tokens of a document") : printed.index("document 0 begins")].splitlines()[1:]
    counted = [int(line.split()[3].replace(",", "")) for line in lines]
    assert sum(counted) == manifests["train"].documents

    with pytest.raises(ValueError, match="is a complete folder of shards"):
        run("build", *inputs, "--validation", 0.2)
    assert run("build", *inputs, "--validation", 0.2, "--document-kib", 4, "--overwrite") == 0
    assert ShardFolder(tmp_path / "shards/train").manifest.documents < manifests["train"].documents


def test_what_is_left_out_is_printed(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"body": "one", "source": "web"}', '{"body": "one", "source": "web"}', "{", '{"body": ""}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines * 2))
    inputs = ("--input", path, "--tokenizer", tokenizer.path, "--output", tmp_path / "out", "--text-field", "body")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        run("build", *inputs)
    assert run("build", *inputs, "--deduplicate", "--skip-bad", "--workers", 2) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "no progress bar where there is no terminal"
    assert "  web: 1 documents, " in printed.out and "tokens; 3 left out (duplicate)" in printed.out
    assert f"  {path}: 0 documents, 0 tokens; 2 left out (empty); 2 left out (not JSON)" in printed.out


def test_progress_bar_on_a_terminal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    program = "import sys; from slotmamba.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [
        "data",
        "build",
        "--input",
        "austen:val",
        "--tokenizer",
        str(tokenizer.path),
        "--output",
        str(tmp_path / "o"),
    ]
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, "-c", program, *words, "--deduplicate", "--shard-mib", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # which is how a terminal without a process reads
            while part := os.read(ours, 65_536):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    for phase in ("hashes", "duplicates", "shards"):
        assert f"{phase}: 100%".encode() in shown
    assert b"documents, " in shown and b"M tokens/s" in shown


def test_files_can_be_kept_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(
        "build",
        "--input",
        "austen:val",
        "austen:test",
        "--tokenizer",
        tokenizer.path,
        "--output",
        tmp_path,
        "--document-kib",
        0,
    )
    assert ShardFolder(tmp_path).manifest.documents == 2


def test_recall_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--setting", "64:4:30", "--setting", "128:8:20")
    assert (
        run(
            "build",
            "--mqar",
            *settings,
            "--vocab-size",
            512,
            "--fillers",
            "any",
            "--seed",
            3,
            "--output",
            tmp_path / "a",
        )
        == 0
    )
    manifest = ShardFolder(tmp_path / "a").manifest
    assert (manifest.documents, manifest.tokens, manifest.vocab_size) == (50, 30 * 64 + 20 * 128, 512)
    assert manifest.about["spec"]["fillers"] == "any" and manifest.about["seed"] == 3
    assert run("inspect", tmp_path / "a/manifest.json") == 0
    assert "kind        mqar, decoder" in capsys.readouterr().out
    assert run("build", "--mqar", "--setting", "8:4:5", "--form", "seq2seq", "--output", tmp_path / "b") == 0
    assert ShardFolder(tmp_path / "b").manifest.form == "seq2seq"


def test_inspect_finds_damage(tmp_path: Path) -> None:
    run("build", "--mqar", "--setting", "64:4:30", "--output", tmp_path)
    path = tmp_path / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged between bytes 0 and 16384"):
        run("inspect", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--input", "austen:val"], "needs --input and --tokenizer"),
        (["build", "--tokenizer", "x"], "needs --input and --tokenizer"),
        (["build", "--mqar"], "needs --setting LENGTH:PAIRS:COUNT"),
        (["build", "--mqar", "--setting", "64:4"], "--setting 64:4: expected LENGTH:PAIRS:COUNT"),
        (["build", "--mqar", "--setting", "64:4:0"], "expected one of at least 1"),
        (["build", "--mqar", "--setting", "64:40:5"], "the length must be at least 160"),
        (["build", "--mqar", "--setting", "64:4:5", "--input", "x"], "--input has no meaning for recall"),
        (["build", "--mqar", "--setting", "64:4:5", "--shard-mib", "0"], "--shard-mib 0"),
        (["build", "--mqar", "--setting", "64:4:5", "--workers", "0"], "workers=0: expected at least 1"),
        (["build", "--mqar", "--setting", "64:4:5", "--seed", "-1"], "seed=-1: expected 0 to 2"),
        (["build", "--mqar", "--setting", "64:4:5", "--seed", str(2**63)], f"seed={2**63}: expected 0 to 2"),
        (["build", "--input", "austen:val", "--tokenizer", "x", "--document-kib", "-1"], "--document-kib -1: expected"),
        (["build", "--mqar", "--setting", "64:4:5", "--deduplicate"], "--deduplicate has no meaning for recall"),
        (["build", "--input", "austen:val", "--vocab-size", "5"], "--vocab-size has no meaning for text"),
        (["build", "--input", "austen:val", "--tokenizer", "none.model"], "there is no tokenizer none.model"),
        (["tokenizer", "--input", "austen:val"], "needs --input and --vocab-size"),
        (["tokenizer", "--import", "x", "--seed", "1"], "--seed has no meaning with --import"),
        (["tokenizer", "--import", "x"], "--import needs --validation"),
        (["tokenizer", "--import", "none.json", "--validation", "austen:val"], "there is no tokenizer none.json"),
        (["tokenizer", "--input", "none.txt", "--vocab-size", "500"], "none.txt does not exist"),
    ],
)
def test_wrong_arguments_are_value_errors(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tokenizer", "--import", tokenizer.path, "--validation", "austen:test", "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tokenizer   700 tokens" in printed and "bytes per token" in printed and "not given back" not in printed
    assert Tokenizer(tmp_path).digest == tokenizer.digest
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["imported_from"] == str(tokenizer.path) and report["measured"]["sources"][0]["source"] == "austen:test"
    )


def test_inspect_wants_the_right_tokenizer(tmp_path: Path, tokenizer: Tokenizer, text_shards: Path) -> None:
    run("tokenizer", "--input", "austen:val", "--vocab-size", 350, "--output", tmp_path)
    with pytest.raises(ValueError, match="was not made with tokenizer"):
        run("inspect", text_shards, "--tokenizer", tmp_path)
    with pytest.raises(ValueError, match="has documents 0 to"):
        run("inspect", text_shards, "--tokenizer", tokenizer.path, "--document", 10**6)
