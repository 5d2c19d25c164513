"""Small encoders on disk as fixtures, which `conftest` imports for all tests, and `embed` with options by name."""

import pytest
import timm
import torch

import timm_convnextv2  # noqa: F401  registers the models
from timm_convnextv2.checkpoint import export_encoder
from timm_convnextv2.config import build
from timm_convnextv2.features import embed as embedding
from timm_convnextv2.features.config import EmbedConfig

DIMS = [8, 16, 24, 32]


def make_encoder(folder, patch_size=1, info=None, **kwargs):
    """A small encoder with weights that no initialisation gives, exported to `folder`."""
    torch.manual_seed(0)
    size = dict(depths=(1, 1, 1, 1), dims=DIMS, decoder_dim=16, patch_size=patch_size, img_size=32 * patch_size)
    model = timm.create_model("fcmae_convnextv2_atto", **(size | kwargs))
    for value in model.parameters():
        with torch.no_grad():  # weights that pass on what the images differ in, biases that are not zero
            value += torch.randn_like(value) * (0.1 if value.ndim == 1 else 1.5 / value[0].numel() ** 0.5)
    export_encoder(model, folder, mean=[0.4] * model.in_chans, std=[0.3] * model.in_chans, info=info)
    return model.encoder.eval()


def embed(model, data_dir, output, **options):
    """Embeds on the CPU and in this process; `options` are those of the command."""
    places = {} if data_dir is None else {"data_dir": (str(data_dir),)}
    values = {"model": model, "output": str(output), "device": "cpu", "workers": 0, **places, **options}
    config = build(EmbedConfig, values)
    return embedding.embed(
        config.model, config.images, config.output, config.extraction, max_bad_images=config.max_bad_images,
        resume=config.resume, overwrite=config.overwrite,
    )  # fmt: skip


@torch.no_grad()
def maps_of(model, images):
    return model.forward_intermediates(images, intermediates_only=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module", params=[1, 4], ids=["patch 1", "patch 4"])
def exported(request, root):
    """(name for timm, the encoder itself, stride of its first map)."""
    folder = root / f"patch{request.param}"
    return f"local-dir:{folder}", make_encoder(folder, patch_size=request.param), request.param


@pytest.fixture(scope="module")
def small(root):
    make_encoder(root / "small")
    return f"local-dir:{root / 'small'}"
