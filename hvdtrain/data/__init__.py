"""Data that is no list: lines of a large file, streams without a length, experience made as training goes."""

from hvdtrain.data.lines import Lines
from hvdtrain.data.rollouts import Rollouts
from hvdtrain.data.stream import Stream

__all__ = ["Lines", "Rollouts", "Stream"]
