"""Ctrl-C that lets a training step end first."""

import signal
import threading


def leave_interrupts_to_parent(_: int) -> None:
    """For a loader's workers: the process that started them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupt:
    """Inside, a first Ctrl-C only sets `asked`; a second one raises."""

    def __enter__(self):
        self.asked = False
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole")
        self.asked = True

    def __exit__(self, *error) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
