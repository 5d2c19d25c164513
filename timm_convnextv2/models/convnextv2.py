"""ConvNeXt V2 (https://arxiv.org/abs/2301.00808): timm's ConvNeXt with blocks that also run on packed patches.

Parameter names and shapes and constructor arguments are those of `timm.models.convnext`, so that a state dict moves
between the two in both directions.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from timm.layers import GlobalResponseNormMlp
from timm.models import checkpoint_seq
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from ..layers import DepthwiseConv2d, LayerNorm, LayerNorm2d, PatchConv2d, TokenMlp


class Layout(Protocol):
    """The part of a packed layout that the mixer uses; `models.packing.PackedLayout` implements it."""

    def mix(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Applies `conv` to packed features `x` at their positions in the image, and packs the result."""
        ...


class ConvNeXtV2Block(ConvNeXtBlock):
    """timm's `ConvNeXtBlock`, split into the mixer, which depends on the layout, and the token MLP, which does not."""

    if TYPE_CHECKING:  # nn.Module types them as Tensor | Module
        conv_dw: Any
        mlp: Any
        mlp_channels_last: bool

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        ConvNeXtV2Block.adopt(self)

    @staticmethod
    def adopt(block: ConvNeXtBlock) -> None:
        """Turns timm's block into ours in place; parameters and their names stay."""
        block.__class__ = ConvNeXtV2Block
        assert isinstance(block, ConvNeXtV2Block)
        DepthwiseConv2d.adopt(block.conv_dw)
        for kind in (LayerNorm, LayerNorm2d):  # for blocks that the fused token MLP cannot run
            kind.adopt(block.norm, feeds_conv=True)
        block.mlp_channels_last = not block.use_conv_mlp
        if type(block.mlp) is GlobalResponseNormMlp:
            TokenMlp.adopt(block.mlp)
            block.mlp_channels_last = True

    @torch.jit.unused
    def why_eager(self, x: Tensor) -> str:
        """Why the modules after the mixer run one by one on its output `x`; '' if the fused token MLP does."""
        if not isinstance(self.mlp, TokenMlp):
            return "its MLP has no GRN"
        if self.gamma is not None:
            return "it has layer scale"
        return self.mlp.why_eager(x, self.norm, self.drop_path)

    def _token_mlp(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.why_eager(x):
                return self.mlp.fused(x, self.shortcut(shortcut), self.norm, self.drop_path)
        if self.use_conv_mlp:  # a norm of [B, C, H, W], else of [B, H, W, C]
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

    def forward(self, x: Tensor, layout: Any = None) -> Tensor:
        """Features of dense `[B, C, H, W]`, or packed `[B, C, K * p, p]` with their `Layout` (TorchScript: untyped)."""
        if not torch.jit.is_scripting():
            if layout is not None:
                return self._token_mlp(layout.mix(x, self.conv_dw), x)
        return self._token_mlp(self.conv_dw(x), x)


class ConvNeXtV2Stage(ConvNeXtStage):
    """timm's `ConvNeXtStage` with a packed path."""

    if TYPE_CHECKING:
        blocks: Any

    def forward(self, x: Tensor, layout: Any = None) -> Tensor:
        """Dense features, or packed ones with their `layout`: downsampling never crosses a patch border."""
        x = self.downsample(x)
        if not torch.jit.is_scripting():
            if self.grad_checkpointing or layout is not None:
                return self._run_blocks(x, layout)
        return self.blocks(x)

    @torch.jit.unused
    def _run_blocks(self, x: Tensor, layout: Any) -> Tensor:
        # with checkpointing the fused token MLP recomputes its own wide activation; other blocks are recomputed whole
        for block in self.blocks:
            forward = block if layout is None else partial(block, layout=layout)
            whole = self.grad_checkpointing and (block.why_eager(x) or not block.mlp.recompute)
            x = checkpoint_seq([forward], x) if whole else forward(x)
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
    last = 3 + math.ceil(depths[2] / 3)  # 12 for the official depths
    if stage == 0:
        return 0 if index is None else 1
    if stage == 1:
        return 2
    if stage == 2:
        return 3 + (index or 0) // 3
    return last + stage - 3


class ConvNeXtV2(ConvNeXt):
    """timm's `ConvNeXt` with `ConvNeXtV2Block`s: the same arguments, parameters and numbers.

    The defaults build ConvNeXt V2 tiny; `use_grn=False, ls_init_value=1e-6`, timm's own, builds ConvNeXt V1.

    Attributes:
        layer_decay_type: Layers of learning rate decay: 'single' (a block each) or 'group' (about three blocks each),
            which `timm.create_model` sets for base, large and huge, as in their recipes.
    """

    if TYPE_CHECKING:  # nn.Module types them as Tensor | Module
        stages: Any
        norm_pre: Any
        pretrained_cfg: dict[str, Any]

    layer_decay_type = "single"

    def __init__(self, *args, use_grn: bool = True, ls_init_value: float | None = None, **kwargs) -> None:
        # timm's defaults are those of ConvNeXt V1: no GRN, and layer scale in every block
        super().__init__(*args, use_grn=use_grn, ls_init_value=ls_init_value, **kwargs)
        # timm has no hook for other block and stage classes. Ours add methods and no state, so the instances change
        # class; weights, and the random numbers that initialise them, stay timm's.
        for module in self.stem.children():
            LayerNorm2d.adopt(module, feeds_conv=False)  # the first stage's residual sums read it as well
        for stage in self.stages:
            stage.__class__ = ConvNeXtV2Stage
            for module in stage.downsample.children():
                PatchConv2d.adopt(module)
                LayerNorm2d.adopt(module, feeds_conv=True)
            for block in stage.blocks:
                ConvNeXtV2Block.adopt(block)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]  (typed for its other form)
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], int]:
        """Parameter name to layer id of the official learning rate decay; if `coarse`, timm's own patterns.

        Source: `optim_factory.py` of the official repository, whose grouped models have 27 blocks in stage 2; other
        depths continue its rule. timm renumbers the layers without gaps, which changes no learning rate.
        """
        if coarse:
            return super().group_matcher(coarse=True)
        if self.layer_decay_type not in ("single", "group"):
            raise ValueError(f"layer_decay_type must be 'single' or 'group', got {self.layer_decay_type!r}.")
        depths = [len(stage.blocks) for stage in self.stages]
        return partial(_layer_id, depths=depths, grouped=self.layer_decay_type == "group")

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]  (typed for its other form)
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Saves memory: recomputes the fused token MLP's pre-activation (17 % more matrix products) or whole blocks."""
        super().set_grad_checkpointing(enable)
        for mlp in (m for m in self.stages.modules() if isinstance(m, TokenMlp)):
            mlp.recompute = enable

    def forward_packed(self, x: Tensor, layout: Layout) -> Tensor:
        """Features of packed pixels: `[B, in_chans, K * stride, stride]` to `[B, num_features, K, 1]`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, layout)
        return self.norm_pre(x)
