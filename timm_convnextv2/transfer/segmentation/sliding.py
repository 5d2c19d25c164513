"""Inference of a segmenter: sliding windows, several scales, flips."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .heads import resize

Model = Callable[[Tensor], Tensor]


def slide(model: Model, images: Tensor, window: int, stride: int | None = None) -> Tensor:
    """Logits `[B, K, H, W]` as the mean over windows of `window` pixels that cover the images `[B, C, H, W]`.

    The last window of a row and of a column ends at the image's edge; a smaller image is one window. `stride` is two
    thirds of the window if None, as in the official code.
    """
    stride = max(1, window * 2 // 3) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"The stride of the windows is {stride}, expected 1 to {window}, the window's side.")
    height, width = images.shape[-2:]
    total, counts = None, images.new_zeros(height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            area = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[area])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[area] += logits
            counts[area] += 1
    assert total is not None
    return total / counts


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def predict(
    model: Model, images: Tensor, *, scales: Sequence[float] = (1.0,), flip: bool = False, window: int | None = None,
    stride: int | None = None, size: tuple[int, int] | None = None
) -> Tensor:  # fmt: skip
    """Class probabilities `[B, K, height, width]` of images `[B, C, H, W]` as the mean over scales and flips.

    The model makes logits `[B, K, h, w]` in eval mode. Scales are factors of the images' size; the paper's multi-scale
    test has 0.75 to 1.25. `window` and `stride` are those of `slide`, None for whole images; `size` is the height and
    width of the result, by default the images'.
    """
    if not scales or any(scale <= 0 for scale in scales):
        raise ValueError(f"The scales are {list(scales)}, expected one or more numbers above 0.")
    height, width = images.shape[-2:]
    size = size or (height, width)
    total: Tensor | None = None
    for scale in scales:
        shape = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = images if shape == (height, width) else resize(images, shape)
        for mirrored in (False, True) if flip else (False,):
            x = scaled.flip(-1) if mirrored else scaled
            logits = model(x) if window is None else slide(model, x, window, stride)
            logits = logits.flip(-1) if mirrored else logits
            logits = logits if logits.shape[-2:] == size else resize(logits, size)
            part = logits.softmax(1)
            total = part if total is None else total + part  # a sum, as the parts do not all fit in memory
    assert total is not None
    return total / (len(scales) * (2 if flip else 1))
