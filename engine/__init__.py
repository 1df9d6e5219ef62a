"""What keeps a run alive: command line, processes, checkpoints, logs, codes, released weights."""
