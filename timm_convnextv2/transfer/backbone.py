"""A timm model as the backbone of detection and segmentation: maps of its last stages, layer decay, and its record."""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Format
from timm.models import group_parameters, load_model_config_from_hf
from torch import Tensor, nn

from ..checkpoint import load_model
from ..checkpoint.loading import model_name, model_pixels
from ..checkpoint.provenance import Origin, config_beside, origin_of_config, read_config
from ..data import Pixels, load_image
from ..data.formats.pixels import PLAIN
from ..hub_errors import HUB_ERRORS, HubError, hub_error
from ..models import ConvNeXtV2

STAGES = 4
NOBODY = Origin()  # random weights


class Backbone(nn.Module):
    """The maps of the last four stages of a model from `timm.create_model(..., features_only=True)`.

    `spec` (`architecture` and `model_args`) makes the same model again without weights. Mean and std of the images in
    0..1, `img_size` and `pixels` (how stored values become pixels) are those of the weights' training; `origin` is
    their licence and base model.
    """

    def __init__(
        self, model: nn.Module, spec: dict[str, Any], *, mean: list[float], std: list[float], img_size: int,
        pixels: Pixels = PLAIN, origin: Origin = NOBODY
    ) -> None:  # fmt: skip
        super().__init__()
        info: Any = model.feature_info
        self.model, self.spec, self.mean, self.std, self.img_size = model, spec, list(mean), list(std), img_size
        self.pixels, self.origin = pixels, origin
        self.channels: list[int] = list(info.channels())[-STAGES:]
        self.strides: list[int] = list(info.reduction())[-STAGES:]
        self._channels_last = getattr(model, "output_fmt", None) == Format.NHWC  # Swin
        if sorted(set(self.strides)) != self.strides or len(self.strides) < 2:
            raise ValueError(
                f"The model '{spec['architecture']}' has maps of strides {self.strides}; expected stages of growing "
                "stride, as in ConvNeXt, Swin and ResNet."
            )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps `[B, channels[i], H / strides[i], W / strides[i]]`, finest first, of normalised images."""
        maps = self.model(images)[-STAGES:]
        return [x.permute(0, 3, 1, 2).contiguous() for x in maps] if self._channels_last else maps

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    def read_with(self, nodata: float | None) -> "Backbone":
        """Sets the nodata value in its record unless it is None, and returns itself."""
        if nodata is not None:
            self.pixels = self.pixels._replace(nodata=nodata)
        return self

    def load_image(self, path: str | os.PathLike) -> Tensor:
        """An image as in training, before normalisation: float `[C, H, W]`, integers scaled to 0..1."""
        return as_float(load_image(path, self.in_chans, self.pixels))

    def record(self) -> dict[str, Any]:
        """Plain values from which `open_backbone` makes the same backbone, without weights."""
        return dict(
            self.spec, mean=self.mean, std=self.std, img_size=self.img_size, pixels=self.pixels.record(),
            license=self.origin.license, base_model=self.origin.base_model,
        )  # fmt: skip

    def layer_ids(self, layer_decay_type: str = "group") -> tuple[dict[str, int], int]:
        """The layer of each parameter for layer decay, from the model's own `group_matcher`, and that of the heads.

        ConvNeXt V2 has two types: 'group', about three blocks per layer, as the paper transfers all sizes (appendix A.3
        and A.4), and 'single'. Other models have one.
        """
        with torch.device("meta"):  # only the whole model defines layers, features_only does not
            whole: Any = timm.create_model(self.spec["architecture"], pretrained=False, **self.spec["model_args"])
        if not hasattr(whole, "group_matcher"):
            raise ValueError(f"The model '{self.spec['architecture']}' has no layers for layer decay; pass 1 for none.")
        if isinstance(whole, ConvNeXtV2):
            whole.layer_decay_type = layer_decay_type
        found: Any = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        layers = {name.replace(".", "_"): layer for name, layer in found.items()}  # features_only has stem_0 for stem.0
        names = [name for name, _ in self.named_parameters()]
        ids = {name: layers[name.removeprefix("model.").removeprefix("model.").replace(".", "_")] for name in names}
        return ids, max(max(found.values()), max(ids.values()) + 1)


def as_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 as float in 0..1; floats unchanged."""
    return image.div(255) if image.dtype == torch.uint8 else image


