"""Event files for TensorBoard, written by its own package: without torch or TensorFlow."""

import json
import time
from pathlib import Path
from typing import Any

from mlx_finetune.training.journal import Row
from mlx_finetune.training.tracking import values_of

FOLDER, SUFFIX = "tensorboard", ".metrics"  # of our own files: others that stand there are left alone


class TensorBoard:
    """Writes one file a start. That of a run which goes on has all rows from the first, and takes the place of those before it."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        """The settings stand under the tab TEXT."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run / FOLDER
        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
        # A TensorBoard that is open forgets what the file before this one said.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))
        text = "\n".join(f"    {name}: {json.dumps(value)}" for name, value in settings.items())
        self._writer.add_event(Event(wall_time=time.time(), step=0, summary=text_pb("settings", text)))
        self._writer.flush()

    def log(self, row: Row) -> None:
        """See `Tracker.log`; it stands in the file at once."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in values_of(row).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        self._writer.flush()

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self._writer.close()


begin = TensorBoard
