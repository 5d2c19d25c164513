"""Every module can be imported: a name that a dependency's lowest version lacks shows here."""

import pkgutil
from importlib import import_module

import pytest

import timm_convnextv2

NAMES = [
    m.name for m in pkgutil.walk_packages(timm_convnextv2.__path__, "timm_convnextv2.") if "__main__" not in m.name
]


@pytest.mark.parametrize("name", NAMES)
def test_import(name):
    if name.startswith("timm_convnextv2.ops.triton"):
        pytest.importorskip("triton", reason="needs triton, which PyTorch brings along on Linux only")
    import_module(name)