def create_backbone(
    name: str, *, pretrained: bool = True, in_chans: int | None = None, drop_path_rate: float | None = None,
    **kwargs: Any
) -> Backbone:  # fmt: skip
    """A backbone with its weights, and with the record of pixels in the model's folder.

    `name` is a size (atto), a model of timm, the folder of a run, `local-dir:FOLDER` or `hf-hub:USER/NAME`. For another
    number of channels than the model's, timm adapts the first layer's weights, and all channels are normalised with the
    average of the model's means. `kwargs` go to `timm.create_model`.
    """
    if drop_path_rate is not None:
        kwargs["drop_path_rate"] = drop_path_rate
    name = model_name(name)
    architecture, own = _architecture(name)
    own_chans = own.get("in_chans", 3)
    chans = in_chans or own_chans
    try:
        if pretrained and chans == own_chans:
            model: Any = load_model(name, features_only=True, **kwargs)
        else:
            model = timm.create_model(name, pretrained=pretrained, features_only=True, in_chans=chans, **kwargs)
    except HubError:
        raise
    except HUB_ERRORS as e:
        raise hub_error(e, name.removeprefix("hf-hub:"), "weights", "give local-dir:FOLDER") from e
    except (RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"The model '{name}' cannot be created with features_only ({type(e).__name__}: {e}).") from e
    config = resolve_model_data_config(model)
    mean, std = (
        list(values) if len(values) == chans else [sum(values) / len(values)] * chans
        for values in (config["mean"], config["std"])
    )
    return Backbone(
        model, {"architecture": architecture, "model_args": {**own, **kwargs, "in_chans": chans}}, mean=mean, std=std,
        img_size=config["input_size"][-1], pixels=model_pixels(name, chans),
        origin=_origin(name, model.pretrained_cfg) if pretrained else NOBODY,
    )  # fmt: skip


def open_backbone(record: dict[str, Any]) -> Backbone:
    """The backbone of a `Backbone.record`, with random weights."""
    spec = {key: record[key] for key in ("architecture", "model_args")}
    model = timm.create_model(spec["architecture"], pretrained=False, features_only=True, **spec["model_args"])
    return Backbone(
        model, spec, mean=record["mean"], std=record["std"], img_size=record["img_size"],
        pixels=Pixels.from_record(record["pixels"]), origin=Origin(record["license"], record["base_model"]),
    )  # fmt: skip


def _origin(name: str, cfg: dict[str, Any]) -> Origin:
    """Licence and base model of the weights of a model of timm, a folder or a repository."""
    source, _, location = name.partition(":")
    key = {"local-dir": "file", "hf-hub": "hf_hub_id"}.get(source)
    if key is None:
        return origin_of_config(cfg, cfg.get("hf_hub_id"))
    return origin_of_config(config_beside({key: location}) or cfg, location if key == "hf_hub_id" else None)


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """The model's name in timm, and the arguments in its folder or repository."""
    source, _, location = name.partition(":")
    if not location and not timm.is_model(name):
        load_model(name)  # for its error message
    try:
        if source == "local-dir":
            config = read_config(Path(location) / "config.json", ours=False)
            architecture, own = config["architecture"], config.get("model_args")
        elif source == "hf-hub":
            _, architecture, own = load_model_config_from_hf(location)
        else:
            return name, {}
    except Exception:
        load_model(name)  # for its error message
        raise
    return architecture, dict(own or {})


def parameter_groups(
    model: nn.Module, backbone: Backbone, *, weight_decay: float, layer_decay: float = 1.0,
    layer_decay_type: str = "group"
) -> list[dict[str, Any]]:  # fmt: skip
    """Groups for an optimizer, with `lr_scale` and `names` beside `weight_decay` and `params`; no frozen parameters.

    Layer i of L in the backbone learns at `layer_decay ** (L - i)` of the rate, everything else at the full rate;
    vectors and scalars (biases, norms) have no weight decay. Source: `layer_wise` of the official code's
    `LearningRateDecayOptimizerConstructor` for mmdetection and mmsegmentation.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, expected a number above 0 and at most 1.")
    prefix = next((name for name, module in model.named_modules() if module is backbone), None)
    if prefix is None:
        raise ValueError("The backbone is not a part of the model.")
    scales: dict[str, float] = {}
    if layer_decay < 1:
        ids, top = backbone.layer_ids(layer_decay_type)
        scales = {f"{prefix}.{name}".lstrip("."): layer_decay ** (top - layer) for name, layer in ids.items()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale, decay = scales.get(name, 1.0), 0.0 if parameter.ndim <= 1 else weight_decay
            group = groups.setdefault((scale, decay), dict(params=[], names=[], lr_scale=scale, weight_decay=decay))
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())
