"""The commands of the README and the tutorial, run as they stand there, in order, in an empty folder.

`shortened` makes trainings, texts and recall tests short; everything else runs to the letter. `make` targets are looked
up, not run: the demo and the tests are not part of the tests.
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT_TRAINING = ["train.steps=2", "optim.warmup=1", "train.eval_rows=2", "train.checkpoint.every=1"]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a Markdown text."""
    return [(match[1], match[2]) for match in BLOCK.finditer(text)]


def shortened(command: list[str]) -> list[str]:
    """The same command with less to do."""
    if command[:2] == ["slotmamba", "train"]:
        kept = [word for word in command if not word.startswith("train.steps=")]
        return [*kept, *SHORT_TRAINING]
    if command[:2] == ["slotmamba", "generate"]:
        return [*command, "--max-new-tokens", "4"]
    if command[:2] == ["slotmamba", "evaluate"] and "recall" in command:
        return [*command, "--samples", "2"]
    return command


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def run_line(line: str, folder: Path) -> None:
    command = shlex.split(line, comments=True)
    if not command or command[0] == "source":
        return
    if command[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in command[1:]), line
        return
    assert command[0] == "slotmamba", f"the documents use a command that this test does not know: {line}"
    run(shortened(command), folder)


def run_document(path: Path, folder: Path) -> int:
    """Runs the bash and python blocks of a document; returns how many there were."""
    ran = 0
    for language, content in blocks(path.read_text()):
        if language == "bash":
            for line in content.splitlines():
                run_line(line, folder)
            ran += 1
        elif language == "python":
            run([sys.executable, "-c", content], folder)
            ran += 1
    return ran


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the reader is told to have: a text of their own, and the recipe that the README shows."""
    text = lzma.decompress((ROOT / "data_pipeline/slotmamba_data/corpus/austen.test.txt.xz").read_bytes())
    (tmp_path / "mybook.txt").write_bytes(text[:300_000])
    recipes = [content for language, content in blocks((ROOT / "README.md").read_text()) if language == "yaml"]
    assert len(recipes) == 1
    (tmp_path / "mybook.yaml").write_text(recipes[0])
    return tmp_path


def test_blocks() -> None:
    text = "a\n```bash\nslotmamba doctor\n```\nb\n\n```yaml\nname: x\n```\n"
    assert blocks(text) == [("bash", "slotmamba doctor\n"), ("yaml", "name: x\n")]


def test_a_command_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not know"):
        run_line("slotmambo train x", tmp_path)
    with pytest.raises(AssertionError, match="make nothing"):
        run_line("make nothing", tmp_path)
    with pytest.raises(AssertionError, match="unknown-recipe"):
        run_line("slotmamba validate unknown-recipe", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme(folder: Path) -> None:
    assert run_document(ROOT / "README.md", folder) >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tutorial(folder: Path) -> None:
    assert run_document(ROOT / "docs/tutorial.md", folder) >= 3
