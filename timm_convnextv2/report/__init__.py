"""What a run shows: progress, logs, the loss curve, and images of what the model predicts."""

from .contact_sheet import save_contact_sheet
from .histogram import save_histograms
from .image_progress import ImageProgress
from .images import save_loss_curve, save_reconstructions
from .logs import check_logs, open_logs
from .progress import ProgressBar, Stopwatch

__all__ = [
    "ImageProgress",
    "ProgressBar",
    "Stopwatch",
    "check_logs",
    "open_logs",
    "save_contact_sheet",
    "save_histograms",
    "save_loss_curve",
    "save_reconstructions",
]
