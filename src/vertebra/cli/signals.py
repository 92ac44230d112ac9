"""Ctrl-C and SIGTERM while training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning.pytorch as pl


class Signals:
    """Ctrl-C and SIGTERM during ``fit``: the first asks for an end after the current batch, the second ends at once."""

    def __init__(self) -> None:
        self.received = 0
        self.training = False

    def stop(self) -> int:
        """The signal that was received, or 0."""
        return self.received

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle both signals inside the block, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = self.received == signum
        self.received = signum
        if again or not self.training:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping after this batch (a validation is finished first); once more to stop at once\n")


class MarkTraining(pl.Callback):
    """Tells ``Signals`` when batches are being trained, and so when waiting for the end of one makes sense."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to wait."""
        self.signals.training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cease to wait."""
        self.signals.training = False
