"""`hvdtrain ledger`: check a run's ledger."""

from __future__ import annotations

from pathlib import Path

import click

from hvdtrain.cli.groups import CommandGroup
from hvdtrain.system.errors import EXIT_FAILED, UserError
from hvdtrain.system.strict_json import encode_json


@click.group("ledger", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def ledger_command(context: click.Context) -> None:
    """Check by a run's ledger whether every epoch visited every example exactly once.

    A run records in RUN_DIR/ledger which examples each step consumed: a place in the epoch's order, how many
    examples the ranks really fed to the model, and a sum of hashes of their ids, both added up over ranks in the step
    itself. `verify` computes the order again and compares.
    """
    if context.invoked_subcommand is None:
        raise UserError("`hvdtrain ledger` needs a command: verify")


@ledger_command.command("verify")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def verify_command(run_dir: Path, as_json: bool) -> int:
    """Replay a run's ledger: did every epoch visit every example exactly once?

    Or, if the recipe has a `sampler`: as often and in the order that it gave, which the ledger keeps ("as ordered").

    Steps that a crash undid, and that were done again after --resume, count once; an epoch that is not complete is
    reported as such. If something is wrong: which ids are missing or repeated (ten at most), in which epoch and step.
    If the ids fed in a step are not those of the order, they are named if one fault explains it.

    Exit codes: 0 exactly once or as ordered, 1 not, 2 there is no ledger in RUN_DIR or a segment's header is damaged.
    """
    from hvdtrain.ledger.verify import verify_ledger as replay

    verdict = replay(run_dir)
    click.echo(encode_json(verdict.as_json(), indent=2) if as_json else "\n".join(verdict.format_lines()))
    return 0 if verdict.is_as_ordered else EXIT_FAILED
