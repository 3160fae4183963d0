"""From what the workers answered to tables: medians, ratios, shares of the machine.

Everything here is arithmetic on the results that ``workers.measure`` returns; nothing
is run. Read ``workers.py`` next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import flops
from benchmarks.sizes import Model, Probe, Work

OURS = 'rlhf_jax'
Result = Mapping[str, Any]  # of one system


# --------------------------------------------------------------------------- statistics


def seconds_of(result: Result) -> list[float]:
    """All steps of all rounds."""
    return [s for answer in result['rounds'] for s in answer['seconds']]


def median_of(result: Result) -> float:
    """Seconds of a step: the median over all steps of all rounds."""
    return statistics.median(seconds_of(result))


def ratio_of(theirs: Result, own: Result) -> tuple[float, float, float]:
    """(ratio, least, greatest): their median seconds over ours, and the same within the
    rounds, whose two turns lie next to each other. Above 1 we are faster.
    """
    by_round = [
        statistics.median(a['seconds']) / statistics.median(b['seconds'])
        for a, b in zip(theirs['rounds'], own['rounds'])
    ]
    return median_of(theirs) / median_of(own), min(by_round), max(by_round)


def peak_of(rounds: Sequence[Result], probe: Probe) -> dict[str, float]:
    """The machine's best in these rounds: ``flops`` per second of the matrix product,
    ``bandwidth`` of the copy in bytes per second, read and written.
    """
    product = min(s for answer in rounds for s in answer['phases']['product'])
    copy = min(s for answer in rounds for s in answer['phases']['copy'])
    return {
        'flops': 2 * probe.side**3 / product,
        'bandwidth': 2 * probe.copied / copy,
    }


def slope(points: Mapping[float, float]) -> float:
    """Exponent p of y ∝ xᵖ: the least-squares slope of log y over log x.

    Raises:
        ValueError: fewer than two points.
    """
    if len(points) < 2:
        raise ValueError(f'a slope needs two points, not {len(points)}')
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x_mean, y_mean = statistics.fmean(xs), statistics.fmean(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys))
    return above / sum((x - x_mean) ** 2 for x in xs)


def compile_seconds(result: Result) -> float:
    """What the steps before the first round took beyond as many others: compilation,
    mostly.
    """
    usual = median_of(result)
    return sum(max(s - usual, 0.0) for s in result['warm'])


def peak_bytes(result: Result) -> int:
    """Greatest memory while steps ran: the accelerator's where there is one, which
    counts from the start of the process; resident memory of the host otherwise.
    """
    memories = [answer['memory'] for answer in result['rounds']]
    return max(m.get('device_peak_bytes', m['peak_bytes']) for m in memories)


# --------------------------------------------------------------------------- rendering


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    align = ['---'] + ['---:'] * (len(header) - 1)
    lines = [header, align, *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def number(x: float) -> str:
    """Three digits, without an exponent."""
    if x == 0 or not math.isfinite(x):
        return str(x)
    digits = 2 - math.floor(math.log10(abs(x)))
    return f'{round(x, digits):,.{max(digits, 0)}f}'


def has_figures(result: Result | None) -> bool:
    """Whether a system did the work."""
    return bool(result) and bool(result.get('rounds'))


def speed_table(results: Mapping[str, Mapping[str, Result]], names: list[str]) -> str:
    """Seconds of a step by work and system, and how many times faster ours is."""
    peers = [name for name in names if name != OURS]
    header = ['work', f'{OURS}, s']
    for name in peers:
        header += [f'{name}, s', f'{name} / {OURS} (rounds)']
    rows = []
    for work, by_system in results.items():
        own = by_system.get(OURS)
        row = [work, number(median_of(own)) if has_figures(own) else '–']
        for name in peers:
            theirs = by_system.get(name)
            row.append(number(median_of(theirs)) if has_figures(theirs) else '–')
            if has_figures(theirs) and has_figures(own):
                middle, least, most = (f'{x:.2f}' for x in ratio_of(theirs, own))
                row.append(f'**{middle}** ({least}–{most})')
            else:
                row.append('–')
        rows.append(row)
    return markdown(header, rows)


def share_table(
    results: Mapping[str, Mapping[str, Result]],
    names: list[str],
    model: Model,
    works: Mapping[str, Work],
    probe: Probe,
) -> str:
    """MFU of every work and system; of generation, the share of the copy's bandwidth
    that the bytes of decoding take up. The machine's best is that of the work's own
    rounds: it drifts from one work to the next.
    """
    header = ['work', 'GFLOP', 'product, GFLOP/s', *(f'{name}, MFU' for name in names)]
    header += [f'{name}, bandwidth' for name in names]
    rows = []
    for label, by_system in results.items():
        work = works[label]
        needed, read = flops.flops(model, work), flops.decode_bytes(model, work)
        peak = peak_of(by_system['machine']['rounds'], probe)
        row = [label, number(needed / 1e9), number(peak['flops'] / 1e9)]
        bandwidth = []
        for name in names:
            result = by_system.get(name)
            if not has_figures(result):
                row.append('–')
                bandwidth.append('–')
                continue
            seconds = median_of(result)
            row.append(f'{needed / seconds / peak["flops"]:.1%}')
            share = read / seconds / peak['bandwidth']
            bandwidth.append(f'{share:.1%}' if work.kind == 'generate' else '')
        rows.append(row + bandwidth)
    return markdown(header, rows)


def cost_table(results: Mapping[str, Mapping[str, Result]], names: list[str]) -> str:
    """Seconds of compilation, and memory."""
    header = ['work', *(f'{name}, compile s' for name in names)]
    header += [f'{name}, peak MiB' for name in names]
    rows = []
    for label, by_system in results.items():
        row, memory = [label], []
        for name in names:
            result = by_system.get(name)
            if not has_figures(result):
                row.append('–')
                memory.append('–')
                continue
            row.append(number(compile_seconds(result)))
            memory.append(f'{peak_bytes(result) / 2**20:,.0f}')
        rows.append(row + memory)
    return markdown(header, rows)


def phase_table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Median seconds of the phases that a system tells apart; '' where none does."""
    rows = []
    for label, by_system in results.items():
        for name, result in by_system.items():
            if name == 'machine' or not has_figures(result):
                continue
            phases: dict[str, list[float]] = {}
            for answer in result['rounds']:
                for phase, seconds in answer['phases'].items():
                    phases.setdefault(phase, []).extend(seconds)
            told = (f'{k} {number(statistics.median(s))}' for k, s in phases.items())
            if phases:
                rows.append([f'{label}, {name}', ', '.join(told)])
    return markdown(['work', 'seconds by phase'], rows) if rows else ''


def reasons(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Why a system has no figure, a line each."""
    lines = []
    for label, by_system in results.items():
        for name, result in by_system.items():
            why = result.get('error') or result.get('lacks')
            if why:
                lines.append(f'* {label}, {name}: {why}')
    return '\n'.join(lines) + '\n' if lines else ''


def scaling_table(
    what: str, results: Mapping[str, Mapping[str, Result]], names: list[str]
) -> str:
    """Seconds of a step and of compilation over one quantity, and the exponent of the
    power law through the steps.
    """
    header = [what, *(f'{name}, s' for name in names)]
    header += [f'{name}, compile s' for name in names]
    rows = []
    points: dict[str, dict[float, float]] = {name: {} for name in names}
    for value, by_system in results.items():
        row, compiled = [value], []
        for name in names:
            result = by_system.get(name)
            if not has_figures(result):
                row.append('–')
                compiled.append('–')
                continue
            points[name][float(value)] = median_of(result)
            row.append(number(median_of(result)))
            compiled.append(number(compile_seconds(result)))
        rows.append(row + compiled)
    powers = [f'{slope(p):.2f}' if len(p) > 1 else '–' for p in points.values()]
    rows.append(['log–log slope', *powers, *['' for _ in names]])
    return markdown(header, rows)
