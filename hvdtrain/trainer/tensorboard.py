"""TensorBoard event files, written with TensorBoard's own library and no framework."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class EventWriter:
    """Scalars by step, and the model's graph."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def graph(self, graph: bytes) -> None:
        """graph: a serialized GraphDef."""
        self._writer.add_event(Event(wall_time=time.time(), graph_def=graph))

    def close(self) -> None:
        self._writer.close()
