"""Whether features serve, and whether they collapse: functions, and the command `evaluate`.

    timm-convnextv2 evaluate runs/mine convnextv2_atto.fcmae --data-dir LABELLED --output results

    rows = extract_features(model, batches)                          one row for each image
    measure_features(rows, labels, test_rows, test_labels)              kNN, ridge, linear probe and rank of them
    collapse(model, images)                                  mean cosine distance of the channels of each block

The command writes to `--output`, if given:

    evaluation.json  every number with its 95 % interval, the data and the settings
    evaluation.png   the same as a figure
"""

from .collapse import BlockCollapse, blocks_of, channel_distance, channel_maps, collapse
from .evaluate import evaluate_models, measure_features
from .extract import extract_features, image_batches, pixel_features
from .knn import knn, knn_scores
from .labelled import Labelled, open_labelled
from .linear import Estimate, accuracy_or_map, bootstrap, linear_probe, ridge
from .rank import rankme

__all__ = [
    "BlockCollapse",
    "Estimate",
    "Labelled",
    "bootstrap",
    "blocks_of",
    "channel_distance",
    "channel_maps",
    "collapse",
    "evaluate_models",
    "extract_features",
    "accuracy_or_map",
    "image_batches",
    "measure_features",
    "knn",
    "knn_scores",
    "linear_probe",
    "open_labelled",
    "pixel_features",
    "rankme",
    "ridge",
]
