"""Old public names lead to the new ones, with a warning."""

import importlib

import pytest


@pytest.mark.parametrize(
    "old, new",
    [
        ("convnextv2.ConvNeXtV2", "models.ConvNeXtV2"),
        ("convnextv2.VARIANTS", "models.registry.VARIANTS"),
        ("convnextv2.filter_weights", "models.registry.filter_weights"),
        ("fcmae.FCMAE", "models.FCMAE"),
        ("fcmae.FCMAETask", "task.FCMAETask"),
        ("masking.Visible", "models.PackedLayout"),
        ("masking.random_mask", "models.random_mask"),
        ("reference.reference_forward", "models.reference.reference_forward"),
        ("ops.backends.backend", "ops.backend"),
        ("ops.TokenMlp", "layers.TokenMlp"),
        ("report.memory_estimate", "memory.memory_estimate"),
    ],
)
def test_old_name(old, new):
    def find(path):
        module, _, name = f"timm_convnextv2.{path}".rpartition(".")
        return getattr(importlib.import_module(module), name)

    with pytest.warns(FutureWarning, match="goes in 0.3"):
        found = find(old)
    assert found is find(new)


def test_names_that_never_were():
    for module in ("masking", "ops"):
        with pytest.raises(AttributeError, match="nothing"):
            importlib.import_module(f"timm_convnextv2.{module}").nothing  # noqa: B018
