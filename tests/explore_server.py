"""The explore page, served by the real command in a process of its own."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

START = 240  # seconds; a machine that does other things takes long to import Gradio


class Server:
    """Serves the run `tiny` of a folder until it is told to end.

    Attributes:
        address: of the page.
        temporary: where it puts temporary files.
        log: what it has said.
        process: to be sent signals.
    """

    def __init__(self, folder: Path) -> None:
        """Start it, and wait for its address."""
        self.temporary, self.log = folder / "temporary", folder / "log"
        self.temporary.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "clipgraft.explore", "tiny"],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdout=log,
                stderr=subprocess.STDOUT,
                # Where the tests run in the background of a script, Ctrl-C is ignored by all that they start.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        self.address = self._address()

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self.address.rstrip("/").rsplit(":", 1)[1])

    def listening(self) -> list[str]:
        """Addresses at which something listens on its port, as the kernel writes them."""
        found = []
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            lines = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            ending = f":{self.port:04X}"
            found += [words[1] for words in lines if words[3] == "0A" and words[1].endswith(ending)]
        return found

    def close(self) -> None:
        """End it, however it is."""
        self.process.kill()
        self.process.wait()

    def _address(self) -> str:
        for _ in range(START * 5):
            found = re.search(r"open (http://127\.0\.0\.1:\d+\S*)", self.log.read_text())
            if found:
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(f"not there after {START} s: {self.log.read_text()}")
