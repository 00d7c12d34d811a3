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
@click.option(
    "--replay",
    is_flag=True,
    help="Of a run with --server: train it again in this process, up to the newest checkpoint, and compare the bits. "
    "This executes the recipe that the run has kept.",
)
def verify_command(run_dir: Path, as_json: bool, replay: bool) -> int:
    """Replay a run's ledger: did every epoch visit every example exactly once?

    Or, if the recipe has a `sampler`: as often and in the order that it gave, which the ledger keeps ("as ordered").

    Steps that a crash undid, and that were done again after --resume, count once; an epoch that is not complete is
    reported as such. If something is wrong: which ids are missing or repeated (ten at most), in which epoch and step.
    If the ids fed in a step are not those of the order, they are named if one fault explains it.

    With --server each version of the weights is checked: whether each item was applied once, and none too old.

    Exit codes: 0 exactly once or as ordered, 1 not, or other bits, 2 there is no ledger in RUN_DIR or the header of a
    segment is damaged.
    """
    from hvdtrain.ledger.verify import verify_ledger

    verdict = verify_ledger(run_dir)
    found, lines = verdict.as_json(), verdict.format_lines()
    is_right = verdict.is_as_ordered
    if replay and is_right:
        from hvdtrain.training.replay import replay_run

        again = replay_run(run_dir)
        found, lines = found | {"replay": vars(again)}, [*lines, again.format_line()]
        is_right = not again.differing
    click.echo(encode_json(found, indent=2) if as_json else "\n".join(lines))
    return 0 if is_right else EXIT_FAILED
