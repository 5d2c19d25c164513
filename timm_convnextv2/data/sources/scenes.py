"""Images of which parts are read, kept open."""

import os
from collections import OrderedDict
from typing import Any

from ..formats.decode import Scene, open_scene
from ..formats.pixels import Pixels


class Scenes:
    """Keeps the last few images of this process open, because opening a large TIFF reads thousands of offsets.

    Args:
        most: Largest number of open images.
    """

    def __init__(self, most: int = 16) -> None:
        self.most, self._process = most, os.getpid()
        self._open: OrderedDict[tuple, Scene] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "_process": 0, "_open": OrderedDict()}

    def get(self, path: str, in_chans: int, pixels: Pixels) -> Scene:
        """Opens the image if it is not open yet; see `open_scene`."""
        if self._process != os.getpid():  # a forked worker must not share file positions with its parent
            self._open, self._process = OrderedDict(), os.getpid()
        key = path, in_chans, pixels
        if key not in self._open:
            self._open[key] = open_scene(path, in_chans, pixels)
        self._open.move_to_end(key)
        scene = self._open[key]
        while len(self._open) > self.most:
            self._open.popitem(last=False)[1].close()
        return scene
