"""TensorBoard event files, written with TensorBoard's own library and no framework."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from hvdtrain.system.files import BufferedAppender


class EventWriter:
    """Scalars by step, and the model's graph. What cannot be written now is written later.

    The file is made with the first scalars: a run that makes no step leaves none.
    """

    def __init__(self, folder: Path) -> None:
        # TensorBoard reads the files of a folder by name; the time in it is whole seconds.
        now, who = time.time_ns(), f"{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{now // 10**9:010}.{who}.{now % 10**9}"

        def make_folder() -> bytes:
            folder.mkdir(exist_ok=True)
            return b""

        self.file = BufferedAppender(folder / name, make_folder)
        self._records = RecordWriter(self.file)
        self._pending_events: list[bytes] | None = []  # events before the first scalars
        self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        waiting, self._pending_events = self._pending_events, None
        for event in waiting or []:
            self._records.write(event)
        self._add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def add_graph(self, graph: bytes) -> None:
        """graph: a serialized GraphDef."""
        self._add_event(Event(wall_time=time.time(), graph_def=graph))

    def _add_event(self, event: Event) -> None:
        if self._pending_events is not None:
            self._pending_events.append(event.SerializeToString())
        else:
            self._records.write(event.SerializeToString())

    def close_without_flush(self) -> None:
        """Close the file without writing what is left."""
        self.file.close()

    def close(self) -> None:
        self.file.flush()
        self.file.close()
