"""The node's peers as processes: started, stalled, killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from node_harness import die_with_parent


class Peer:
    """A publisher or a listener of ``peers.py``, and the log that it writes."""

    def __init__(self, log: Path, *words: object) -> None:
        self._log = log
        self._seen = len(self.stamps)
        command = [sys.executable, str(Path(__file__).with_name("peers.py")), *map(str, words)]
        self.process = subprocess.Popen(command, preexec_fn=die_with_parent)

    @property
    def stamps(self) -> list[int]:
        """All stamps in the log (ns), those of an earlier process too."""
        lines = self._log.read_text().split("\n")[:-1] if self._log.exists() else []
        return [int(line) for line in lines]

    @property
    def new_stamps(self) -> list[int]:
        """The stamps that this process wrote."""
        return self.stamps[self._seen :]

    def freeze(self) -> None:
        """SIGSTOP: it is there, but reads nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 60.0) -> None:
        """SIGTERM, so that it ends in good order; SIGKILL if it doesn't."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
