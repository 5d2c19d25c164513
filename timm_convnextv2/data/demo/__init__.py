"""The demo data set: rendered images of eight textures, or of objects of these, without files or network."""

from .folder import write_folder
from .images import DemoSource

__all__ = ["DemoSource", "write_folder"]
