"""What lies on disk: the folder of a run, its configuration, checkpoints and metrics."""
