"""What every training run shares: processes, lock, folder, checkpoints, progress, logs and how a run ends."""
