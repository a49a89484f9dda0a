"""The daemon: HTTP APIs on one side, models in worker processes on the other."""
