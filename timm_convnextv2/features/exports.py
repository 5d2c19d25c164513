"""What `features` exports, imported on first use."""

from .channels import BlockCollapse, blocks_of, channel_distance, channel_maps, collapse
from .config import Scoring
from .evaluate import evaluate_models, measure_features
from .extract import extract_features, image_batches
from .labelled import Labelled, open_labelled
from .linear import Estimate, accuracy_or_map, bootstrap, linear_probe, ridge
from .neighbours import knn, knn_scores
from .rank import rankme

__all__ = [
    "BlockCollapse", "Estimate", "Labelled", "Scoring", "bootstrap", "blocks_of", "channel_distance", "channel_maps",
    "collapse", "evaluate_models", "extract_features", "accuracy_or_map", "image_batches", "measure_features", "knn",
    "knn_scores", "linear_probe", "open_labelled", "rankme", "ridge"
]  # fmt: skip
