"""Checks of the built Horovod that take long, run by hand: each names its command in its first lines."""
