"""What a device can do: `check_device` whether it is there, `keep_amp` whether mixed precision is fast on it."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..config import evolve, flat
from ..console import say

C = TypeVar("C")


def check_device(name: str) -> torch.device:
    """The device of that name, without creating a CUDA context; a ValueError if PyTorch does not know or see it."""
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs here")
    except (AssertionError, RuntimeError, NotImplementedError) as e:
        raise ValueError(f"--device {name} cannot be used: {str(e).splitlines()[0]}. Try --device cpu.") from e
    return device


def keep_amp(devices: str, asked: bool) -> bool:
    """Whether mixed precision stays on for these devices, separated by commas; tells where it is slow.

    It is then left out, unless the user `asked` for it by more than a file of options.
    """
    if "cpu" not in [name.strip() for name in devices.split(",")] or _has_bfloat16():
        return True
    # 12 to 14 times as long: benchmarks/results/pretrain_step_cpu_float32.csv
    slow = "this CPU has no instructions for bfloat16 and computes it ten times slower than float32"
    if asked:
        say(f"warning: --amp: {slow}. Leave it out.", error=True)
    else:
        say(f"--no-amp: {slow}.")
    return asked


def fit_amp(config: C, given: Mapping[str, Any]) -> C:
    """The config, whose options `given` the user set, by `keep_amp`."""
    values = flat(config)
    off = values.get("amp") and not keep_amp(values["device"], bool(given.get("amp")))
    return evolve(config, amp=False) if off else config


def _has_bfloat16() -> bool:
    """Whether PyTorch has fast kernels for bfloat16 on this CPU: what its own compiler asks."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
