"""A group of commands whose help lists them with whole sentences."""

from __future__ import annotations

import click

from hvdtrain.system.errors import UserError, suggest_nearest


class CommandGroup(click.Group):
    """Lists the first sentence of each command's help uncut, and names the nearest command for a wrong one."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None:
            raise UserError(f"no command {cmd_name!r}{suggest_nearest(cmd_name, self.list_commands(ctx))}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(str(c.name), c.get_short_help_str(limit=200)) for c in commands if c is not None])
