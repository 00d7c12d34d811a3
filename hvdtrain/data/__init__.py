"""Data as datasets: arrays, lines of a large file, streams, experience that the model makes as it trains."""

from hvdtrain.data.arrays import Arrays
from hvdtrain.data.lines import Lines
from hvdtrain.data.rollouts import Rollouts
from hvdtrain.data.stream import Stream

__all__ = ["Arrays", "Lines", "Rollouts", "Stream"]
