"""ConvNeXt V2 for `timm.create_model`: timm's ConvNeXt with blocks that also run on packed (visible) patches.

Paper: `ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders` - https://arxiv.org/abs/2301.00808

Parameter names and shapes, constructor arguments, pretrained configs and weights are those of
`timm.models.convnext`, so that a state dict moves between the two in both directions. The published weights are
CC-BY-NC 4.0.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from timm.layers import GlobalResponseNormMlp
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models import convnext as timm_convnext
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage, checkpoint_filter_fn
from torch import nn

from .ops import DepthwiseConv2d, PatchConv2d, TokenMlp

__all__ = ["ConvNeXtV2", "ConvNeXtV2Block", "ConvNeXtV2Stage", "VARIANTS"]

# depths, dims, and whether the token MLP is written as 1x1 Conv2d (timm: atto to nano)
VARIANTS: dict[str, dict[str, Any]] = {
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384), conv_mlp=True),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), conv_mlp=True),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), conv_mlp=True),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "huge": dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}


# Sizes whose published recipe decays the learning rate by groups of three blocks; the others by single blocks.
GROUPED_LAYER_DECAY = ("base", "large", "huge")


class Layout(Protocol):
    """What the mixer asks of a packed layout; `timm_convnextv2.masking.Visible` is one."""

    def mix(self, x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        """Applies `conv` to packed features `x` as if they lay in their image, and packs the result."""


class ConvNeXtV2Block(ConvNeXtBlock):
    """timm's `ConvNeXtBlock`, split into the mixer (which asks the layout) and the token MLP (which does not)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        ConvNeXtV2Block.adopt(self)

    @staticmethod
    def adopt(block: ConvNeXtBlock) -> None:
        """Turns timm's block into ours in place: parameters and their names stay."""
        block.__class__ = ConvNeXtV2Block
        DepthwiseConv2d.adopt(block.conv_dw)
        block.mlp_channels_last = not block.use_conv_mlp
        if type(block.mlp) is GlobalResponseNormMlp:
            TokenMlp.adopt(block.mlp)
            block.mlp_channels_last = True

    @torch.jit.unused
    def _fuses(self, x: torch.Tensor) -> bool:
        return isinstance(self.mlp, TokenMlp) and self.gamma is None and self.mlp.fuses(x, self.norm, self.drop_path)

    def _token_mlp(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._fuses(x):
                return self.mlp.fused(x, self.shortcut(shortcut), self.norm, self.drop_path)
        if self.use_conv_mlp:  # a norm for [B, C, H, W], else for [B, H, W, C]
            x = self.norm(x)
        if self.mlp_channels_last:
            x = x.permute(0, 2, 3, 1)
            if not self.use_conv_mlp:
                x = self.norm(x)
            x = self.mlp(x)
            x = x.permute(0, 3, 1, 2)
        else:
            x = self.mlp(x)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dense features `[B, C, H, W]`."""
        return self._token_mlp(self.conv_dw(x), x)

    def forward_packed(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Packed features in the layout's own shape (`[B, C, K * p, p]` for `Visible`)."""
        return self._token_mlp(layout.mix(x, self.conv_dw), x)


class ConvNeXtV2Stage(ConvNeXtStage):
    """timm's `ConvNeXtStage` with a packed path."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dense features."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._checkpointed(x, self.blocks)
        return self.blocks(x)

    def forward_packed(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Packed features; the downsampling convolution never crosses a patch border."""
        x = self.downsample(x)
        blocks = [partial(block.forward_packed, layout=layout) for block in self.blocks]
        if self.grad_checkpointing:
            return self._checkpointed(x, blocks)
        for block in blocks:
            x = block(x)
        return x

    def _checkpointed(self, x: torch.Tensor, forwards: Iterable[Callable]) -> torch.Tensor:
        """The fused token MLP recomputes what is large, four times as wide as the rest; other blocks, everything."""
        for block, forward in zip(self.blocks, forwards, strict=True):
            x = forward(x) if block._fuses(x) and block.mlp.recompute else checkpoint_seq([forward], x)
        return x


def _layer_id(name: str, depths: list[int], grouped: bool) -> int:
    """Official layer id of a parameter; see `ConvNeXtV2.group_matcher`."""
    block = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name)
    downsample = re.match(r"stages\.(\d+)\.downsample\.", name)
    if block:
        stage, index = int(block[1]), int(block[2])
    elif downsample or name.startswith("stem."):
        stage, index = int(downsample[1]) if downsample else 0, None
    else:  # norms after the last stage and the classifier
        stage, index = len(depths), 0
    if not grouped:
        return sum(depths[:stage]) + (index or 0) + 1
    last = 3 + math.ceil(depths[2] / 3)  # 12 where the official code has it
    if stage == 0:
        return 0 if index is None else 1
    if stage == 1:
        return 2
    if stage == 2:
        return 3 + (index or 0) // 3
    return last + stage - 3


