"""What a run shows: progress, logs, figures, images of what the model predicts, and the report as one HTML file."""

from .contact_sheet import save_contact_sheet
from .histogram import save_histograms
from .html import write_report
from .image_progress import ImageProgress, with_progress
from .images import save_collapse_curves, save_loss_curve, save_neighbours, save_reconstructions
from .logs import check_logs, open_logs
from .progress import ProgressBar, Stopwatch

__all__ = [
    "ImageProgress",
    "ProgressBar",
    "Stopwatch",
    "check_logs",
    "open_logs",
    "save_collapse_curves",
    "save_contact_sheet",
    "save_histograms",
    "save_loss_curve",
    "save_neighbours",
    "save_reconstructions",
    "write_report",
    "with_progress",
]
