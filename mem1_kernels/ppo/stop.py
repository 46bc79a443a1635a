"""Ends a run between two steps when it is told to: SIGTERM, which clusters send, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

# A launcher passes a terminal's Ctrl-C on to processes that have had it already.
ONE_PRESS = 1.0


class Stopped(SystemExit):
    """A signal ended the run early, at a step's end. As the exit of a program it is silent.

    Attributes:
        code: the exit code, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
        text: what was saved, and how to go on.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(128 + number)
        self.text = f"{signal.Signals(number).name}: {text}"

    def __str__(self) -> str:
        return self.text


class StopSignals:
    """While it is entered, SIGTERM and Ctrl-C are noted for `received` instead of ending us.

    A second Ctrl-C, more than a second later, raises KeyboardInterrupt at once. A handler of your
    own stays, and so does a signal that is ignored (nohup); outside of the main thread, where
    Python sets no handlers, nothing changes.
    """

    def __init__(self, accelerator: Accelerator, say: bool) -> None:
        self.accelerator = accelerator
        self.say = say
        self.number = 0
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if self.say:
                name = signal.Signals(number).name
                with suppress(OSError):  # a terminal that is gone
                    # Not print: the signal may have come in the middle of one.
                    os.write(2, f"\n{name}: the run stops at the end of this step\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.since > ONE_PRESS:
            raise KeyboardInterrupt

    def received(self) -> int:
        """The number of the signal that any process of the launch has received, or 0.

        All processes must call; they get the same answer.
        """
        if self.accelerator.num_processes == 1:
            return self.number
        mine = torch.tensor([self.number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())
