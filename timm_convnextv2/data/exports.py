"""What `data` exports, imported on first use."""

from ..seeds import sample_seed
from .config import DataSet, ImagePaths, PixelOptions, WindowOptions
from .demo import DemoSource
from .formats.decode import image_extensions, load_image
from .formats.errors import ImageError, MissingPackageError
from .formats.pixels import Pixels
from .samples.dataset import PretrainDataset, PretrainStream, collate
from .samples.order import EpochBatchSampler
from .samples.statistics import InputStatistics
from .samples.transform import PretrainTransform
from .sources.files import FolderSource, ImageFiles, PageSource
from .sources.open import check_readable, create_source, pages_and_windows
from .sources.picked import JoinedSource, Subset, hold_out
from .sources.source import Bad, Source
from .sources.stream import StreamOrder, TimmStream
from .sources.timm import TimmSource
from .sources.windows import WindowSource

__all__ = [
    "Bad",
    "DataSet",
    "DemoSource",
    "EpochBatchSampler",
    "FolderSource",
    "ImageError",
    "ImageFiles",
    "ImagePaths",
    "InputStatistics",
    "JoinedSource",
    "MissingPackageError",
    "PageSource",
    "PixelOptions",
    "Pixels",
    "PretrainDataset",
    "PretrainStream",
    "PretrainTransform",
    "Source",
    "StreamOrder",
    "Subset",
    "TimmSource",
    "TimmStream",
    "WindowOptions",
    "WindowSource",
    "check_readable",
    "collate",
    "create_source",
    "hold_out",
    "image_extensions",
    "load_image",
    "pages_and_windows",
    "sample_seed",
]
