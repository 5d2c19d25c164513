"""Checkpoints in and out: the official formats <-> ours, safe loading, export to a timm folder, the Hub."""

from .export import export_encoder, export_fcmae, export_finetuned
from .files import load_checkpoint
from .hub import push_to_hub
from .official import convert_official, to_official

__all__ = [
    "convert_official",
    "export_encoder",
    "export_fcmae",
    "export_finetuned",
    "load_checkpoint",
    "push_to_hub",
    "to_official",
]
