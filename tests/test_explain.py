"""`explain`: what runs where, and why not the fused operation."""

import pytest
import timm
import torch
from timm.models import convnext
from torch import nn

import timm_convnextv2
from timm_convnextv2.models.explain import explanation
from timm_convnextv2.ops import use_backend


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("TIMM_CONVNEXTV2_BACKEND", raising=False)


def counts(text: str, kind: str) -> dict[str, int]:
    """Of a kind: what runs, in one word, and how many layers."""
    lines = [line.strip()[len(kind) :].split() for line in text.splitlines() if line.strip().startswith(kind)]
    return {words[1].rstrip(":"): int(words[0]) for words in lines if len(words) > 1}


def test_pretraining_model():
    text = explanation(timm.create_model("fcmae_convnextv2_atto"), "cpu")
    assert f"timm_convnextv2 {timm_convnextv2.__version__}" in text and f"torch {torch.__version__}" in text
    assert "FCMAE" in text and "on cpu: backend 'fused'" in text
    assert counts(text, "token MLP") == {"fused": 13}  # twelve blocks and the decoder's
    assert counts(text, "depthwise convolution, dense") == {"fused": 1}
    assert sum(counts(text, "depthwise convolution, packed").values()) == 12
    assert counts(text, "downsampling") == {"fused": 2, "eager": 1}


def test_it_tells_what_a_step_does():
    """The layers that it says are fused are those whose operations a step runs."""
    model = timm.create_model("fcmae_convnextv2_atto", img_size=224)
    text = explanation(model, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(torch.randn(1, 3, 224, 224)).loss.backward()
    ran = {event.key: event.count for event in profiler.key_averages()}
    assert ran["timm_convnextv2::token_mlp"] == counts(text, "token MLP")["fused"]
    assert ran["timm_convnextv2::window_depthwise"] == counts(text, "depthwise convolution, packed")["fused"]
    dense = counts(text, "depthwise convolution, dense")["fused"]
    # those that run on the whole map with zeros in it are dense there
    assert ran["timm_convnextv2::depthwise"] == dense + counts(text, "depthwise convolution, packed")["eager"]


def test_encoder_with_a_block_that_differs():
    model = timm.create_model("convnextv2_atto")
    model.stages[1].blocks[0].mlp.act = nn.ReLU()
    text = explanation(model)
    assert counts(text, "token MLP") == {"fused": 11, "eager": 1}
    assert "GELU (stages.1.blocks.0.mlp)" in text
    assert counts(text, "depthwise convolution, packed") == {}


def test_a_device_that_is_not_there():
    model = timm.create_model("convnextv2_atto")
    assert counts(explanation(model, "cuda"), "token MLP") == {"eager": 12}
    with use_backend("fused"):
        text = explanation(model, "cuda")
    assert counts(text, "token MLP") == {"fused": 12} and counts(text, "depthwise convolution, dense") == {"eager": 12}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a CUDA GPU says")
def test_a_backend_that_cannot_run_is_said_not_raised(monkeypatch):
    monkeypatch.setenv("TIMM_CONVNEXTV2_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "asks for 'triton'" in explanation(timm.create_model("convnextv2_atto"))


@pytest.mark.parametrize("model", [nn.ReLU(), timm.create_model("resnet18")], ids=["no parameters", "another"])
def test_other_models(model):
    assert "no layer of this model" in explanation(model) and "create_model" not in explanation(model)


def test_stock_convnext_is_told_how_to_become_ours(capsys):
    timm_convnextv2.explain(convnext.convnextv2_atto())
    assert "import timm_convnextv2" in capsys.readouterr().out
