"""What a run shows: progress, logs, figures, images of what the model predicts, and the report as one HTML file."""

from .html import write_report
from .images import save_collapse_curves, save_loss_curve, save_neighbours, save_reconstructions
from .logs import check_logs, open_logs
from .progress import ProgressBar, Stopwatch

__all__ = [
    "ProgressBar",
    "Stopwatch",
    "check_logs",
    "open_logs",
    "save_collapse_curves",
    "save_loss_curve",
    "save_neighbours",
    "save_reconstructions",
    "write_report",
]
