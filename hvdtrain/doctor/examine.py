"""Examine several hosts: their facts, and if those are good the network between them; as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdtrain.doctor import report
from hvdtrain.doctor.findings import DoctorFinding, diagnose_hosts, sort_by_severity
from hvdtrain.doctor.host_facts import FactsRequest
from hvdtrain.doctor.network_test.coordinator import start_workers
from hvdtrain.doctor.network_test.diagnose import diagnose_network, format_megabits
from hvdtrain.doctor.network_test.measure import NetworkMeasurements, run_network_test
from hvdtrain.doctor.network_test.messages import Pair
from hvdtrain.doctor.query import HostReply, local_address_or_none, query_hosts_and_connect_back
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import interface_address, is_local_host


@dataclass
class Examination:
    """What was found out about several hosts.

    Attributes:
        replies: of the hosts, in the order of their ranks.
        measured: by the network test; empty if it did not run.
        findings: what is wrong, the worst first.
    """

    replies: list[HostReply]
    measured: NetworkMeasurements = field(default_factory=NetworkMeasurements)
    findings: list[DoctorFinding] = field(default_factory=list)

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts, in the order of their ranks."""
        return [reply.host for reply in self.replies]


def examine_hosts(hosts: Sequence[str], *, nic: str | None, ssh: Sequence[str], options: Sequence[str]) -> Examination:
    """Ask hosts for their facts; if all can take part in a run, test the network with a worker on each.

    Args:
        hosts: their names.
        nic: the interface to use; None: the one toward the others.
        ssh: more options for ssh.
        options: of `hvdtrain doctor`, which start a rank on each of the hosts.

    Raises:
        UserError: this host has no interface `nic`.
    """
    result = Examination(query_hosts_and_connect_back(hosts, nic, FactsRequest(["runs"]), ssh))
    found = diagnose_hosts(result.replies, nic)
    if len(hosts) > 1 and not any(finding.bad for finding in found):
        # This host's address on the way to the others.
        remote = next((host for host in hosts if not is_local_host(host)), hosts[0])
        address = interface_address(nic) if nic else local_address_or_none(remote)
        assert address is not None  # the hosts could connect to it
        try:
            with start_workers(hosts, address, options) as coordinator:
                result.measured = run_network_test(coordinator)
            found += diagnose_network(result.measured, hosts)
        except RunError as error:
            found.append(DoctorFinding("", str(error)))
    result.findings = sort_by_severity(found)
    return result


def describe_hosts(result: Examination) -> str:
    """Return as text what differs between the hosts, and what was measured."""
    valid = [reply for reply in result.replies if not reply.error]
    if len(valid) == 1:
        return report.describe_host(valid[0].facts)
    if not valid:
        return "no host answers"
    lines = [report.tabulate_differences(result.replies) or f"{len(valid)} hosts without differences"]
    measured = result.measured
    if measured.cpu_slowdowns:
        slowdowns = (f"{result.hosts[rank]} {slowdown:.2f}" for rank, slowdown in measured.cpu_slowdowns.items())
        lines += ["", f"CPU slowdown against an idle host: {', '.join(slowdowns)}"]
    if measured.links:
        lines += ["", f"{'link':16} {'round trip ms':>15} {'Mbit/s':>9} {'and back':>9} {'all-reduce ms':>14}"]
    lines += [describe_link(pair, measured, result.hosts) for pair in measured.measured_pairs()]
    return "\n".join(lines)


def describe_link(pair: Pair, measured: NetworkMeasurements, hosts: Sequence[str]) -> str:
    """Return a link as a row of the table."""
    one, other = pair
    name, there, back = f"{hosts[one]}-{hosts[other]}", measured.links[one, other], measured.links[other, one]
    if there.error or back.error:
        return f"{name:16} {there.error or back.error}"
    reduced = f"{1e3 * measured.all_reduces[pair].seconds:.3g}" if pair in measured.all_reduces else "-"
    rates = f"{format_megabits(there.rate or 0.0):>9} {format_megabits(back.rate or 0.0):>9}"
    return f"{name:16} {1e3 * (there.round_trip or 0.0):15.3g} {rates} {reduced:>14}"


def build_json_report(result: Examination) -> dict[str, object]:
    """Return what was found out as JSON: the keys are part of `hvdtrain doctor --json`."""
    hosts, measured = result.hosts, result.measured
    return {
        "hosts": [
            {
                "host": reply.host,
                "wrong": reply.error,
                "clock": reply.clock_offset,
                "facts": {} if reply.error else reply.facts.encode_json(),
            }
            for reply in result.replies
        ],
        "busy": {hosts[rank]: slowdown for rank, slowdown in measured.cpu_slowdowns.items()},
        "links": [
            {
                "from": hosts[one],
                "to": hosts[other],
                "round_trip_seconds": link.round_trip,
                "bits_per_second": link.rate,
                "error": link.error,
            }
            for (one, other), link in measured.links.items()
        ],
        "all_reduce": [
            {"between": [hosts[one], hosts[other]], "seconds": reduced.seconds, "right": reduced.right}
            for (one, other), reduced in measured.all_reduces.items()
        ],
    }
