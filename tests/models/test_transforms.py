"""Transforms of `torch.func`, and gradients of gradients, of an FCMAE."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from timm_convnextv2 import FCMAE, random_mask
from timm_convnextv2.ops import use_backend


@pytest.fixture
def model():
    return FCMAE(img_size=32, patch_size=1, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), decoder_dim=8).double()


@pytest.fixture
def loss(model):
    """The loss as a function of the parameters, and the parameters."""
    model.encoder.head.requires_grad_(False)
    images, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, (4, 4), 0.8)
    parameters = {k: v for k, v in model.named_parameters() if v.requires_grad}

    def of(values):
        return functional_call(model, values, (images, mask), {"return_pred": False}).loss

    return of, parameters


def squares(gradients):
    return sum((g**2).sum() for g in gradients)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_gradients_of_gradients(loss, backend):
    of, parameters = loss
    values = {k: v.detach() for k, v in parameters.items()}
    expected = grad(lambda p: squares(grad(of)(p).values()))(values)
    with use_backend(backend):
        first = torch.autograd.grad(of(parameters), [*parameters.values()], create_graph=True)
        found = torch.autograd.grad(squares(first), [*parameters.values()])
    once = grad(of)(values)
    for (name, value), here, twice in zip(expected.items(), first, found, strict=True):
        torch.testing.assert_close(here, once[name])
        torch.testing.assert_close(twice, value, msg=name)


def test_forward_mode_and_vmap(model):
    """`jvp` is the derivative along a direction, and `vmap` with one mask a loop over the images."""
    images, mask = torch.randn(3, 3, 32, 32, dtype=torch.float64), random_mask(1, (4, 4), 0.5)

    def loss(image):
        return model(image[None], mask, return_pred=False).loss

    direction = torch.randn_like(images[0])
    gradient = grad(loss)(images[0])
    torch.testing.assert_close(jvp(loss, (images[0],), (direction,))[1], (gradient * direction).sum())
    torch.testing.assert_close(vmap(loss)(images), torch.stack([loss(image) for image in images]))
    torch.testing.assert_close(vmap(grad(loss))(images)[0], gradient)
