"""The node under test as a process: started, killed, looked at from outside."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peers import NAMESPACE

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the child: SIGKILL when the soak ends, however it ends; nothing is left running."""
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


class NodeProcess:
    """``python -m picopose_ros.node``, its log in a file that outlives it.

    Args:
        log: file; a node that is started again goes on in it.
        parameters: for ``--ros-args -p``.
    """

    def __init__(self, log: Path, parameters: Mapping[str, object]) -> None:
        self.log_path = log
        self._command = [sys.executable, "-m", "picopose_ros.node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}"]
        for name, value in parameters.items():
            self._command += ["-p", f"{name}:={value}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its readiness shows on the graph."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything it has said."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def resident_bytes(self) -> int:
        """Its resident memory."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout: float) -> int:
        """SIGINT and the exit code; SIGKILL and -9 if that takes too long, 0 if it never ran."""
        if self._process is None:
            return 0
        if self.alive:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode


class Peer:
    """A publisher or a listener of ``peers.py``, and the log that it writes."""

    def __init__(self, log: Path, *words: object) -> None:
        self._log = log
        self._seen = len(self.stamps)
        command = [sys.executable, str(Path(__file__).with_name("peers.py")), *map(str, words)]
        self.process = subprocess.Popen(command, preexec_fn=_die_with_parent)

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
