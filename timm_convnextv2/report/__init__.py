"""What a run shows: progress, logs, the loss curve, and images of what the model predicts."""

from .images import save_loss_curve, save_reconstructions
from .logs import check_logs, open_logs
from .progress import ProgressBar, Stopwatch

__all__ = ["ProgressBar", "Stopwatch", "check_logs", "open_logs", "save_loss_curve", "save_reconstructions"]
