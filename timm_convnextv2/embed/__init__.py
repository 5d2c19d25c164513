"""Embeddings: one row of features for each image, as .npy, .safetensors or .parquet. `embed` is the Python API.

    timm-convnextv2 embed --model local-dir:runs/mine/encoder --data-dir IMAGES --output embeddings.npy
    timm-convnextv2 embed --model hf-hub:USER/NAME --dataset hfds/NAME --split test --output embeddings.parquet
    torchrun --nproc-per-node 8 -m timm_convnextv2.embed --model ... --data-dir IMAGES --output embeddings.npy

Images are resized, cropped and normalised as the model's config says. Written are, when all is done, whole or not at
all:

    embeddings.npy              float32 [N, num_features]; as .safetensors the same under the name "embeddings"
    embeddings.npy.csv          column "file": the image of each row; the order is fixed
    embeddings.npy.skipped.csv  columns "file" and "reason": images that cannot be decoded and have no row, if any
    embeddings.parquet          columns "file" and "embedding", in place of the first two

Finished rows go to `OUTPUT.parts/` as they come, so that memory does not limit the number of images, and a run that is
stopped or killed resumes with `--resume`. The parts are removed at the end, when the disk holds the result twice for a
moment. On the same machine with the same number of threads the same command gives the same bytes, whatever the number
of processes and workers: batches are cut from the data set, not from a process's share of it.
"""

from .command import main
from .run import embed

__all__ = ["embed", "main"]
