"""One run of the command: its loop, checkpoints, work folder, results, logs and figures."""
