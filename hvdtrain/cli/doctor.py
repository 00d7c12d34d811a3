"""`hvdtrain doctor`: what is wrong with this host, or with several and what joins them."""

from __future__ import annotations

import json

import click

from hvdtrain.errors import EXIT_FAILED


@click.command("doctor", context_settings={"max_content_width": 100})
@click.option("--json", "as_json", is_flag=True, help="Print all that was found out as JSON.")
def command(as_json: bool) -> int:
    """See what is wrong with this host.

    What is installed, what the machine has and what of it is left, to be pasted into a message; then what is wrong and
    what to do about it. The last line is `all fine`, or the worst.

    Exit codes: 0 nothing stands in the way of a run; 1 something does.
    """
    from hvdtrain.doctor.facts import Wanted, gather
    from hvdtrain.doctor.findings import of_host, worst_first
    from hvdtrain.doctor.report import describe, verdict
    from hvdtrain.native.cache import wheel_folder

    facts = gather(Wanted(("runs", str(wheel_folder()))))
    found = worst_first(of_host(facts))
    if as_json:
        findings = [finding._asdict() for finding in found]
        click.echo(json.dumps({"facts": facts, "findings": findings, "verdict": verdict(found)}, indent=2))
    else:
        click.echo(describe(facts))
        for finding in found[1:]:
            click.echo(f"{'wrong' if finding.bad else 'warning'}: {finding}")
        click.echo(f"\n{verdict(found)}")
    return EXIT_FAILED if any(finding.bad for finding in found) else 0
