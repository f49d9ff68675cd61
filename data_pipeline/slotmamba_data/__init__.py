"""Tokenizers, shards, recall samples and the global plan that orders a run's data.

The names below load when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slotmamba_data.build import build_mqar, build_text
    from slotmamba_data.mqar import PUBLISHED_TEST, PUBLISHED_TRAIN, MQARSamples, generate_mqar
    from slotmamba_data.mqar_spec import MQARSetting, MQARSpec
    from slotmamba_data.packing import DocumentPart, Row
    from slotmamba_data.plan import Plan, PlanReader, check_fingerprint, open_plan
    from slotmamba_data.prefetch import PrefetchReader
    from slotmamba_data.remote import RemoteSettings
    from slotmamba_data.schedule import WeightChange
    from slotmamba_data.shard_reader import ShardFolder, verify
    from slotmamba_data.shard_rows import Reading
    from slotmamba_data.shards import ShardWriter
    from slotmamba_data.sources import Source
    from slotmamba_data.text import open_text
    from slotmamba_data.tokenizer import StreamDecoder, Tokenizer
    from slotmamba_data.tokenizer_training import TokenizerReport, train_tokenizer

_MODULE_OF = {
    "PUBLISHED_TEST": "mqar",
    "PUBLISHED_TRAIN": "mqar",
    "DocumentPart": "packing",
    "MQARSamples": "mqar",
    "MQARSetting": "mqar_spec",
    "MQARSpec": "mqar_spec",
    "Plan": "plan",
    "PlanReader": "plan",
    "PrefetchReader": "prefetch",
    "Reading": "shard_rows",
    "RemoteSettings": "remote",
    "Row": "packing",
    "ShardFolder": "shard_reader",
    "ShardWriter": "shards",
    "Source": "sources",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "TokenizerReport": "tokenizer_training",
    "WeightChange": "schedule",
    "build_mqar": "build",
    "build_text": "build",
    "check_fingerprint": "plan",
    "generate_mqar": "mqar",
    "open_plan": "plan",
    "open_text": "text",
    "train_tokenizer": "tokenizer_training",
    "verify": "shard_reader",
}

__all__ = [
    "PUBLISHED_TEST",
    "PUBLISHED_TRAIN",
    "DocumentPart",
    "MQARSamples",
    "MQARSetting",
    "MQARSpec",
    "Plan",
    "PlanReader",
    "PrefetchReader",
    "Reading",
    "RemoteSettings",
    "Row",
    "ShardFolder",
    "ShardWriter",
    "Source",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerReport",
    "WeightChange",
    "build_mqar",
    "build_text",
    "check_fingerprint",
    "generate_mqar",
    "open_plan",
    "open_text",
    "train_tokenizer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
