"""`check_device`: whether this machine has a device."""

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
