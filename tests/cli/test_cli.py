"""The command line: exit codes, one-line errors, and no slow import before it is needed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slotmamba.cli import main
from slotmamba.config import load_recipe
from slotmamba.errors import InputError, TrainingError
from slotmamba_data import MQARSetting, MQARSpec, Tokenizer, build_mqar, build_text, train_tokenizer

RECIPE = """\
name: small
data: {seq_len: 64, sources: [{name: text, shards: data/text}]}
train: {steps: 10, global_batch_tokens: 512}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a module with the given functions in the place of one that a handler imports."""

    def put(name: str, **functions: Callable[..., Any]) -> None:
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_validate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "small.yaml", "data.tokenizer=data"]) == 0
    assert capsys.readouterr().out == (
        "small: ok\n"
        "to be made before training: data.tokenizer: there is no tokenizer data: make one with "
        "`slotmamba data tokenizer`\n"
        "to be made before training: data.sources.0.shards: data/text does not exist: build it with "
        "`slotmamba data build`\n"
    )
    (folder / "data").mkdir()
    build_mqar(MQARSpec((MQARSetting(8, 2),), vocab_size=64), [3], folder / "data/text")
    assert main(["validate", "small.yaml", "data.sources.0.kind=mqar"]) == 0
    assert capsys.readouterr().out == "small: ok\n"


def test_validate_looks_at_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Manifests and tokenizer: what training would refuse later."""
    build_mqar(MQARSpec((MQARSetting(8, 2),), vocab_size=64, form="seq2seq"), [3], folder / "recall")
    (folder / "a.txt").write_text("one two three\n" * 50)
    for name, size in (("a", 275), ("b", 272)):
        train_tokenizer([folder / "a.txt"], folder / name, vocab_size=size)
        build_text([folder / "a.txt"], Tokenizer(folder / name), folder / f"text-{name}")
    text, recall = "data.sources.0={name: text, shards: text-%s}", "data.sources.0={name: r, kind: %s, shards: recall}"
    for overrides, line in [
        ([recall % "lm"], "data.sources.0.shards: recall holds data of kind mqar, the source is of kind lm"),
        (
            [recall % "mqar"],
            "data.sources.0.shards: recall holds samples of the seq2seq form, the model is one without encoder",
        ),
        (
            [text % "a", "model.vocab_size=200"],
            f"data.sources.0.shards: text-a has tokens up to {Tokenizer('a').vocab_size - 1}, model.vocab_size is 200",
        ),
        (
            [text % "a", "data.tokenizer=b"],
            "data.tokenizer, data.sources.0.shards are not of one tokenizer: build the shards with data.tokenizer",
        ),
    ]:
        assert main(["validate", "small.yaml", *overrides]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"
    assert main(["validate", "small.yaml", text % "a", "data.tokenizer=a"]) == 0


def test_train_without_its_data_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "data.tokenizer=data"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: data.tokenizer: there is no tokenizer data: make one with `slotmamba data tokenizer`\n"
        "error: data.sources.0.shards: data/text does not exist: build it with `slotmamba data build`\n"
    )
    assert [path.name for path in folder.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize("order", [["--print", "optim.lr=2.0"], ["optim.lr=2.0", "--print"]])
def test_validate_prints_a_recipe_that_loads(
    folder: Path, capsys: pytest.CaptureFixture[str], order: list[str]
) -> None:
    assert main(["validate", "small.yaml", "seed=3", *order]) == 0
    printed, verdict, _ = capsys.readouterr().out.partition("small: ok\n")
    assert verdict
    (folder / "printed.yaml").write_text(printed)
    assert load_recipe("printed.yaml") == load_recipe("small.yaml", ["seed=3", "optim.lr=2.0"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["validate", "small.yaml", "optim.lr=x", "sed=1"], "error: override optim.lr=x: optim.lr: expected a number "
         "more than 0, got 'x'\nerror: override sed=1: sed: unknown key; did you mean seed?"),
        (["validate", "smal.yaml"], "error: smal.yaml: no such file or installed recipe; did you mean small.yaml?"),
        (["train", "small.yaml", "sed=1"], "error: override sed=1: sed: unknown key; did you mean seed?"),
        (["trian", "small.yaml"], "error: argument COMMAND: trian is not known; did you mean train? "
         "(see slotmamba --help)"),
        (["evaluate", "x", "--suite", "recal"], "error: argument --suite: recal is not known; did you mean recall? "
         "(see slotmamba evaluate --help)"),
        (["generate", "x"], "error: the following arguments are required: --prompt (see slotmamba generate --help)"),
        (["generate", "x", "--prompt", "a", "--top-k", "x"], "error: argument --top-k: invalid int value: 'x' "
         "(see slotmamba generate --help)"),
        (["validate", "small.yaml", "--pront", "seed=1"], "error: unknown arguments: --pront seed=1"),
        (["doctor", "seed=1"], "error: unknown arguments: seed=1"),
        ([], "error: the following arguments are required: COMMAND (see slotmamba --help)"),
    ],
)  # fmt: skip
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{message}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no shards there"), 2, "error: no shards there\n"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gone"), 2,
         "error: gone: No such file or directory\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step-1/x"), 1, "error: step-1/x: No space left on device\n"),
        (OSError(errno.ENOSPC, "cannot write x: No space left"), 1, "error: cannot write x: No space left\n"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), 1, "error: a: Permission denied\n"),
        (TrainingError("step 7: the loss is nan"), 1, "error: step 7: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), 1, "error: this needs the package lm_eval, "
         "which is not installed: pip install -c constraints.txt -e '.[eval]'\n"),
    ],
)  # fmt: skip
def test_failures_are_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    replace: Callable[..., None],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def train(recipe: object, stop: object) -> int:
        raise error

    replace("slotmamba.train", train=train)
    assert main(["train", "small.yaml"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        ModuleNotFoundError("No module named 'sloth'", name="sloth"),
        ValueError("could not broadcast input array from shape"),  # NumPy's and torch's own: nobody wrote that
    ],
)
def test_a_bug_keeps_its_traceback(folder: Path, replace: Callable[..., None], error: Exception) -> None:
    def train(recipe: object, stop: object) -> int:
        raise error

    replace("slotmamba.train", train=train)
    with pytest.raises(type(error), match=str(error)):
        main(["train", "small.yaml"])


