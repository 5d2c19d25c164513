"""ConvNeXt V2 weights under the names of other libraries, as official names, which timm's filter reads.

- Hugging Face transformers, `ConvNextV2Model`, `ConvNextV2ForImageClassification`, `ConvNextV2Backbone`:
  https://github.com/huggingface/transformers/blob/main/src/transformers/models/convnextv2/modeling_convnextv2.py
- MMPretrain, `ConvNeXt(use_grn=True)`, alone or in an `ImageClassifier`:
  https://github.com/open-mmlab/mmpretrain/blob/main/mmpretrain/models/backbones/convnext.py
"""

import re
from typing import Any

_HUGGING_FACE = (
    (r"^convnextv2\.", ""),
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm\.", ".norm."),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"^classifier\.", "head."),
)
_MMPRETRAIN = (
    (r"^backbone\.", ""),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^norm3\.", "norm."),
    (r"^head\.fc\.", "head."),
)
# in both: norms of a backbone's intermediate maps, which a classifier does not have
_LEFT_OUT = re.compile(r"^(backbone\.norm[012]|norm[012]|hidden_states_norms)\b")


def official_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Renames weights of transformers or MMPretrain to the official names; returns others unchanged."""
    names = " ".join(map(str, state_dict))
    if "embeddings.patch_embeddings." in names:
        rules = _HUGGING_FACE
    elif ".depthwise_conv." in names:
        rules = _MMPRETRAIN
    else:
        return state_dict
    renamed = {}
    for name, value in state_dict.items():
        if _LEFT_OUT.match(name):
            continue
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed
