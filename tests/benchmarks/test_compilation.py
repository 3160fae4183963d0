"""The benchmark of compilation: what takes turns, and that nothing is read back."""

import sys

import jax

from benchmarks import compilation
from benchmarks.sizes import MODELS


def test_depths_take_turns_and_the_first_round_is_left_out(monkeypatch, capsys):
    times = iter([99, 99, 99, 2, 1, 3, 4, 6, 5, 3, 6, 9])  # three depths, four rounds
    asked = []

    def compile_seconds(model):
        asked.append(model.layers)
        return next(times)

    monkeypatch.setattr(compilation, 'compile_seconds', compile_seconds)
    monkeypatch.setattr(jax.config, 'update', lambda *_: None)
    monkeypatch.setattr(sys, 'argv', ['c', '--depths', '4,8,28', '--rounds', '3'])
    compilation.main()
    assert asked == [4, 8, 28] * 4
    # Medians 3, 6, 5 over 3; in the rounds 1/2, 6/4, 6/3 and 3/2, 5/4, 9/3.
    assert capsys.readouterr().out.splitlines() == [
        '4 layers: 1.00 × that of 4 (1.00 to 1.00 in a round)',
        '8 layers: 2.00 × that of 4 (0.50 to 2.00 in a round)',
        '28 layers: 1.67 × that of 4 (1.25 to 3.00 in a round)',
    ]


def test_a_step_is_compiled_every_time():
    seconds = []

    def note(event, duration, fun_name=None, **_):
        name = event.rsplit('/')[-1]
        if (name, fun_name) == ('backend_compile_duration', 'jit(sft_step)'):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    took = [compilation.compile_seconds(MODELS['tiny']) for _ in range(2)]
    assert len(seconds) == 2
    assert all(whole > part > 0 for whole, part in zip(took, seconds))