def test_train_gets_the_resolved_recipe_and_gives_the_exit_code(folder: Path, replace: Callable[..., None]) -> None:
    seen = []

    def train(recipe: object, stop: object) -> int:
        seen.append(recipe)
        return 1

    replace("slotmamba.train", train=train)
    assert main(["train", "small.yaml", "seed=5"]) == 1
    assert seen == [load_recipe("small.yaml", ["seed=5"])]


def test_generate_streams_with_its_arguments(capsys: pytest.CaptureFixture[str], replace: Callable[..., None]) -> None:
    seen: dict[str, Any] = {}

    def generate_text(checkpoint: str, prompt: str, **options: Any) -> Iterator[str]:
        seen.update(options, checkpoint=checkpoint, prompt=prompt)
        yield from ("one ", "two")

    replace("slotmamba.generation", generate_text=generate_text)
    assert main(["generate", "runs/x", "--prompt", "once", "--top-p", "0.9", "--seed", "4"]) == 0
    assert capsys.readouterr().out == "one two\n"
    assert seen == {
        "checkpoint": "runs/x",
        "prompt": "once",
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_k": None,
        "top_p": 0.9,
        "seed": 4,
        "device": "auto",
    }


def test_recipe_help_lists_the_keys_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    assert "  optim.lr                          Peak learning rate.\n" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["data", "--help"], ["validate", "small.yaml"]])
def test_no_slow_import_for_help_and_validate(folder: Path, argv: list[str]) -> None:
    code = (
        "import sys\nfrom slotmamba.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "slow = {'torch', 'numpy', 'matplotlib', 'wandb', 'rich', 'webdataset', 'sentencepiece', 'transformers'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        command = [sys.executable, "-m", "slotmamba.cli", "validate", "small.yaml", "--print"]
        done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
