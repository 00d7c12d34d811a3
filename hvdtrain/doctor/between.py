"""The doctor of several hosts: their facts, and where those are good what joins them; told as text and as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.doctor import measure, report
from hvdtrain.doctor.ask import Answer, ask_with_way_back, way_to
from hvdtrain.doctor.findings import Finding, of_hosts, worst_first
from hvdtrain.doctor.judge import judge, megabits, odd_ways
from hvdtrain.doctor.measure import Measured
from hvdtrain.doctor.meeting import meeting
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import address_of, is_here


def examine(
    hosts: Sequence[str], *, nic: str | None, ssh: Sequence[str], options: Sequence[str]
) -> tuple[list[Answer], Measured, list[Finding]]:
    """Ask hosts for their facts; if all can take part in a run, start a rank on each and measure.

    options: `hvdtrain doctor`'s own, which start a rank on each of the hosts.
    Returns the hosts' answers, what was measured, and what is wrong, the worst first. Raises UserError if this host has
    no interface `nic`.
    """
    answers = ask_with_way_back(hosts, nic, full=True, first=["runs"], ssh=ssh)
    found, measured = of_hosts(answers, nic), Measured()
    if len(hosts) > 1 and not any(finding.bad for finding in found):
        # This host's address on the way to the others.
        beyond = next((host for host in hosts if not is_here(host)), hosts[0])
        address = address_of(nic) if nic else way_to(beyond)
        assert address is not None
        try:
            measured = between(hosts, address, options)
            found += judge(measured, hosts)
        except RunError as error:
            found.append(Finding("", str(error)))
    return answers, measured, worst_first(found)


def between(hosts: Sequence[str], address: str, options: Sequence[str]) -> Measured:
    """Measure what joins the hosts. Raises RunError if their ranks do not start."""
    count, pairs = len(hosts), measure.pairs_of(len(hosts))
    with meeting(hosts, address, options) as room:
        measured = Measured(measure.measure_busy(room, range(count)), measure.measure_ways(room, pairs))
        measure.measure_again(room, measured.ways, odd_ways(measured.ways))
        more = measure.more_pairs(count, odd_ways(measured.ways), pairs)
        if more:
            measured.ways |= measure.measure_ways(room, more)
            odd = [way for way in odd_ways(measured.ways) if (min(way), max(way)) in more]
            measure.measure_again(room, measured.ways, odd)
        if not any(way.error for way in measured.ways.values()):
            # Horovod would not start: it connects all to all.
            measure.reduce(room, count, sorted({(min(way), max(way)) for way in measured.ways}), measured)
    return measured


def describe(answers: Sequence[Answer], measured: Measured) -> str:
    """What differs between the hosts, and what was measured."""
    hosts = [answer.host for answer in answers]
    well = [answer for answer in answers if not answer.wrong]
    if len(well) == 1:
        return report.describe(well[0].facts)
    if not well:
        return "no host answers"
    lines = [report.table(answers) or f"{len(well)} hosts with nothing that differs"]
    if measured.busy:
        ratios = (f"{hosts[rank]} {ratio:.2f}" for rank, ratio in measured.busy.items())
        lines += ["", f"work takes, times as long as alone: {', '.join(ratios)}"]
    if measured.ways:
        lines += ["", f"{'link':16} {'round trip ms':>15} {'Mbit/s':>9} {'and back':>9} {'all-reduce ms':>14}"]
    for one, other in sorted({(min(pair), max(pair)) for pair in measured.ways}):
        there, back = measured.ways[one, other], measured.ways[other, one]
        if there.error or back.error:
            lines.append(f"{f'{hosts[one]}-{hosts[other]}':16} {there.error or back.error}")
            continue
        taken = f"{1e3 * measured.reduced[one, other][0]:14.3g}" if (one, other) in measured.reduced else f"{'-':>14}"
        trip = f"{1e3 * (there.round_trip or 0.0):15.3g}"
        rates = f"{megabits(there.rate or 0.0):>9} {megabits(back.rate or 0.0):>9}"
        lines.append(f"{f'{hosts[one]}-{hosts[other]}':16} {trip} {rates} {taken}")
    return "\n".join(lines)


def values(answers: Sequence[Answer], measured: Measured) -> dict[str, Any]:
    """The same as plain values."""
    hosts = [answer.host for answer in answers]
    return {
        "hosts": [
            {"host": answer.host, "wrong": answer.wrong, "clock": answer.clock, "facts": answer.facts}
            for answer in answers
        ],
        "busy": {hosts[rank]: ratio for rank, ratio in measured.busy.items()},
        "links": [
            {
                "from": hosts[one],
                "to": hosts[other],
                "round_trip_seconds": way.round_trip,
                "bits_per_second": way.rate,
                "error": way.error,
            }
            for (one, other), way in measured.ways.items()
        ],
        "all_reduce": [
            {"between": [hosts[one], hosts[other]], "seconds": seconds, "right": right}
            for (one, other), (seconds, right) in measured.reduced.items()
        ],
    }
