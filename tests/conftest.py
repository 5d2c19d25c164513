"""Shared by all tests."""

import functools
import os

# Before torch and huggingface_hub are imported, and for the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: on a shared machine threads spin more than they work

import pytest  # noqa: E402
import torch  # noqa: E402
from encoders import exported, root, small  # noqa: E402, F401  fixtures
from kernels import as_backend, kernels  # noqa: E402, F401
from real import demo, detected, pretrained, segmented  # noqa: E402, F401

from timm_convnextv2.data import DemoSource  # noqa: E402
from timm_convnextv2.runs import device  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda number: None  # 8 ms per file of a run, and no test cuts the power


# nearly all runs of pretraining read the same images, which take a fifth of their time to draw
draw = DemoSource._draw
_drawn = functools.lru_cache(256)(
    lambda seed, size, objects, i: draw(DemoSource(i + 1, size, 3, seed, objects=objects), i)
)
DemoSource._draw = functools.wraps(draw)(lambda self, i: _drawn(self.seed, self.size, self.objects, i))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fast_bfloat16(monkeypatch):
    """Recipes keep their mixed precision on every CPU that runs the tests."""
    monkeypatch.setattr(device, "_has_bfloat16", lambda: True)


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """As on a CPU that has no instructions for bfloat16."""
    monkeypatch.setattr(device, "_has_bfloat16", lambda: False)


@pytest.fixture
def run_publish(capsys):
    """Runs `timm-convnextv2 publish`: exit status, stdout, stderr."""
    from timm_convnextv2.commands import publish

    def call(*arguments):
        status = publish.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call
