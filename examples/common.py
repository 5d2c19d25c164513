"""What the examples share: loading a model and proving that it was loaded, and pictures to try them on."""

import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

SHAPES = ("background", "square", "disc")


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True, **kwargs)`, after which every weight is compared with the file.

    Args:
        name: `local-dir:FOLDER` or `hf-hub:USER/NAME`, with weights as safetensors.
        kwargs: More of `timm.create_model`, such as `features_only=True` (a list of the maps of the four stages) or
            `num_classes=0` (pooled features).

    Raises:
        ValueError: The model cannot be had, or some of its weights are not those of the file.
    """
    if not name.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(f"The model is '{name}', expected local-dir:FOLDER or hf-hub:USER/NAME.")
    try:
        # without pretrained=True timm builds the architecture and leaves the weights random
        model = timm.create_model(name, pretrained=True, **kwargs)
        cfg = model.pretrained_cfg
        if cfg.get("file"):
            stored = load_file(Path(cfg["file"]) / "model.safetensors")
        else:
            stored = timm.models.load_state_dict_from_hf(cfg["hf_hub_id"], "model.safetensors")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"The model '{name}' cannot be loaded ({type(e).__name__}: {e}).") from e
    if not hasattr(model, "feature_info"):
        raise ValueError(f"The model '{name}' is a {type(model).__name__}, expected a ConvNeXt; give its encoder.")
    for key, value in model.state_dict().items():
        original = re.sub(r"^(stem|stages)_", r"\1.", key)  # features_only makes stem_0 of stem.0
        if original not in stored or not torch.equal(value, stored[original]):
            raise ValueError(f"The weights of '{name}' have no {original} for this model, or it was not loaded.")
    return model


def draw(count: int, size: int, in_chans: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the embedded data set with a black square or a white disc drawn into each, at random.

    Returns:
        Images, float `[count, in_chans, size, size]` in 0..1, and the classes of their pixels, `[count, size, size]`,
        indices into `SHAPES`.
    """
    from timm_convnextv2.data import EmbeddedSource

    source = EmbeddedSource(count, size, in_chans=3 if in_chans == 3 else 1)
    images = torch.stack([source[i] for i in range(count)]).div(255).expand(-1, in_chans, -1, -1)
    shape = torch.randint(1, 3, (count, 1, 1))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1))
    centre = radius + (size - 2 * radius) * torch.rand(count, 2, 1)
    y, x = (torch.arange(size) - centre).abs().unbind(1)  # [count, size] each
    y, x = y[:, :, None], x[:, None, :]
    inside = torch.where(shape == 1, torch.maximum(y, x), torch.hypot(y, x)) < radius
    return torch.where(inside[:, None], shape[:, None] - 1.0, images), shape * inside
