"""What the examples share: images to try them on."""

import torch

SHAPES = ("background", "square", "disc")


def draw(count: int, size: int, in_chans: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the demo data with a black square or a white disc drawn into each, at random.

    Returns:
        Images, float `[count, in_chans, size, size]` in 0..1, and the classes of their pixels, `[count, size, size]`,
        indices into `SHAPES`.
    """
    from timm_convnextv2.data import DemoSource

    source = DemoSource(count, size, in_chans=3 if in_chans == 3 else 1)
    images = torch.stack([source[i] for i in range(count)]).div(255).expand(-1, in_chans, -1, -1)
    shape = torch.randint(1, 3, (count, 1, 1))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1))
    centre = radius + (size - 2 * radius) * torch.rand(count, 2, 1)
    y, x = (torch.arange(size) - centre).abs().unbind(1)  # [count, size] each
    y, x = y[:, :, None], x[:, None, :]
    inside = torch.where(shape == 1, torch.maximum(y, x), torch.hypot(y, x)) < radius
    return torch.where(inside[:, None], shape[:, None] - 1.0, images), shape * inside
