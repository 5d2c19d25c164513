"""The options of the commands that have no room of their own."""

from dataclasses import dataclass

from ..config import MODEL, option, part, workers_option
from ..data.config import ERROR, DataSet, DemoOptions, ImagePaths, PixelOptions, WindowOptions, page_word


@dataclass(frozen=True)
class CheckConfig:
    """Options of the command."""

    paths: ImagePaths = part(ImagePaths)
    nodata: float | None = option(None, 'stored value meaning "no data"', metavar="V")
    img_size: int = option(224, "side of the crops; smaller images are listed", metavar="N", at_least=1)
    window_size: int | None = option(
        None, "decode only a window of S x S; smaller images are listed", metavar="S", at_least=1
    )
    pages: tuple[int | str, ...] | None = option(
        None, "as in pretraining; of several pages only the first is read", metavar="P", parse=page_word
    )
    show_bands: tuple[int, ...] | None = option(
        None, "channels to draw as red, green and blue, or one (default: 1 2 3; 1 below three)", metavar="N", at_least=1
    )
    workers: int = workers_option("processes that read and decode")
    output: str | None = option(
        None, "JSON to write; the images have its name and .png (default: check.json, replaced)", metavar="FILE"
    )
    overwrite: bool = option(False, "replace --output and its images")


@dataclass(frozen=True)
class StatsConfig:
    """Options of the command."""

    paths: ImagePaths = part(ImagePaths)
    data_set: DataSet = part(DataSet)
    pixels: PixelOptions = part(PixelOptions)
    windows: WindowOptions = part(WindowOptions)
    in_chans: int | None = option(None, "channels of the images (default: as in the files)", metavar="N")
    error: float = option(
        ERROR, "standard error of the mean to reach, in standard deviations of the pixels", metavar="X"
    )
    max_images: int = option(2000, "largest number of images to read", metavar="N")
    seed: int = option(42, "seed of the sample; that of pretraining gives the same numbers", metavar="N")
    workers: int = workers_option("processes that decode images")
    output: str | None = option(
        None, "JSON to write; the figure has its name and .png (default: stats.json, replaced)", metavar="FILE"
    )
    overwrite: bool = option(False, "replace --output and its figure")


@dataclass(frozen=True)
class PublishConfig:
    """Options of `publish`."""

    folder: str = option(
        ...,
        "timm folder, or folder of a run: pretrain, train.py, finetune, detect, segment",
        metavar="FOLDER",
        positional=True,
    )
    repo: str = option(..., "USER/NAME on the Hub; created if needed", metavar="REPO", positional=True)
    part: str = option(
        "encoder",
        "of a pretraining run: the encoder, or the whole FCMAE, from which pretraining can continue",
        choices=("encoder", "fcmae"),
    )
    license: str | None = option(
        None, "licence of the weights, e.g. mit; derived weights keep the inherited one", metavar="ID"
    )
    dataset: tuple[str, ...] = option((), "data sets on the Hub that the weights were trained on", metavar="NAME")
    base_model: str | None = option(
        None, "model on the Hub that training started from, if the files do not state it", metavar="ID"
    )
    private: bool = option(False, "create a private repository")
    revision: str | None = option(None, "branch to write to; created if needed", metavar="NAME")
    commit_message: str | None = option(None, "title of the commit", metavar="TEXT")
    dry_run: bool = option(False, "write the files to a folder and send nothing")
    output: str | None = option(None, "folder for --dry-run (default: FOLDER-publish, beside FOLDER)", metavar="DIR")


@dataclass(frozen=True)
class ExportConfig:
    """Options of `export`."""

    model: str = option(..., MODEL, metavar="MODEL", positional=True)
    format: str = option(
        "onnx", "onnx needs `pip install 'timm_convnextv2[onnx]'`; torch is a program of torch.export",
        choices=("onnx", "torch"),
    )  # fmt: skip
    outputs: str | None = option(
        None,
        "logits, pooled features as `embed` writes them, or maps of the last four stages (default: logits of a "
        "classifier or segmenter, features of an encoder, maps of a detector's backbone)",
        choices=("logits", "features", "maps"),
    )
    img_size: int | None = option(
        None, "side of the square images in pixels (default: the model's)", metavar="N", at_least=1
    )
    batch_size: int = option(1, "images per batch", short="-b", metavar="N", at_least=1)
    dynamic: tuple[str, ...] = option(
        (), "what may change from call to call: the batch size, or height and width", choices=("batch", "size")
    )
    output: str = option("", "file to write (default: model.onnx or model.pt2)", metavar="FILE")
    overwrite: bool = option(False, "replace --output")


@dataclass(frozen=True)
class ReportConfig:
    """Options of `report`."""

    runs: tuple[str, ...] = option(
        ...,
        "folder of a run of pretrain, finetune, detect or segment; several of one task side by side",
        metavar="RUN",
        positional=True,
    )
    output: str = option(
        "", "HTML file to write (default: RUN/report.html; for several runs ./report.html)", metavar="FILE"
    )


@dataclass(frozen=True)
class DemoConfig:
    """Options of the command."""

    folder: str = option(
        ..., "new or empty; written as FOLDER/{train,validation}/CLASS/*.png", metavar="FOLDER", positional=True
    )
    demo: DemoOptions = part(DemoOptions)
