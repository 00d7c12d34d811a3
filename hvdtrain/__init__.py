"""hvdtrain: exact, fast training on Horovod. See README.md."""

__version__ = "0.1.0"
