"""Checkpoints: official formats, safe loading, export to timm folders."""

from ..files import CheckpointError, load_checkpoint
from .export import export_encoder, export_fcmae
from .finetuned import export_finetuned
from .loading import load_model
from .official import convert_official, to_official

__all__ = [
    "CheckpointError",
    "convert_official",
    "export_encoder",
    "export_fcmae",
    "export_finetuned",
    "load_checkpoint",
    "load_model",
    "to_official",
]