class ConvNeXtV2(ConvNeXt):
    """timm's `ConvNeXt` with `ConvNeXtV2Block`s: the same arguments, parameters and numbers.

    `forward_packed` runs the feature extractor on visible patches only, and `group_matcher` gives the layers of the
    published layer-wise learning rate decay; everything else is timm's.

    Attributes:
        layer_decay_type: What one layer of that decay is, by the official names: 'single', a block, or 'group', about
            three blocks. `timm.create_model` sets 'group' for base, large and huge, as their recipes have it.
    """

    layer_decay_type = "single"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # timm builds its own block and stage classes and has no hook for others. Ours add methods and no state, so
        # the instances change class; weights and the random numbers drawn to initialise them stay timm's.
        for stage in self.stages:
            stage.__class__ = ConvNeXtV2Stage
            for module in stage.downsample.children():
                PatchConv2d.adopt(module)
            for block in stage.blocks:
                ConvNeXtV2Block.adopt(block)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], int]:
        """Layers of the official layer-wise learning rate decay, for `timm.optim.param_groups_layer_decay`.

        Source: `optim_factory.py` of the official repository. There, `base`, `large` and `huge` have 27 blocks in
        stage 2; other depths go on by the same rule. timm numbers the layers anew without gaps, which changes no
        learning rate: the decay counts from the last layer, and only the ids below the first one in use can be absent.

        Args:
            coarse: True gives timm's own coarse groups, the stem and whole stages.

        Returns:
            timm's patterns if `coarse`, else a function from a parameter's name to its layer id.
        """
        if coarse:
            return super().group_matcher(coarse=True)
        if self.layer_decay_type not in ("single", "group"):
            raise ValueError(f"layer_decay_type must be 'single' or 'group', got {self.layer_decay_type!r}.")
        depths = [len(stage.blocks) for stage in self.stages]
        return partial(_layer_id, depths=depths, grouped=self.layer_decay_type == "group")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes in the backward pass what takes most memory.

        With the fused token MLP (`ops.backend`) that is its pre-activation, a sixth more matrix products; else, as in
        timm, whole blocks, a third more work.
        """
        super().set_grad_checkpointing(enable)
        for mlp in (m for m in self.stages.modules() if isinstance(m, TokenMlp)):
            mlp.recompute = enable

    def forward_packed(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Features of packed pixels, in the layout's own shape.

        Args:
            x: Packed pixels, `[B, in_chans, K * stride, stride]` for `Visible`.
            layout: Puts the mixer's neighbourhood back together.

        Returns:
            Packed features of the last stage, `[B, num_features, K, 1]` for `Visible`.
        """
        x = self.stem(x)
        for stage in self.stages:
            x = stage.forward_packed(x, layout)
        return self.norm_pre(x)


