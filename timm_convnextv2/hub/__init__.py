"""Publishing on the Hugging Face Hub."""

from .upload import push_to_hub

__all__ = ["push_to_hub"]
