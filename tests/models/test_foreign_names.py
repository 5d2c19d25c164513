"""Weights under the names of transformers and MMPretrain, through the one filter."""

import re

import pytest
import timm
import torch
from helpers import assert_same
from safetensors.torch import save_file

import timm_convnextv2  # noqa: F401
from timm_convnextv2.registry import filter_weights

SHAPE = dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))

HUGGING_FACE = (
    (r"^stem\.0", "convnextv2.embeddings.patch_embeddings"), (r"^stem\.1", "convnextv2.embeddings.layernorm"),
    (r"^stages\.(\d)\.downsample\.", r"convnextv2.encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d)\.blocks\.(\d)\.norm", r"convnextv2.encoder.stages.\1.layers.\2.layernorm"),
    (r"^stages\.(\d)\.blocks\.", r"convnextv2.encoder.stages.\1.layers."), (r"conv_dw", "dwconv"),
    (r"mlp\.fc", "pwconv"), (r"mlp\.grn", "grn"), (r"^head\.norm", "convnextv2.layernorm"),
    (r"^head\.fc", "classifier"),
)  # fmt: skip
MMPRETRAIN = (
    (r"^stem\.", "backbone.downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"backbone.downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"backbone.stages.\1."), (r"conv_dw", "depthwise_conv"),
    (r"mlp\.fc", "pointwise_conv"), (r"mlp\.grn\.weight", "grn.gamma"), (r"mlp\.grn\.bias", "grn.beta"),
    (r"^head\.norm", "backbone.norm3"),
)  # fmt: skip


def renamed(model, rules):
    """The model's weights in the names and shapes of the other library."""
    weights = {}
    for name, value in model.state_dict().items():
        if "grn" in name and rules is HUGGING_FACE:
            value = value.reshape(1, 1, 1, -1)
        if ".mlp.fc" in name and value.ndim == 4:
            value = value.flatten(1)  # they have linear layers
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        weights[name] = value.contiguous()
    return weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", num_classes=5, **SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("rules", [HUGGING_FACE, MMPRETRAIN], ids=["transformers", "mmpretrain"])
@pytest.mark.parametrize("part", ["classifier", "backbone alone"])
def test_classifier_and_encoder_take_them(rules, part, model, tmp_path):
    weights = renamed(model, rules)
    if part == "backbone alone":
        prefix = "convnextv2." if rules is HUGGING_FACE else "backbone."
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        extra = "hidden_states_norms.stage1.weight" if rules is HUGGING_FACE else "norm0.weight"
        weights[extra] = torch.ones(8)
    expected = {k: v for k, v in model.state_dict().items() if part == "classifier" or not k.startswith("head.fc")}
    assert_same(dict(sorted(filter_weights(weights, model).items())), dict(sorted(expected.items())))

    save_file(weights, tmp_path / "weights.safetensors")
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.safetensors")), **SHAPE)
    fcmae = timm.create_model("fcmae_convnextv2_atto", img_size=64, decoder_dim=8, **options)
    backbone = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    loaded = fcmae.encoder.state_dict()
    assert_same({k: loaded[k] for k in backbone}, backbone)


@pytest.mark.parametrize("rules", [HUGGING_FACE, MMPRETRAIN], ids=["transformers", "mmpretrain"])
def test_weights_that_do_not_fit_are_one_error_with_the_names_that_came(rules, model):
    weights = renamed(model, rules)
    first = min(weights)
    weights.pop(next(name for name in weights if "stages.2" in name))
    with pytest.raises(ValueError, match=f"{re.escape(first)}.*'stages.2.\\S+' is missing"):
        filter_weights(weights, model)
