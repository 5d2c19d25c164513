"""The options of `embed`, `evaluate`, `collapse` and `compare`, and the parts that they share."""

from dataclasses import dataclass

from ..config import MODEL, device_option, option, part, workers_option
from ..data.config import DataSet, ImagePaths, Splitting

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07

LABELLED = (
    "folder with train/ and validation/ of class folders; a folder of class folders, which is split; or a CSV with "
    "name and label"
)


# fmt: off
@dataclass(frozen=True)
class Computation:
    """How images become inputs of a model, and where the model runs."""

    img_size: int | None = option(
        None, "side of the square crops in pixels (default: the model's)", metavar="N", at_least=1)
    nodata: float | None = option(
        None, 'stored value meaning "no data"; such pixels are filled with the mean of the others (default: the '
        "model's; nan: none)", metavar="V")
    device: str = device_option()
    amp: bool = option(False, "compute in bfloat16; features stay float32")

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of several devices, separated by commas."""
        return tuple(name.strip() for name in self.device.split(","))


@dataclass(frozen=True)
class Extraction(Computation):
    """How images become rows of features."""

    batch_size: int = option(64, "images per batch", short="-b", metavar="N", at_least=1)
    workers: int = workers_option("processes (for a stream: threads) that decode images; 0: the main process")
    all_stages: bool = option(
        False, "rows of the mean and standard deviation of each stage's map (default: the mean of the last one)")


@dataclass(frozen=True)
class EmbedImages:
    """The images to embed: files, or a data set that timm opens."""

    paths: ImagePaths = part(ImagePaths)
    data_set: DataSet = part(DataSet)


@dataclass(frozen=True)
class EmbedConfig:
    """The options of `embed`."""

    model: str = option(..., MODEL, metavar="MODEL")
    output: str = option(..., "file to write: .npy, .safetensors or .parquet", metavar="FILE")
    images: EmbedImages = part(EmbedImages, "images")
    extraction: Extraction = part(Extraction, "features")
    max_bad_images: float = option(
        0.01, "stop if more than this fraction of the images cannot be decoded", metavar="X", at_least=0, at_most=1)
    resume: bool = option(False, "continue a stopped run from OUTPUT.parts")
    overwrite: bool = option(False, "replace --output and the parts of a stopped run")


@dataclass(frozen=True)
class Scoring:
    """How features are measured; `draws` is the number of bootstrap samples."""

    k: tuple[int, ...] = option(NEIGHBOURS, "numbers of neighbours", short="-k", metavar="N", at_least=1)
    temperature: float = option(TEMPERATURE, "each neighbour is weighted by exp(cosine / T)", metavar="T", above=0)
    probe: bool = option(True, "train the linear probe, which takes longest")
    seed: int = option(0, "seed of the split, the bootstrap, the probe and the random weights", metavar="N")
    random_seeds: int = option(3, "random initialisations that the baseline is the mean of", metavar="N", at_least=1)
    label_budgets: tuple[float, ...] = option(
        (), "also measure with fewer labels: shares of the training images up to 1, or numbers of images", metavar="X",
        above=0)
    budget_draws: int = option(3, "subsets that are drawn for each of --label-budgets", metavar="N", at_least=1)
    draws: int = 1000


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of `evaluate`."""

    models: tuple[str, ...] = option(..., MODEL, positional=True, metavar="MODEL")
    data_dir: str = option(..., LABELLED, metavar="LABELLED")
    split: Splitting = part(Splitting, "images")
    extraction: Extraction = part(Extraction, "features")
    scoring: Scoring = part(Scoring, "measures")
    baselines: bool = option(True, "also measure pixels, histogram, border, random weights and shuffled labels")
    output: str | None = option(
        None, "folder for evaluation.json and evaluation.png (default: print the table only)", metavar="DIR")
    overwrite: bool = option(False, "replace the files in --output")


@dataclass(frozen=True)
class DrawnImages:
    """Images that are drawn from a folder or data set."""

    data_dir: str | None = option(None, "folder with images anywhere below it, or the root of --dataset", metavar="DIR")
    data_list: str | None = option(
        None, "images that a .txt, .csv or .parquet lists, relative to it or to --data-dir", metavar="FILE")
    dataset: str = option("", "hfds/NAME, torch/NAME or demo (default: a folder)", metavar="NAME")
    split: str = option("train", "split of --dataset", metavar="NAME")
    num_images: int = option(64, "images to average over", metavar="N", at_least=1)
    seed: int = option(0, "seed of the choice of images", metavar="N")


@dataclass(frozen=True)
class CollapseConfig:
    """The options of `collapse`."""

    models: tuple[str, ...] = option(..., MODEL, positional=True, metavar="MODEL")
    images: DrawnImages = part(DrawnImages, "images")
    computation: Computation = part(Computation, "features")
    batch_size: int = option(8, "images per batch", short="-b", metavar="N", at_least=1)
    layer: str | None = option(
        None, "block in the figure of channels (default: the last one of the last stage but one)", metavar="NAME")
    output: str | None = option(
        None, "folder to write to; '': none (default: collapse, its files replaced)", metavar="DIR")
    overwrite: bool = option(False, "replace the files in --output")

    @property
    def folder(self) -> str:
        """The folder to write to, '' for none."""
        return "collapse" if self.output is None else self.output


@dataclass(frozen=True)
class CompareConfig:
    """The options of `compare`; the others go to `finetune`."""

    data_dir: str = option(..., LABELLED, metavar="LABELLED")
    split: Splitting = part(Splitting, "images")
    encoder: str | None = option(
        None, f"your encoder: {MODEL}", metavar="MODEL")
    unlabelled: str | None = option(None, "images to pretrain an encoder on, instead of --encoder", metavar="DIR")
    pretrain: str = option("", "options of that pretraining, as one quoted word", metavar="OPTIONS")
    also: tuple[str, ...] = option(
        (), "more candidates: timm's names, with published weights if the name has a tag (resnet50.a1_in1k) and random "
        "ones if not (resnet18); local-dir:, hf-hub:", metavar="NAME")
    epochs: int = option(60, "epochs of a finetuning on all images, a tenth of them warmup", metavar="N", at_least=1)
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds; each candidate is finetuned once per seed", metavar="N")
    label_budgets: tuple[float, ...] = option(
        (1.0,), "shares of the training images up to 1, or numbers of images", metavar="X", above=0)
    lr_grid: tuple[float, ...] = option(
        (0.3, 1.0, 3.0), "learning rates to choose from, as multiples of the recipe's; more are tried while the best "
        "is the smallest or largest", metavar="X", above=0)
    recipe: str = option("small-data", "recipe for weights that are trained already", metavar="NAME")
    scratch_recipe: str = option("scratch-small", "recipe for random weights", metavar="NAME")
    output: str = option("output/compare", "folder to write to", metavar="DIR")
    resume: bool = option(False, "keep the runs that an earlier call finished")
    dry_run: bool = option(False, "check everything, then stop")
