"""What a run shows: progress, logs, figures, images of what the model predicts, and the report as one HTML file."""

from ..runs.logs import check_logs, open_logs
from ..runs.progress import ImageProgress, ProgressBar, Stopwatch, with_progress
from .html import write_report
from .images import (
    save_collapse_curves,
    save_contact_sheet,
    save_histograms,
    save_loss_curve,
    save_neighbours,
    save_reconstructions,
)

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