def build_model(model_cls: type, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`timm.models.build_model_with_cfg`, with one clear error where the weights cannot be had.

    Raises:
        RuntimeError: Neither the Hub nor its cache has the weights; names the repository and the ways out.
    """
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    # the bases: `HTTPError` of the HTTP library that this huggingface_hub uses, and OSError (no network, no disk)
    except (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__) as e:
        from timm.models._builder import resolve_pretrained_cfg

        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not pretrained or not cfg.hf_hub_id or cfg.file or cfg.state_dict:
            raise
        raise hub_error(e, cfg.hf_hub_id, "weights", f"{variant}.{cfg.tag}" if cfg.tag else variant) from e


def hub_error(error: Exception, hub_id: str, what: str, name: str) -> RuntimeError:
    """The one message for a model that neither the Hub nor its cache gave.

    Args:
        error: What huggingface_hub or its HTTP library raised.
        hub_id: `user/name` or `user/name@revision`.
        what: What was to be had from there.
        name: The model's name in `timm.create_model`.
    """
    repo, _, revision = hub_id.partition("@")
    cause = error.__cause__ or error
    status = getattr(getattr(error, "response", getattr(cause, "response", None)), "status_code", None)
    reason = f"{type(cause).__name__}: {cause}".partition("\n")[0].rstrip(".: ")
    reason = re.sub(r"\?[^\s']*", "", reason)  # the address of a large file is signed: who has it needs no token
    if isinstance(error, RevisionNotFoundError):
        remedy = f"It has no revision '{revision or 'main'}': name a branch, a tag or a commit that it has."
    elif isinstance(error, EntryNotFoundError) and status == 404:
        remedy = "It has no model.safetensors, or the Hub did not answer when asked for it: see the log above."
    elif status in (401, 403, 404):
        remedy = (
            "Check the name. For a private or gated repository log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may read it."
        )
    else:
        remedy = (
            f"Try again later. Without network, download https://huggingface.co/{repo} elsewhere and pass its weights "
            f"file: timm.create_model('{name}', pretrained=True, "
            "pretrained_cfg_overlay=dict(file='/path/to/model.safetensors')), or set HF_HOME to a folder whose hub "
            "cache holds the repository. pretrained=False starts from random weights."
        )
    return RuntimeError(
        f"Could not get the {what} of '{hub_id}' from the Hugging Face Hub or its local cache ({reason}). {remedy}"
    )


def layer_decay_type(variant: str) -> str:
    """'group' or 'single', as the published recipe of a size has it, from a name that ends in the size."""
    return "group" if variant.endswith(GROUPED_LAYER_DECAY) else "single"


def filter_weights(state_dict: dict[str, Any], model: ConvNeXtV2) -> dict[str, Any]:
    """timm's filter, which also takes the encoder out of a whole FCMAE, and notices what it would leave random.

    With `--pretrained-path`, or a class count that differs, timm loads what happens to fit and only warns.

    Raises:
        RuntimeError: The weights do not cover the model; its head may be new.
    """
    if any(name.startswith("encoder.stem.") for name in state_dict):
        state_dict = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
    try:
        loaded = checkpoint_filter_fn(state_dict, model)
    except (KeyError, AttributeError):  # it looks foreign names up in the model, and takes every value for a tensor
        loaded = state_dict
    body = [name for name in model.state_dict() if not name.startswith("head.")]
    missing = [name for name in body if name not in loaded]
    if missing:
        raise RuntimeError(
            f"The weights have {len(body) - len(missing)} of the {len(body)} tensors of this ConvNeXt V2 without its "
            f"head; the first that is missing: '{missing[0]}'. The first names that came: {sorted(loaded)[:3]}. "
            "Expected: weights of a convnextv2_* of the same size, in timm's or the official names, or of an "
            "fcmae_convnextv2_*. Official pretraining checkpoints of the MinkowskiEngine code go through "
            "timm_convnextv2.checkpoint.convert_official first."
        )
    return loaded


def _create_convnextv2(variant: str, pretrained: bool = False, **kwargs) -> ConvNeXtV2:
    if kwargs.get("pretrained_cfg", "") == "fcmae":
        # as in timm: the fcmae weights have neither classifier nor `head.norm`
        kwargs.setdefault("pretrained_strict", False)
    model = build_model(
        ConvNeXtV2,
        variant,
        pretrained,
        pretrained_filter_fn=filter_weights,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )
    if isinstance(model, ConvNeXtV2):  # not where `features_only` wraps it
        model.layer_decay_type = layer_decay_type(variant)
    return model


# `register_model` looks for this name: every tag that timm knows
default_cfgs = {f"convnextv2_{name}": timm_convnext.default_cfgs[f"convnextv2_{name}"] for name in VARIANTS}


def register_variants(module_name: str, prefix: str, create: Callable[..., nn.Module]) -> None:
    """Defines and registers one timm entrypoint a variant, `prefix + name`, in the module that calls.

    Args:
        module_name: `__name__` of the module, where timm looks for `default_cfgs`.
        prefix: Start of the model names.
        create: Takes `(variant, pretrained, **kwargs)`.
    """
    module = sys.modules[module_name]
    for size, size_args in VARIANTS.items():
        name = f"{prefix}{size}"

        def entrypoint(pretrained: bool = False, _name=name, _size_args=size_args, **kwargs) -> nn.Module:
            return create(_name, pretrained, **{**_size_args, "use_grn": True, "ls_init_value": None, **kwargs})

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = module_name
        entrypoint.__doc__ = f"{name}: depths {size_args['depths']}, dims {size_args['dims']}."
        setattr(module, name, entrypoint)
        with warnings.catch_warnings():
            # replacing timm's own entries is what this package is for
            warnings.filterwarnings("ignore", message="Overwriting .* in registry", category=UserWarning)
            register_model(entrypoint)


register_variants(__name__, "convnextv2_", _create_convnextv2)
