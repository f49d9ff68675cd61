"""Each mistake in a recipe is one line that names the place, the key, what was expected and the nearest valid name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.config import RecipeError, load_recipe

OVERRIDES = [
    ("optim.wieght_decay=3", "optim.wieght_decay: unknown key; did you mean optim.weight_decay?"),
    ("data.sources.0.shard=q", "data.sources.0.shard: unknown key; did you mean data.sources.0.shards?"),
    ("lr=3", "lr: unknown key; did you mean optim.lr?"),
    ("optim.schedule=cosin", "optim.schedule: expected cosine, wsd or linear, got 'cosin'; did you mean cosine?"),
    ("train.steps=many", "train.steps: expected an integer at least 1 or null, got 'many'"),
    ("train.micro_batch='8'", "train.micro_batch: expected an integer at least 1, got '8'"),
    ("train.steps=1e3", "train.steps: expected an integer at least 1 or null, got 1000.0; write 1000"),
    ("train.steps=true", "train.steps: expected an integer at least 1 or null, got true"),
    ("train.steps.x=1", "train.steps: expected an integer at least 1 or null, got {'x': 1}"),
    ("model.tie_embeddings=1", "model.tie_embeddings: expected true or false, got 1"),
    ("optim.lr=.inf", "optim.lr: expected a number more than 0, got inf"),
    ("optim.lr=.nan", "optim.lr: expected a number more than 0, got nan"),
    ("optim.lr=0", "optim.lr: expected a number more than 0, got 0"),
    ("model.slots.top_k=64", "model.slots.top_k: expected an integer from 1 to 32, got 64"),
    ("data.remote.cache_gib=0.001", "data.remote.cache_gib: expected a number at least 0.00390625, got 0.001"),
    ("optim.betas=[0.9]", "optim.betas.1: missing, expected a number at least 0 and less than 1"),
    ("optim.betas=[0.9, 1.0]", "optim.betas.1: expected a number at least 0 and less than 1, got 1.0"),
    ("model.encoder_attn_layers=[a]", "model.encoder_attn_layers.0: expected an integer, got 'a'"),
    ("data.sources=text", "data.sources: expected a list of 1 or more, each a section with the keys name, kind, "
     "shards, weight, weight_changes, on_exhausted, mqar, got 'text'"),
    ("optim=", "optim: expected a section with the keys name, lr, betas, eps, weight_decay, schedule, warmup, decay, "
     "min_lr_ratio, clip_norm, z_loss, got null"),
    ("name=3", "name: expected a name without slashes, white space and leading dot, got 3; write '3' with the quotes"),
    ("name=a/b", "name: expected a name without slashes, white space and leading dot, got 'a/b'"),
    ("run_dir=5", "run_dir: expected a path, got 5; write '5' with the quotes"),
    *(
        (f"{key}={value}", f"{key}: expected a duration from 1s to 365d (90s, 45m, 2h30m, 1d12h){or_null}, got {shown}")
        for key, value, or_null, shown in [
            ("parallel.step_timeout", "0s", "", "'0s'"),
            ("parallel.first_step_timeout", "1000000000h", "", "'1000000000h'"),
            ("parallel.first_step_timeout", "365d1s", "", "'365d1s'"),
            ("slurm.signal_lead", "0h0m", "", "'0h0m'"),
            ("train.time_limit", "5", " or null", "5"),
            ("train.time_limit", "1.5h", " or null", "'1.5h'"),
            ("slurm.time", "9" * 40 + "s", " or null", f"'{'9' * 40}s'"),
        ]
    ),
    ("data.remote.timeout=1e300", "data.remote.timeout: expected a number more than 0 and at most 86400, got 1e+300"),
    ("extends=base.yaml", "extends: unknown key; expected one of name, seed, run_dir, model, data, "
     "optim, train, parallel, logging, slurm, sweep"),
    ("optim.lr=${optim.rate}", "optim.lr: Interpolation key 'optim.rate' not found"),
    ("optim.lr=${optim.lr}", "optim.lr: Recursive interpolation detected"),
    ("optim.lr=???", "optim.lr: Missing mandatory value: lr"),
    ("optim.lr=[1", "not valid YAML: did not find expected ',' or ']'"),
    ("data.sources.2.name=q", "list index out of range"),
    ("data.sources.first.name=q", "expected the number of a list's entry, as in data.sources.0.shards"),
    ("optim.lr", "expected key=value, such as optim.lr=3e-4"),
    ("=3", "expected a key such as optim.lr or data.sources.0.shards, got ''"),
    ("optim..lr=3", "expected a key such as optim.lr or data.sources.0.shards, got 'optim..lr'"),
    ("data.sources[x].name=3", "expected a key such as optim.lr or data.sources.0.shards, got 'data.sources[x].name'"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_wrong_override(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("base.yaml", [override])
    assert str(caught.value) == f"override {override}: {message}"


COMBINATIONS = [
    ("model.d_model=65", "model: d_model=65 is not divisible by n_heads=4"),
    ("model.slots.factors=1", "model.slots: top_k=8 is more than the factor_size^factors = 4 slots there are"),
    ("train.tokens=100", "train: give either train.steps or train.tokens, one of them"),
    ("optim.warmup=11", "optim.warmup=11 is more than the 10 steps of the run"),
    (
        "train.sequence_chunks=2",
        "train.sequence_chunks=2: chunks are whole segments, and a row of data.seq_len=64 has "
        "1 of model.slots.segment_len=1024; take fewer chunks",
    ),
    ("data.sources.1.name=text", "data: data.sources: the names ['text', 'text'] are not distinct"),
    ("data.seq_len=100", "train.global_batch_tokens=512 is not a multiple of data.seq_len=100"),
]


@pytest.mark.parametrize(("override", "message"), COMBINATIONS, ids=[override for override, _ in COMBINATIONS])
def test_impossible_combination(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("base.yaml", [override])
    assert str(caught.value) == f"base.yaml with overrides: {message}"


RECALL = "data.sources.0={name: recall, kind: mqar, shards: null, mqar: "
RECALL += "{vocab_size: 64, settings: [{length: 32, pairs: 8}]}}"
SEQ2SEQ = [
    "model.encoder_layers=1",
    "model.ssm.head_dim=16",
    "model.decoder_inject_layers=[0]",
    RECALL.replace("vocab_size: 64", "vocab_size: 64, form: seq2seq"),
]
SAMPLES = [
    ([RECALL, "data.sources.0.mqar.settings.0.pairs=9"], "data.sources.0.mqar: mqar setting of length 32 with 9 pairs: "
     "the length must be at least 36, 18 tokens to remember and 2 a query"),
    ([RECALL, "data.sources.0.mqar.vocab_size=40"], "data.sources.0.mqar: mqar setting of length 32 with 8 pairs: "
     "mqar.vocab_size=40 has only 4 keys, expected at least 48"),
    ([RECALL, "data.sources.0.mqar.vocab_size=256"], "source 'recall': mqar.vocab_size=256 is more than "
     "model.vocab_size=128"),
    ([RECALL, "data.seq_len=16"], "source 'recall': samples of 32 tokens do not fit rows of data.seq_len=16 tokens"),
    ([RECALL, "data.sources.0.mqar.form=seq2seq"], "source 'recall': mqar.form=seq2seq goes with an encoder, "
     "mqar.form=decoder without one, not mqar.form=seq2seq with model.encoder_layers=0"),
    ([*SEQ2SEQ, "data.sources.0.mqar.fillers=any"], "data.sources.0.mqar: mqar.fillers=any has no meaning in the "
     "seq2seq form, which has no fillers"),
    (SEQ2SEQ, "source 'code' of kind lm has nothing for the encoder to read: set model.encoder_layers=0, or use "
     "seq2seq sources of kind mqar"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), SAMPLES)
def test_samples_that_training_would_refuse(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("base.yaml", overrides)
    assert str(caught.value) == f"base.yaml with overrides: {message}"


def test_validating_recall_samples_needs_no_numpy(folder: Path) -> None:
    script = f"import sys; from slotmamba.config import load_recipe; load_recipe('base.yaml', [{RECALL!r}]); "
    script += "print(*sorted({'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


FILES = [
    ("", "x.yaml: the file is empty, expected the keys of a recipe"),
    ("# nothing\n", "x.yaml: the file is empty, expected the keys of a recipe"),
    ("- a\n- b\n", "x.yaml: expected the keys of a recipe at the top, got a list"),
    ("text\n", "x.yaml: expected the keys of a recipe at the top, got a single value"),
    ("name: a\nname: b\n", "x.yaml:2: not valid YAML: found duplicate key name"),
    ("extends: base.yaml\noptim:\n  lr: 1\n  lr: 2\n", "x.yaml:4: not valid YAML: found duplicate key lr"),
    ("name: a\n  b: c\n", "x.yaml:2: not valid YAML: mapping values are not allowed here"),
    ("name: !!python/name:os.system\n", "x.yaml:1: not valid YAML: could not determine a constructor for the tag "
     "'tag:yaml.org,2002:python/name:os.system'"),
    ("extends: base.yaml\nnull: 3\n", "x.yaml: Incompatible key type 'NoneType'"),
    ("extends: base.yaml\nname: ${\n", "x.yaml: no viable alternative at input '${'"),
    ("extends: bose.yaml\n", "x.yaml: extends: bose.yaml: no such file or installed recipe; did you mean base.yaml?"),
    ("extends: mqar-tinny\n", "x.yaml: extends: mqar-tinny: no such file or installed recipe; did you mean mqar-tiny?"),
    ("extends: [base.yaml]\n", "x.yaml: extends: expected a file or the name of an installed "
     "recipe, got ['base.yaml']"),
    ("extends: x.yaml\n", "x.yaml: extends: the recipes extend each other in a circle: x.yaml -> x.yaml"),
    ("extends: base.yaml\noptim: {lrr: 1}\n", "x.yaml: optim.lrr: unknown key; did you mean optim.lr?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILES)
def test_wrong_file(folder: Path, text: str, message: str) -> None:
    (folder / "x.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml")
    assert str(caught.value) == message


def test_an_error_names_the_file_that_wrote_the_value(folder: Path) -> None:
    (folder / "base.yaml").write_text((folder / "base.yaml").read_text().replace("1e-3", "fast"))
    (folder / "x.yaml").write_text("extends: base.yaml\noptim: {warmup: long}")
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml", ["seed=-1"])
    assert str(caught.value).splitlines() == [
        "override seed=-1: seed: expected an integer from 0 to 9223372036854775807, got -1",
        "base.yaml: optim.lr: expected a number more than 0, got 'fast'",
        "x.yaml: optim.warmup: expected an integer at least 0, got 'long'",
    ]


def test_circle_of_two(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml")
    (folder / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(RecipeError, match=r"in a circle: a\.yaml -> b\.yaml -> a\.yaml$"):
        load_recipe("a.yaml")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bas.yaml", "bas.yaml: no such file or installed recipe; did you mean base.yaml?"),
        ("mqar-tinny", "mqar-tinny: no such file or installed recipe; did you mean mqar-tiny?"),
        (".", ".: expected a YAML file, this is a folder"),
    ],
)
def test_unknown_recipe(folder: Path, recipe: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value) == message


def test_unknown_recipe_without_a_near_name_lists_the_installed_ones(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^zzz: no such file or installed recipe \(installed: .*mqar-tiny"):
        load_recipe("zzz")


@pytest.mark.parametrize("content", [b"name: \xff\xfe", b"name: \x00"])
def test_binary_file(folder: Path, content: bytes) -> None:
    (folder / "x.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml")
    assert str(caught.value).startswith("x.yaml: not valid YAML: ")
    assert "\n" not in str(caught.value)
