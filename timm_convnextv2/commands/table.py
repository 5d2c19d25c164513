"""The command line as a table: what each command is for, its options, and an example. Read without torch."""

from dataclasses import dataclass

from ..features.config import CollapseConfig, CompareConfig, EmbedConfig, EvaluateConfig
from ..finetune.config import EvaluationConfig, FinetuneConfig, PredictConfig
from ..pretraining.config import PretrainConfig
from ..transfer.config import (
    DetectConfig,
    DetectEvalConfig,
    DetectPredictConfig,
    SegmentConfig,
    SegmentEvalConfig,
    SegmentPredictConfig,
)
from .options import CheckConfig, DemoConfig, ExportConfig, PublishConfig, ReportConfig, StatsConfig


@dataclass(frozen=True)
class Command:
    """One command: its options are the fields of `config`, those in `main` are shown by --help."""

    summary: str
    config: type
    main: str  # names of options
    example: str  # words after the command's name; several lines for several examples
    text: str = ""  # more for --help
    passes_on: bool = False  # options that are not in `config` go to a script of timm


# Each name, or its first word, is a module beside this file with `main(argv) -> int`.
COMMANDS = {
    "pretrain": Command(
        "pretrain a backbone on unlabelled images with FCMAE",
        PretrainConfig,
        "data_dir model recipe img_size epochs batch_size output experiment dry_run",
        "IMAGES --model atto --output runs --experiment mine",
        "Without images it trains on the demo data, two to five minutes on two CPU cores. The result is\n"
        "OUTPUT/EXPERIMENT/encoder, a timm folder that stock timm opens, and report.html beside it.",
    ),
    "finetune": Command(
        "finetune a backbone with timm's train.py and a recipe",
        FinetuneConfig,
        "recipe list_recipes from_scratch global_batch_size validation_share timm_train dry_run",
        "--recipe small-data --model runs/mine --data-dir DATA --epochs 60 --output runs --experiment tuned",
        "It finds train.py, checks the recipe, the model's folder, the data and the batch, runs train.py in this\n"
        "process, and exports the result to OUTPUT/EXPERIMENT/model, a timm folder that stock timm opens. DATA has\n"
        "train/ and validation/; class folders alone, or a CSV of name and label, are split by --seed. --model,\n"
        "--data-dir, --epochs, --batch-size and all options that are not listed here go to train.py. The same by\n"
        "hand, without checks and export:\n\n"
        "    python train.py --device-modules timm_convnextv2 --config RECIPE.yaml --model ...",
        passes_on=True,
    ),
    "validate": Command(
        "measure a finetuned model with timm's validate.py",
        EvaluationConfig,
        "timm_train nodata",
        "runs/tuned/model --data-dir DATA --device cpu",
        "MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images\n"
        "are read as in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. Classes are matched by folder\n"
        "name if the model has the names of its classes. Options that are not listed here go to validate.py.",
        passes_on=True,
    ),
    "predict": Command(
        "classify images with timm's inference.py",
        PredictConfig,
        "timm_train nodata max_bad_images",
        "runs/tuned/model --data-dir IMAGES --device cpu --label-type name --results-file predictions",
        "MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. An image\n"
        "that cannot be decoded is skipped and named, and the exit status is 1. Results have paths relative to\n"
        "IMAGES. Options that are not listed here go to inference.py, which needs pandas.",
        passes_on=True,
    ),
    "report": Command("show runs on one page", ReportConfig, "runs output", "runs/mine"),
    "publish": Command(
        "publish weights and a model card on the Hugging Face Hub",
        PublishConfig,
        "folder repo license part private dry_run output",
        "runs/mine USER/NAME --license mit --dry-run",
        "FOLDER is a timm folder (encoder/, model/), or the folder of a run of `pretrain`, timm's train.py,\n"
        "`finetune`, `detect train` or `segment train`. With --dry-run the files are written to a folder and nothing\n"
        "is sent. The access token comes from `hf auth login` or HF_TOKEN.",
    ),
    "export": Command(
        "export a model to ONNX or torch.export, checked and timed",
        ExportConfig,
        "model format outputs img_size batch_size dynamic output overwrite",
        "runs/tuned --output model.onnx --dynamic batch",
        "Classifiers, encoders, segmenters, and the backbones of detectors. The file takes float32 pixels in 0..1:\n"
        "mean and std are inside; size, crop and the record of pixels (divisor, limits, nodata) are not. It is\n"
        "compared with the model on random images, and written only if it computes the same.",
    ),
    "compare": Command(
        "finetune from scratch, from your encoder and from other models",
        CompareConfig,
        "data_dir encoder unlabelled pretrain also epochs seeds label_budgets output",
        "--data-dir LABELLED --encoder runs/mine --output compared\n"
        "--data-dir LABELLED --unlabelled IMAGES --also resnet18 --label-budgets 0.1 1 --output compared",
        "Should I pretrain? Each candidate is finetuned with timm's train.py and a recipe that suits it: pretrained\n"
        "weights with --recipe, random ones, which have the architecture of your encoder, with --scratch-recipe.\n"
        "A fifth of the training images chooses the learning rate out of --lr-grid; then each candidate is trained\n"
        "once per seed on all of them. The validation images are only measured, at the end. --label-budgets repeats\n"
        "this with fewer training images. Data without a split is split once, for all seeds. Prints a table\n"
        "and a verdict; writes compare.csv, compare.json and compare.png. Options that are not listed here go to\n"
        "`finetune`. A stopped comparison continues with --resume.",
        passes_on=True,
    ),
    "embed": Command(
        "write one row of features per image",
        EmbedConfig,
        "data_dir model output img_size batch_size device resume",
        "IMAGES --model runs/mine --output embeddings.npy",
    ),
    "evaluate": Command(
        "compare frozen features: kNN, ridge, linear probe, rank",
        EvaluateConfig,
        "models data_dir validation_share img_size batch_size device output",
        "runs/mine convnextv2_atto.fcmae --data-dir LABELLED",
        "Baselines are measured as well: small pixels, a histogram of each channel, the border of the image, and\n"
        "random weights. A control with shuffled labels must be at chance.",
    ),
    "collapse": Command(
        "compare how similar the channels of models are",
        CollapseConfig,
        "models data_dir num_images img_size device output",
        "runs/mine convnextv2_tiny.fcmae convnext_tiny.fb_in1k --data-dir IMAGES --output collapse",
        "Feature collapse of ConvNeXt V1 and V2, block by block. Writes to --output:\n\n"
        "    collapse.csv  model, block, depth, distance, dead: one row per block\n"
        "    collapse.png  distance over depth, one line per model (the paper's figure 4)\n"
        "    channels.png  64 channels of a block as small squares, for a few images (its figure 3)",
    ),
    "stats": Command(
        "measure the pixels of a data set: mean, std, percentiles, histogram",
        StatsConfig,
        "data_dir in_chans divide nodata clip_percentiles num_images output",
        "IMAGES\nSCENES --in-chans 12 --divide 10000 --nodata 0 --clip-percentiles 1 99",
        "Writes --output FILE.json, and FILE.png with the histograms. All pixels of the sample have equal weight; the\n"
        "sample is drawn by --seed and as large as --error requires. NaN, infinity and nodata are left out.",
    ),
    "check": Command(
        "find corrupt, blank, duplicate and unusual files in a folder",
        CheckConfig,
        "data_dir img_size window_size show_bands workers output overwrite",
        "IMAGES --img-size 224",
        "Writes the findings to --output FILE.json, and thumbnails to FILE.png. The exit status is 0 without\n"
        "findings, 1 with findings, 2 for a mistake in the options. Every file is read and decoded as in pretraining.\n"
        "Near duplicates, images with the same perceptual hash, need `pip install imagehash`.",
    ),
    "detect train": Command(
        "train an object detector on a backbone",
        DetectConfig,
        "model data_dir recipe epochs batch_size img_size output experiment",
        "--model runs/mine --data-dir DATA --recipe small-data --output runs --experiment boxes",
        "Mask R-CNN or Faster R-CNN on any backbone of timm, with annotations in COCO's format or YOLO's.",
    ),
    "detect eval": Command(
        "evaluate a detector with COCO's metrics",
        DetectEvalConfig,
        "model data_dir val val_images batch_size device output",
        "--model runs/boxes/model --data-dir DATA",
    ),
    "detect predict": Command(
        "find objects in a folder of images",
        DetectPredictConfig,
        "data_dir model output draw min_score batch_size device",
        "IMAGES --model runs/boxes/model --output found.json",
    ),
    "segment train": Command(
        "train a semantic segmenter on a backbone",
        SegmentConfig,
        "model data_dir recipe epochs batch_size img_size output experiment",
        "--model runs/mine --data-dir DATA --recipe small-data --output runs --experiment masks",
        "UPerNet on any backbone of timm, with one mask per image.",
    ),
    "segment eval": Command(
        "evaluate a segmenter: mean IoU",
        SegmentEvalConfig,
        "model data_dir split window short_side device output",
        "--model runs/masks/model --data-dir DATA",
    ),
    "segment predict": Command(
        "write a mask for each image of a folder",
        SegmentPredictConfig,
        "data_dir model output draw window short_side device",
        "IMAGES --model runs/masks/model --output masks",
    ),
    "demo": Command(
        "write a small labelled image folder to try things out",
        DemoConfig,
        "folder train validation size seed coco masks",
        "DATA",
    ),
}
GROUPS = {
    "detect": "train, evaluate and run an object detector on a backbone",
    "segment": "train, evaluate and run a semantic segmenter on a backbone",
}


def actions(group: str) -> list[str]:
    """The second words of `detect` or `segment`."""
    return [name.split()[1] for name in COMMANDS if name.split()[0] == group]
