"""What runs: `python -m services.<name>` is one service, `python -m services` all four in one process."""
