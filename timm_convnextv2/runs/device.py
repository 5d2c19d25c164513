"""What a device can do: `check_device` whether it is there, `slow_amp` whether mixed precision is slow on it."""

import torch


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


def slow_amp(names: str) -> str:
    """Why mixed precision is slow on one of these devices, separated by commas; '' if it is not."""
    if "cpu" not in [name.strip() for name in names.split(",")] or _has_bfloat16():
        return ""
    # 12 to 14 times as long: benchmarks/results/pretrain_step_cpu_float32.csv
    return "this CPU has no instructions for bfloat16 and computes it ten times slower than float32"


def _has_bfloat16() -> bool:
    """Whether PyTorch has fast kernels for bfloat16 on this CPU: what its own compiler asks."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
