"""The doctor of several hosts: their facts, and where those are good what joins them; told as text and as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.doctor import measure, report
from hvdtrain.doctor.ask import HostReply, local_address_or_none, query_hosts_and_connect_back
from hvdtrain.doctor.findings import DoctorFinding, diagnose_hosts, sort_by_severity
from hvdtrain.doctor.judge import diagnose_network, format_megabits, outlier_links
from hvdtrain.doctor.measure import NetworkMeasurements
from hvdtrain.doctor.meeting import start_coordinator
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import interface_address, is_local_host


def examine_hosts(
    hosts: Sequence[str], *, nic: str | None, ssh: Sequence[str], options: Sequence[str]
) -> tuple[list[HostReply], NetworkMeasurements, list[DoctorFinding]]:
    """Ask hosts for their facts; if all can take part in a run, start a rank on each and measure.

    options: `hvdtrain doctor`'s own, which start a rank on each of the hosts.
    Returns the hosts' answers, what was measured, and what is wrong, the worst first. Raises UserError if this host has
    no interface `nic`.
    """
    answers = query_hosts_and_connect_back(hosts, nic, full=True, first=["runs"], ssh=ssh)
    found, measured = diagnose_hosts(answers, nic), NetworkMeasurements()
    if len(hosts) > 1 and not any(finding.bad for finding in found):
        # This host's address on the way to the others.
        beyond = next((host for host in hosts if not is_local_host(host)), hosts[0])
        address = interface_address(nic) if nic else local_address_or_none(beyond)
        assert address is not None
        try:
            measured = run_network_test(hosts, address, options)
            found += diagnose_network(measured, hosts)
        except RunError as error:
            found.append(DoctorFinding("", str(error)))
    return answers, measured, sort_by_severity(found)


def run_network_test(hosts: Sequence[str], address: str, options: Sequence[str]) -> NetworkMeasurements:
    """Measure what joins the hosts. Raises RunError if their ranks do not start."""
    count, pairs = len(hosts), measure.choose_pairs(len(hosts))
    with start_coordinator(hosts, address, options) as room:
        measured = NetworkMeasurements(
            measure.measure_cpu_slowdowns(room, range(count)), measure.measure_links(room, pairs)
        )
        measure.remeasure_links(room, measured.links, outlier_links(measured.links))
        more = measure.choose_extra_pairs(count, outlier_links(measured.links), pairs)
        if more:
            measured.links |= measure.measure_links(room, more)
            odd = [way for way in outlier_links(measured.links) if (min(way), max(way)) in more]
            measure.remeasure_links(room, measured.links, odd)
        if not any(way.error for way in measured.links.values()):
            # Horovod would not start: it connects all to all.
            measure.measure_all_reduces(room, count, sorted({(min(way), max(way)) for way in measured.links}), measured)
    return measured


def describe_hosts(answers: Sequence[HostReply], measured: NetworkMeasurements) -> str:
    """What differs between the hosts, and what was measured."""
    hosts = [answer.host for answer in answers]
    well = [answer for answer in answers if not answer.error]
    if len(well) == 1:
        return report.describe_host(well[0].facts)
    if not well:
        return "no host answers"
    lines = [report.tabulate_differences(answers) or f"{len(well)} hosts with nothing that differs"]
    if measured.cpu_slowdowns:
        ratios = (f"{hosts[rank]} {ratio:.2f}" for rank, ratio in measured.cpu_slowdowns.items())
        lines += ["", f"work takes, times as long as alone: {', '.join(ratios)}"]
    if measured.links:
        lines += ["", f"{'link':16} {'round trip ms':>15} {'Mbit/s':>9} {'and back':>9} {'all-reduce ms':>14}"]
    for one, other in sorted({(min(pair), max(pair)) for pair in measured.links}):
        there, back = measured.links[one, other], measured.links[other, one]
        if there.error or back.error:
            lines.append(f"{f'{hosts[one]}-{hosts[other]}':16} {there.error or back.error}")
            continue
        taken = (
            f"{1e3 * measured.all_reduces[one, other][0]:14.3g}"
            if (one, other) in measured.all_reduces
            else f"{'-':>14}"
        )
        trip = f"{1e3 * (there.round_trip or 0.0):15.3g}"
        rates = f"{format_megabits(there.rate or 0.0):>9} {format_megabits(back.rate or 0.0):>9}"
        lines.append(f"{f'{hosts[one]}-{hosts[other]}':16} {trip} {rates} {taken}")
    return "\n".join(lines)


def build_json_report(answers: Sequence[HostReply], measured: NetworkMeasurements) -> dict[str, Any]:
    """The same as plain values."""
    hosts = [answer.host for answer in answers]
    return {
        "hosts": [
            {"host": answer.host, "wrong": answer.error, "clock": answer.clock_offset, "facts": answer.facts}
            for answer in answers
        ],
        "busy": {hosts[rank]: ratio for rank, ratio in measured.cpu_slowdowns.items()},
        "links": [
            {
                "from": hosts[one],
                "to": hosts[other],
                "round_trip_seconds": way.round_trip,
                "bits_per_second": way.rate,
                "error": way.error,
            }
            for (one, other), way in measured.links.items()
        ],
        "all_reduce": [
            {"between": [hosts[one], hosts[other]], "seconds": seconds, "right": right}
            for (one, other), (seconds, right) in measured.all_reduces.items()
        ],
    }
