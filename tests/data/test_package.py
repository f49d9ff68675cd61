from __future__ import annotations

import subprocess
import sys

import pytest

import slotmamba_data


def test_every_exported_name_loads() -> None:
    for name in slotmamba_data.__all__:
        assert getattr(slotmamba_data, name).__class__ is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        slotmamba_data.Nothing  # noqa: B018


def test_no_torch_and_nothing_heavy_at_import() -> None:
    code = (
        "import sys, slotmamba_data, slotmamba_data.cli\n"
        "assert not {'numpy', 'sentencepiece', 'torch', 'slotmamba', 'slotmamba_kernels'} & sys.modules.keys()\n"
        "[getattr(slotmamba_data, name) for name in slotmamba_data.__all__]\n"
        "assert not {'torch', 'slotmamba', 'slotmamba_kernels', 'webdataset'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
