"""`slotmamba data tokenizer | build | inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from slotmamba_data.build_cli import add_build
from slotmamba_data.inspect_cli import PlanOf, add_inspect
from slotmamba_data.tokenizer_cli import add_tokenizer_command


def add_data_commands(subparsers: argparse._SubParsersAction[Any], plan_of: PlanOf | None = None) -> None:
    """Add `data` and its three commands; each leaf sets `handler`, a function from the namespace to an exit code.

    The handlers raise InputError for what the user can correct and OSError for what the system refused.

    Args:
        subparsers: of the command line.
        plan_of: opens the data of a recipe for `inspect`, which otherwise knows folders of shards only.
    """
    data = subparsers.add_parser("data", help="tokenizers and shards", description="Make and check training data.")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    add_tokenizer_command(commands)
    add_build(commands)
    add_inspect(commands, plan_of)
