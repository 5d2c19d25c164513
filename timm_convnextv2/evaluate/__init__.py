"""Whether features serve, and whether they collapse: functions first, a command on top.

rows = features(model, batches)                          one row for each image
judge(rows, labels, test_rows, test_labels)              kNN, ridge, linear probe and rank of them
collapse(model, images)                                  mean cosine distance of the channels of each block
"""

from .collapse import BlockCollapse, blocks_of, channel_distance, channel_maps, collapse
from .features import features, image_batches, pixels
from .judge import judge
from .knn import knn, knn_scores
from .labelled import Labelled, open_labelled
from .linear import linear_probe, ridge
from .metrics import Estimate, bootstrap, goodness
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
    "features",
    "goodness",
    "image_batches",
    "judge",
    "knn",
    "knn_scores",
    "linear_probe",
    "open_labelled",
    "pixels",
    "rankme",
    "ridge",
]
