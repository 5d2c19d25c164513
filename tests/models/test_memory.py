"""The estimate of memory against what a step keeps."""

import sys

import pytest
import timm
import torch

from timm_convnextv2.models.memory import memory_estimate, peak_memory
from timm_convnextv2.ops.dispatch import ENV

CASES = [
    (dict(img_size=64), 4), (dict(img_size=(64, 96), in_chans=5, decoder_depth=2), 2),
    (dict(img_size=32, patch_size=1, mask_ratio=0.75), 8), (dict(img_size=64, checkpointing=True), 4),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, options, batch_size",
    [("eager", *CASES[0]), ("eager", *CASES[3]), *(("fused", *case) for case in CASES)],
    ids=str,
)
def test_memory_estimate(name, options, batch_size, monkeypatch):
    """Against what a real step keeps, each storage once."""
    options = dict(options)
    checkpointing = options.pop("checkpointing", False)
    model = timm.create_model("fcmae_convnextv2_atto", **options)
    model.set_grad_checkpointing(checkpointing)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    images = torch.rand(batch_size, model.in_chans, *model.img_size)
    layout = model.visible(images)
    monkeypatch.setenv(ENV, name)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(images, layout, return_pred=False).loss
    counted = sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30
    loss.backward()
    fixed, step = memory_estimate(model, batch_size)
    assert counted <= 1.05 * step and step < 1.4 * counted  # the CPU's own operations keep less
    assert memory_estimate(model, 2 * batch_size)[1] == pytest.approx(2 * step)
    assert memory_estimate(model, batch_size, amp=True)[1] == pytest.approx(step / 2)

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.ndim]
    exact = sum(x.nbytes for x in (*parameters, *(p.grad for p in parameters), *state)) / 2**30
    assert fixed == pytest.approx(exact, rel=0.01)
    assert memory_estimate(model, batch_size, ema=True)[0] == pytest.approx(fixed * 5 / 4)


# of a model this small, stem and decoder keep a large part
def test_memory_estimate_asks_the_backend_of_the_device(monkeypatch):
    """The fused operations keep less than half; the model's device is asked, not the meta device."""
    model = timm.create_model("fcmae_convnextv2_atto", img_size=64)
    fused, plain = memory_estimate(model, 2)[1], memory_estimate(model, 2, device="cuda")[1]
    assert fused < 0.6 * plain
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())  # the model is left alone
    monkeypatch.setenv(ENV, "eager")
    assert memory_estimate(model, 2)[1] == plain


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_peak_memory_grows():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(int((before + 0.1) * 2**30) // 4)
    after = peak_memory(torch.device("cpu"))
    assert before > 0.05 and after >= before + 0.09 and block.numel()
