"""The command ``label`` in a process of its own, for tests."""

import os
import re
import subprocess
import sys
import threading
import time

from tests.small_config import ROOT


class Serving:
    """``python -m rlhf_jax.label`` of a stage's folder, with what it prints."""

    def __init__(self, folder, *flags):
        command = [sys.executable, '-m', 'rlhf_jax.label', '--workdir', folder.parent]
        self.process = subprocess.Popen(
            [*command, '--stage', folder.name, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self):
        return '\n'.join(self.lines)

    def wait_for(self, pattern, seconds=60):
        """The match of a pattern in what is printed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.text, re.M):
                return found
            if self.process.poll() is not None:
                self.reader.join()
                break
            time.sleep(0.02)
        found = re.search(pattern, self.text, re.M)
        assert found, f'no {pattern!r} in:\n{self.text}'
        return found

    def links(self):
        self.wait_for('Ctrl-C stops')
        return dict(re.findall(r'^  (\S+) +(http://\S+/#\S+)$', self.text, re.M))

    def end(self, signal):
        """Sends a signal and waits; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal)
        status = self.process.wait(timeout=30)
        self.reader.join()
        return status
