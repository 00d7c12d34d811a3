"""The errors that a recipe may raise itself: a user's mistake, and a run that cannot continue."""

from hvdtrain.system.errors import RunError, UserError

__all__ = ["RunError", "UserError"]
