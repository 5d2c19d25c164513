"""FCMAE: fully convolutional masked autoencoder around a timm ConvNeXt V2.

Paper: section 3 of https://arxiv.org/abs/2301.00808. Reference code: `models/fcmae.py` of
https://github.com/facebookresearch/ConvNeXt-V2, with GRN's statistics per image, as in the code that trained the
published weights (there: per batch; see its issue 86).

Data flow and shapes: images `[B, C, H, W]` -> mask `[B, h, w]`, True = removed -> strip of visible pixels
`[B, C, K * stride, stride]` -> encoder `[B, D, K, 1]` -> projected tokens in the grid, mask token elsewhere
`[B, h * w, decoder_dim]` -> decoder block -> predicted pixels of the removed patches
`[B, h * w - K, stride^2 * C]` -> loss.
"""

import inspect
import logging
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn
from timm.task import TrainingTask
from torch import nn

from .convnextv2 import (
    VARIANTS,
    ConvNeXtV2,
    ConvNeXtV2Block,
    build_model,
    hub_error,
    layer_decay_type,
    register_variants,
)
from .convnextv2 import default_cfgs as encoder_cfgs
from .masking import Visible, check_mask, num_visible, random_mask
from .provenance import config_beside, origin_of_config

__all__ = ["FCMAE", "FCMAEOutput", "FCMAETask", "normalize_target", "patchify", "unpatchify"]

_logger = logging.getLogger(__name__)


class FCMAEOutput(NamedTuple):
    """What a forward pass of `FCMAE` returns.

    Attributes:
        loss: Scalar, mean squared error over the pixels of the removed patches; float32, or float64 for float64 images.
        pred: Predicted pixels of every patch, `[B, h * w, stride^2 * C]`, in (row, column, channel) order, in the
            units of the target (normalised per patch where `norm_pix_loss`); None where not asked for.
        mask: Bool `[B, h, w]`, True = removed.
    """

    loss: torch.Tensor
    pred: torch.Tensor | None
    mask: torch.Tensor


def patchify(images: torch.Tensor, stride: int) -> torch.Tensor:
    """`[B, C, H, W]` as patches `[B, h * w, stride^2 * C]`, pixels in (row, column, channel) order."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // stride, stride, W // stride, stride)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, stride * stride * C)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], stride: int) -> torch.Tensor:
    """The inverse of `patchify`: `[B, h * w, stride^2 * C]` as images `[B, C, h * stride, w * stride]`."""
    h, w = grid
    x = patches.reshape(patches.shape[0], h, w, stride, stride, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, h * stride, w * stride)


def normalize_target(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises each patch (last axis) with its mean and *unbiased* variance (official `forward_loss`).

    Returns:
        The normalised patches, and the mean and standard deviation `[..., 1]` that undo it: `x * std + mean`.
    """
    n = patches.shape[-1]
    shrink = (n - 1) / n  # the biased variance, which LayerNorm takes, over the unbiased one
    normal, mean, rstd = torch.native_layer_norm(patches, [n], None, None, 1e-6 * shrink)
    return normal * shrink**0.5, mean, 1 / (rstd * shrink**0.5)


