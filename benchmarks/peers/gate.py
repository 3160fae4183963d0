"""The worker's side of a benchmark: one JSON object a line, on stdin and stdout.

    parent → worker   {"steps": 5}            run five steps and say how long each took
    worker → parent   {"ready": {…}}          once, when the work is set up
                      {"seconds": […], "phases": {"generate": […]}, "memory": {…}}
                      {"error": "…"}          and the worker ends

A trainer that owns its loop calls the gate from inside it, by a callback or from the
iterator that it reads its batches from: ``begin`` waits there until steps are asked
for. So a worker uses no processor while another one is measured. The standard library
alone is imported here: this file runs in every peer's environment.
"""

import json
import os
import sys
import time
import traceback


class Gate:
    """Counts and times the steps that the parent asks for."""

    def __init__(self, spec, answers, requests, device_memory):
        self.spec = spec
        self._answers = answers
        self._requests = requests
        self._device_memory = device_memory
        self._left = 0
        self._seconds, self._phases = [], {}
        self._start = self._mark = None

    def ready(self, **facts):
        """Says that the work is set up: versions, parameters, what is worth keeping."""
        self._say({'ready': facts})

    def begin(self):
        """Before a step: waits for a request if none is being answered; ends the
        process when the parent is done.
        """
        while self._left == 0:
            line = self._requests.readline()
            if not line:
                sys.stdout.flush()
                os._exit(0)  # nothing of the peer's own shutdown is wanted
            self._left = json.loads(line)['steps']
            self._seconds, self._phases = [], {}
            reset_peak()
        self._start = self._mark = time.perf_counter()

    def mark(self, phase):
        """Inside a step: what was done since the last mark was this phase."""
        if self._mark is not None:
            now = time.perf_counter()
            self._phases.setdefault(phase, []).append(now - self._mark)
            self._mark = now

    def end(self):
        """After a step, whose results have been waited for. Without a ``begin`` before
        it nothing happens, so that an iterator can call it first.
        """
        if self._start is None:
            return
        self._seconds.append(time.perf_counter() - self._start)
        self._start = self._mark = None
        self._left -= 1
        if self._left == 0:
            memory = {**host_memory(), **self._device_memory()}
            self._say(
                {'seconds': self._seconds, 'phases': self._phases, 'memory': memory}
            )

    def fail(self, error):
        """Tells the parent why there are no figures."""
        self._say({'error': error})

    def _say(self, message):
        self._answers.write(json.dumps(message) + '\n')
        self._answers.flush()


def host_memory():
    """Bytes: resident at the peak since the last ``reset_peak``, and now."""
    with open('/proc/self/status') as file:
        fields = dict(line.split(':', 1) for line in file)
    return {
        'peak_bytes': int(fields['VmHWM'].split()[0]) * 1024,
        'now_bytes': int(fields['VmRSS'].split()[0]) * 1024,
    }


def reset_peak():
    """Lets the kernel count the peak anew; if it refuses, that is the process's."""
    try:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')
    except OSError:
        pass


def serve(begin_work, device_memory=dict):
    """What a worker's ``main`` is: reads the specification of the work from the command
    line and runs it behind a gate.

    Args:
        begin_work: gate -> None; does not return before the parent is done.
        device_memory: () -> {'device_peak_bytes': …} on an accelerator.
    """
    spec = json.loads(sys.argv[1])
    if 'cores' in spec:  # threads that are made from here on stay there
        os.sched_setaffinity(0, spec['cores'])
    # Libraries print; what they print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    gate = Gate(spec, answers, sys.stdin, device_memory)
    try:
        begin_work(gate)
        gate.fail('the work ended by itself, before the parent had what it asked for')
    except Exception as error:
        traceback.print_exc()
        gate.fail(f'{type(error).__name__}: {error}')
    sys.stderr.flush()
    os._exit(1)
