"""Channels-last from end to end: no layer of a step copies a feature map into another memory layout."""

import math

import pytest
import timm
import torch

import timm_convnextv2  # noqa: F401  (registers the models)

COPIES = ("aten::copy_", "aten::clone", "aten::_to_copy")
# what these copy is their own affair: a bias into the output, that more is then added to
MEANT = ("aten::addmm", "aten::linear", "aten::baddbmm_", "aten::scatter")
# within these, what kernel columns beside the middle see
SHIFTED = ("timm_convnextv2::depthwise_backward", "timm_convnextv2::window_depthwise_backward")


def map_copies(step, parameters, least: int) -> list[tuple[str, list[int]]]:
    """Copies of at least `least` numbers in one step, but for those of parameters and those that are meant."""
    step()
    shapes = {tuple(p.shape) for p in parameters} | {tuple(p.flatten(1).shape) for p in parameters if p.ndim > 1}
    shapes |= {tuple(p.permute(0, 2, 3, 1).shape) for p in parameters if p.ndim == 4}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    found = []
    for event in profiler.events():
        if event.name in COPIES and event.input_shapes and event.input_shapes[0]:
            shape, parent, inside = event.input_shapes[0], event.cpu_parent, False
            meant = parent is not None and parent.name in MEANT
            nested = parent is not None and parent.name in COPIES
            while parent is not None and not inside:
                inside, parent = parent.name in SHIFTED, parent.cpu_parent
            if math.prod(shape) >= least and tuple(shape) not in shapes and not meant and not nested and not inside:
                found.append((event.name, shape))
    return found


@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_dense_training_step(size):
    model = timm.create_model(f"convnextv2_{size}", num_classes=0)
    images = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)
    grad = torch.randn(2, model.num_features, 3, 3).to(memory_format=torch.channels_last)
    copies = map_copies(lambda: model.forward_features(images).backward(grad), list(model.parameters()), grad.numel())
    assert copies == []


@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_pretraining_step(size):
    """But for packing the visible pixels and the removed ones, the loss's target, and one downsampling's patches."""
    model = timm.create_model(f"fcmae_convnextv2_{size}", img_size=128, decoder_dim=64)
    images = torch.randn(2, 3, 128, 128)
    layout = model.visible(images)
    copies = map_copies(
        lambda: model(images, layout, return_pred=False).loss.backward(), list(model.parameters()), 2 * 6 * 64
    )
    downsampled = [2, 6 * 2, 2, 2, 2, model.encoder.feature_info[1]["num_chs"]]
    forward = [[2, 6, 32, 32, 3], downsampled, [2, 10, 32, 32, 3]]
    assert [shape for _, shape in copies] == [*forward, downsampled]