class FCMAE(nn.Module):
    """Masked autoencoder whose encoder computes the visible patches only.

    Args:
        img_size: Nominal image size, an int or (H, W), for checks and records; `forward` takes any multiple of the
            stride.
        in_chans: Number of image channels.
        patch_size: Stem patch size, 1 to 7. The mask's patch is the encoder's total stride (`stride`): 8 x
            `patch_size`; 32 for `patch_size` 2 too, where timm's ConvNeXt adds a downsampling layer.
        mask_ratio: Share of patches to remove where no mask is given.
        decoder_depth: Number of decoder blocks, at least 1.
        decoder_dim: Width of the decoder.
        norm_pix_loss: Normalise the target per patch.
        **encoder_kwargs: Passed to `ConvNeXtV2` (`depths`, `dims`, `kernel_sizes`, `drop_path_rate`, ...).

    Raises:
        ValueError: Sizes that do not divide, a mask ratio that is not in (0, 1), or encoder options that mix patches
            outside the mixer (`stem_type` other than 'patch', `output_stride` below 32).
    """

    base_model: str | None = None  # the model on the Hub that the weights started from; timm's factory sets it

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 4,
        mask_ratio: float = 0.6,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        norm_pix_loss: bool = True,
        num_classes: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **encoder_kwargs,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(
                f"An FCMAE model has no classifier, got num_classes={num_classes}. Pretrain without it, export "
                "`model.encoder`, and give num_classes to the exported model."
            )
        for option, needed in (("stem_type", "patch"), ("output_stride", 32)):
            if encoder_kwargs.get(option, needed) != needed:
                raise ValueError(
                    f"The sparse encoder needs {option}={needed!r}, where only the mixer crosses patch borders; got "
                    f"{encoder_kwargs[option]!r}. Other values work in the dense convnextv2_* models."
                )
        if decoder_depth < 1:
            raise ValueError(
                f"decoder_depth={decoder_depth}: without a decoder block masked patches never see the visible ones, "
                "and the encoder learns nothing. The paper uses 1."
            )
        dd = {"device": device, "dtype": dtype}
        self.encoder = ConvNeXtV2(in_chans=in_chans, patch_size=patch_size, num_classes=0, **encoder_kwargs, **dd)
        for stage in self.encoder.stages:
            for conv in (m for m in stage.downsample.modules() if isinstance(m, nn.Conv2d)):
                if conv.kernel_size != conv.stride:
                    raise ValueError(
                        f"patch_size={patch_size} is too large: from 8 on, timm's ConvNeXt dilates its last "
                        "downsampling layer, which then crosses patch borders. The published models have 4."
                    )
            if any(k % 2 == 0 for block in stage.blocks for k in block.conv_dw.kernel_size):
                raise ValueError(f"The mixer needs odd kernel_sizes, got {encoder_kwargs['kernel_sizes']}.")
        self.stride = self.encoder.feature_info[-1]["reduction"]
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans = in_chans
        self.num_classes = 0
        self.num_features = self.encoder.num_features
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        num_visible(self.grid(*self.img_size), mask_ratio)  # both checks, before anything is built on them

        self.proj = nn.Conv2d(self.num_features, decoder_dim, kernel_size=1, **dd)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1, **dd))
        self.decoder = nn.Sequential(
            *[ConvNeXtV2Block(decoder_dim, use_grn=True, ls_init_value=None, **dd) for _ in range(decoder_depth)]
        )
        self.pred = nn.Conv2d(decoder_dim, self.stride**2 * in_chans, kernel_size=1, **dd)
        for module in (self.proj, *self.decoder.modules(), self.pred):
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Image size in patches.

        Raises:
            ValueError: The stride does not divide the size; names the nearest sizes that work.
        """
        s = self.stride
        if height % s or width % s or min(height, width) < s:
            raise ValueError(
                f"Image size {height}x{width} (height x width) is not a multiple of the encoder's stride {s}; the "
                f"nearest that work: {self._nearest_sizes(height, width)}. A smaller stem `patch_size` gives a "
                "smaller stride."
            )
        return height // s, width // s

    def _nearest_sizes(self, height: int, width: int) -> str:
        """Sizes around one that does not fit, among those whose grid `mask_ratio` can split in two."""
        s = self.stride
        for more in range(1, 65):  # a high ratio needs more patches than the nearest multiples have
            pairs = product(*({max(s, v // s * s), -(-v // s) * s, (v // s + more) * s} for v in (height, width)))
            fits = [(h, w) for h, w in pairs if 0 < int(h * w // s**2 * (1 - self.mask_ratio)) < h * w // s**2]
            if height == width:
                fits = [(h, w) for h, w in fits if h == w]
            if fits:
                fits.sort(key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
                return " or ".join(f"{h}x{w}" for h, w in fits[:2])
        return f"multiples of {s}"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes in the backward pass what takes most memory; see `ConvNeXtV2.set_grad_checkpointing`."""
        self.encoder.set_grad_checkpointing(enable)

    def visible(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> Visible:
        """The layout of a batch, from a mask that is given (and checked) or drawn with `self.mask_ratio`.

        Args:
            images: `[B, in_chans, H, W]`.
            mask: Bool `[B, h, w]`, True = removed.

        Raises:
            ValueError: See `grid`, `masking.check_mask` and `masking.num_visible`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            raise ValueError(
                f"images must be float [B, {self.in_chans}, H, W], got {images.dtype} {list(images.shape)}. The number "
                "of channels is set with timm.create_model(..., in_chans=...)."
            )
        grid = self.grid(*images.shape[-2:])
        if mask is None:
            keep = num_visible(grid, self.mask_ratio)
            mask = random_mask(images.shape[0], grid, self.mask_ratio, device=images.device)
        else:
            keep = check_mask(mask, images.shape[0], grid)
        return Visible(mask, keep, device=images.device)

    def forward_encoder(self, images: torch.Tensor, layout: Visible) -> torch.Tensor:
        """Features of the visible patches, in `layout.ids` order: `[B, K, num_features]`."""
        x = self.encoder.forward_packed(layout.pack(images, self.stride), layout)
        return x.squeeze(-1).transpose(1, 2)

    def forward_decoder(self, x: torch.Tensor, layout: Visible) -> torch.Tensor:
        """Decoded features of all patches, `[B, h * w, decoder_dim]`, from visible tokens `[B, K, num_features]`."""
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
        x = layout.unpack(x, self.mask_token.flatten())
        x = x.view(x.shape[0], *layout.grid, -1).permute(0, 3, 1, 2)
        return self.decoder(x).permute(0, 2, 3, 1).flatten(1, 2)

    def forward(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | Visible | None = None,
        return_pred: bool = True,
    ) -> FCMAEOutput:
        """Masks, encodes, decodes, and compares the removed patches with the image.

        Args:
            images: Float `[B, in_chans, H, W]`, H and W multiples of `stride`.
            mask: Bool `[B, h, w]`, True = removed, the same number in each image; drawn where None. A `Visible`
                from `self.visible(images, mask)` is taken as it is: its checks are done, so that a compiled forward
                has static shapes and nothing to wait for.
            return_pred: Predict the visible patches too. Without, `pred` is None and only the removed patches, all
                that the loss needs, go through the prediction layer.

        Raises:
            ValueError: See `visible`; also a mask without a visible or without a removed patch.
        """
        layout = mask if isinstance(mask, Visible) else self.visible(images, mask)
        if not 0 < layout.num_visible < layout.grid[0] * layout.grid[1]:
            raise ValueError(
                f"The loss needs at least one visible and one masked patch in each image; this mask leaves "
                f"{layout.num_visible} of {layout.grid[0] * layout.grid[1]} visible. For features of whole images "
                "use `model.encoder` or `forward_encoder`."
            )
        x = self.forward_decoder(self.forward_encoder(images, layout), layout)
        weight, bias = self.pred.weight.flatten(1), self.pred.bias
        pred = F.linear(x, weight, bias) if return_pred else None
        pred_masked = F.linear(layout.take_masked(x), weight, bias) if pred is None else layout.take_masked(pred)

        dtype = torch.promote_types(images.dtype, torch.float32)
        target = layout.masked_patches(images, self.stride).to(dtype)
        if self.norm_pix_loss:
            target, _, _ = normalize_target(target)
        loss = F.mse_loss(pred_masked.to(dtype), target)
        return FCMAEOutput(loss, pred, layout.mask)


class FCMAETask(TrainingTask):
    """timm `TrainingTask` for FCMAE: DDP, compile, EMA and checkpoint state are timm's.

    Args:
        model: The model to train. The head of its encoder is left over from timm's ConvNeXt and takes no part in
            pretraining, so it is frozen here; DDP would wait for its gradients.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: Enable info logging.
    """

    def __init__(
        self,
        model: FCMAE,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        model.encoder.head.requires_grad_(False)
        self.trainable_module = model
        self._layout = model.visible  # outlives the DDP and compile wrappers

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> "FCMAETask":
        """Wraps the model in DistributedDataParallel."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs) -> nn.Module:
        """Compiles the model, before DDP wrapping."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def forward(self, input: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Loss of a batch.

        Args:
            input: Images `[B, C, H, W]`.
            target: Masks, bool `[B, h, w]`, True = removed; drawn where None. Masks on the CPU are checked there,
                without waiting for the GPU.

        Returns:
            Dictionary with 'loss' (scalar) and 'mask'.
        """
        output = self.trainable_module(input, self._layout(input, target), return_pred=False)
        return {"loss": output.loss, "mask": output.mask}


def _fcmae_cfg(name: str) -> dict:
    """Pretrained cfg of `fcmae_convnextv2_{name}`: the published encoder, where there is one."""
    published = encoder_cfgs[f"convnextv2_{name}"].cfgs.get("fcmae")
    cfg = {"input_size": (3, 224, 224), "interpolation": "bicubic"}
    if published is not None:
        cfg = {**published.to_dict(), "url": None, "hf_hub_id": f"timm/convnextv2_{name}.fcmae"}
    return {**cfg, "num_classes": 0, "first_conv": "encoder.stem.0", "classifier": None}


def _options_of(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """The options of an FCMAE that shape its weights, read from them."""
    stem = state_dict["encoder.stem.0.weight"]
    return {
        "in_chans": stem.shape[1],
        "patch_size": stem.shape[-1],
        "decoder_dim": state_dict["mask_token"].shape[1],
        "decoder_depth": len({k.split(".")[1] for k in state_dict if k.startswith("decoder.")}),
    }


def _filter_fn(state_dict: dict[str, torch.Tensor], model: FCMAE) -> dict[str, torch.Tensor]:
    """Makes whole FCMAE weights of what was loaded: those of an FCMAE as they are, an encoder's with a fresh decoder.

    Raises:
        RuntimeError: The weights do not cover the encoder, or are an FCMAE's of another shape.
    """
    own = model.state_dict()
    if "encoder.stem.0.weight" in state_dict and "mask_token" in state_dict:
        different = [k for k in sorted(own.keys() | state_dict.keys()) if k not in own or k not in state_dict]
        different += [k for k, v in own.items() if k in state_dict and state_dict[k].shape != v.shape]
        if different:
            there, here = _options_of(state_dict), _options_of(own)
            options = [f"{k}={v} there, {here[k]} asked for" for k, v in there.items() if v != here[k]]
            raise RuntimeError(
                f"The FCMAE weights do not fit the model that was asked for: {'; '.join(options) or different[0]}. "
                "Leave these options out to get the model as it was trained; its encoder alone adapts to other "
                "in_chans."
            )
        return state_dict
    loaded = {f"encoder.{k}": v for k, v in checkpoint_filter_fn(state_dict, model.encoder).items()}
    loaded = {k: v for k, v in loaded.items() if not k.startswith("encoder.head.")}
    missing = [k for k in own if k.startswith("encoder.") and not k.startswith("encoder.head.") and k not in loaded]
    if missing:
        raise RuntimeError(f"The weights lack {len(missing)} parameters of the encoder, the first: {missing[0]}.")
    name = model.pretrained_cfg.get("hf_hub_id") or ""
    which = "the published encoder. No decoder was published" if name.startswith("timm/") else "an encoder alone"
    _logger.warning(f"Loaded {which}: the decoder starts from random weights.")
    return {**own, **loaded}


def _create_fcmae(variant: str, pretrained: bool = False, **kwargs) -> FCMAE:
    if kwargs.pop("features_only", False):
        raise ValueError(
            f"'{variant}' is the pretraining wrapper; use '{variant.removeprefix('fcmae_')}' for features_only=True."
        )
    if pretrained and kwargs.get("pretrained_cfg_overlay"):
        kwargs = _options_of_folder(variant, kwargs)
    model = build_model(
        FCMAE,
        variant,
        pretrained,
        pretrained_filter_fn=_filter_fn,
        kwargs_filter=("global_pool",),
        **kwargs,
    )
    _describe_encoder(model, variant.removeprefix("fcmae_"), pretrained, kwargs)
    return model


def _own_options(variant: str) -> dict[str, Any]:
    """What the entrypoint of a variant passes for itself."""
    return {**VARIANTS[variant.rpartition("_")[2]], "use_grn": True, "ls_init_value": None}


def _options_of_folder(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with what the `config.json` beside the weights of a `pretrained_cfg_overlay` adds to them.

    timm reads that file for `local-dir:` and `hf-hub:` names only. From it come the model's options, where they are
    not given, and normalisation, licence and origin: the ones registered for `variant` are of the published weights.
    """
    overlay = kwargs["pretrained_cfg_overlay"]
    try:
        config = config_beside(overlay, kwargs.get("cache_dir"))
    except (OSError, HfHubHTTPError) as e:
        raise hub_error(e, overlay["hf_hub_id"], "config.json", variant) from e
    if config is None:
        return kwargs
    if config["architecture"] not in (variant, variant.removeprefix("fcmae_")):
        raise ValueError(
            f"The weights in {overlay.get('file') or overlay.get('hf_hub_id')} are of a {config['architecture']}, not "
            f"of the {variant} that was asked for."
        )
    kwargs, own = dict(kwargs), _own_options(variant)
    for key, value in config.get("model_args", {}).items():
        given = key in kwargs and not (key in own and kwargs[key] == own[key])
        if key not in ("num_classes", "global_pool") and not given:
            kwargs[key] = tuple(value) if isinstance(value, list) else value
    cfg, origin = config.get("pretrained_cfg", {}), origin_of_config(config)
    about = {k: cfg[k] for k in ("input_size", "interpolation", "crop_pct", "mean", "std") if k in cfg}
    about |= {"license": origin.license, "origin_url": origin.url, "tag": cfg.get("tag"), "hf_hub_id": None}
    kwargs["pretrained_cfg_overlay"] = {**about, **overlay}
    return kwargs


def _describe_encoder(model: FCMAE, name: str, pretrained: bool, kwargs: dict[str, Any]) -> None:
    """Gives `model.encoder` what timm's factory would have given it, for `timm.models.save_for_hf`.

    `_model_args` are the options that differ from those of the variant `name`. `pretrained_cfg` describes the
    encoder's own weights: licence and origin of those that were loaded are in it only where some were.
    """
    model.encoder.layer_decay_type = layer_decay_type(name)
    source = model.pretrained_cfg
    keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
    if pretrained:
        keep += ("license", "origin_url", "paper_name", "paper_ids")
    model.encoder.pretrained_cfg = model.encoder.default_cfg = {
        **{k: source[k] for k in keep if k in source},
        "architecture": name,
        "num_classes": 0,
        "input_size": (model.in_chans, *model.img_size),
        "fixed_input_size": False,
        "pool_size": model.grid(*model.img_size),
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
    if pretrained:
        model.base_model = (source.get("hf_hub_id") or "").partition("@")[0] or None
        if source.get("file"):
            config = config_beside(source)
            model.base_model = origin_of_config(config).base_model if config else model.base_model
    own = _own_options(name)
    options = inspect.signature(ConvNeXt.__init__).parameters.keys() - {"device", "dtype"}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k in options}
    model.encoder._model_args = {k: v for k, v in given.items() if k not in own or v != own[k]}


default_cfgs = generate_default_cfgs(
    {
        f"fcmae_convnextv2_{name}" + (".fcmae" if name != "small" else ".untrained"): _fcmae_cfg(name)
        for name in VARIANTS
    }
)
register_variants(__name__, "fcmae_convnextv2_", _create_fcmae)
