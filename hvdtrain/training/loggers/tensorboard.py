"""TensorBoard: scalars in RUN_DIR/tensorboard by groups, train/loss next to eval/loss, and the model's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdtrain.recipe.metrics import select_scalars
from hvdtrain.system.plugins import registering
from hvdtrain.training.logger import LOGGERS, Logger
from hvdtrain.training.rows import MetricsRow


@registering(LOGGERS, "tensorboard")
class TensorBoardLogger(Logger):
    """Scalars by step, written with TensorBoard's own library. What cannot be written now is written later."""

    def __init__(self, run_dir: Path) -> None:
        from hvdtrain.training.event_writer import MISSING_TENSORBOARD, EventWriter  # TensorBoard takes long to import

        self._events = EventWriter(run_dir / "tensorboard")
        self.unavailable_reason = f"no folder tensorboard: {MISSING_TENSORBOARD}" if MISSING_TENSORBOARD else None
        self.view_command = f"tensorboard --logdir {run_dir}"

    @property
    def error(self) -> OSError | None:
        return self._events.error

    def log_row(self, row: MetricsRow) -> None:
        scalars = {f"train/{name}": value for name, value in select_scalars(row.train).items()}
        scalars |= {"train/lr": row.lr, "train/epoch": float(row.epoch)}
        for prefix, metrics in {"eval": row.eval, **row.evals}.items():
            scalars |= {f"{prefix}/{name}": value for name, value in select_scalars(metrics).items()}
        scalars |= {"speed/samples_per_second": row.samples_per_second, "speed/comm_seconds": row.comm_seconds}
        scalars |= {f"gpu/{name}": float(value) for name, value in row.gpu.items() if not isinstance(value, str)}
        if "throttle" in row.gpu:
            scalars["gpu/throttled"] = float(row.gpu["throttle"] != "")
        self._events.add_scalars(row.step, scalars)

    def log_options(self, options: Mapping[str, object], metrics: Sequence[str]) -> None:
        if self.unavailable_reason is None:
            from hvdtrain.training.hparams import build_hparams

            self._events.add_summary(build_hparams(options, metrics))

    def log_graph(self, graph: bytes) -> None:
        self._events.add_graph(graph)

    def sync_to_disk(self) -> None:
        self._events.sync_to_disk()

    def close(self) -> None:
        self._events.close()

    def close_without_flush(self) -> None:
        self._events.close_without_flush()
