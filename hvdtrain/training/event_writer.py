"""TensorBoard event files, written with TensorBoard's own library and no framework."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from hvdtrain.system.extras import explain_missing_extra
from hvdtrain.system.files import BufferedAppender

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
except ModuleNotFoundError as error:
    MISSING_TENSORBOARD = explain_missing_extra(error)
    if MISSING_TENSORBOARD is None:
        raise
else:
    MISSING_TENSORBOARD = None


class EventWriter:
    """Scalars by step, and the model's graph. What cannot be written now is written later.

    The file is created with the first scalars: a run without a step leaves none. Without TensorBoard there is no file.
    """

    def __init__(self, folder: Path) -> None:
        self._file: BufferedAppender | None = None
        if MISSING_TENSORBOARD:
            return
        # TensorBoard reads the files of a folder by name; the time in it is whole seconds.
        now, who = time.time_ns(), f"{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{now // 10**9:010}.{who}.{now % 10**9}"

        def make_folder() -> bytes:
            folder.mkdir(exist_ok=True)
            return b""

        self._file = BufferedAppender(folder / name, make_folder)
        self._records = RecordWriter(self._file)
        self._pending_events: list[bytes] | None = []  # events before the first scalars
        self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    @property
    def error(self) -> OSError | None:
        """Why events wait in memory, None if all are written."""
        return self._file.error if self._file else None

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        if self._file is None:
            return
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        waiting, self._pending_events = self._pending_events, None
        for event in waiting or []:
            self._records.write(event)
        self._add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def add_summary(self, summary: Summary) -> None:
        """Write a plug-in's summary, which belongs to no step."""
        if self._file is not None:
            self._add_event(Event(wall_time=time.time(), summary=summary))

    def add_graph(self, graph: bytes) -> None:
        """Write a model's graph, a serialized GraphDef."""
        if self._file is not None:
            self._add_event(Event(wall_time=time.time(), graph_def=graph))

    def _add_event(self, event: Event) -> None:
        if self._pending_events is not None:
            self._pending_events.append(event.SerializeToString())
        else:
            self._records.write(event.SerializeToString())

    def sync_to_disk(self) -> None:
        """Write all events, so that they survive the machine; raises OSError if that is not possible now."""
        if self._file is not None:
            self._file.sync_to_disk()

    def close_without_flush(self) -> None:
        """Close the file without writing the events that wait in memory."""
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        """Write the events that wait in memory, as far as possible, and close the file."""
        if self._file is not None:
            self._file.flush()
            self._file.close()
