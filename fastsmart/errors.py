"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: one clear sentence naming the file, line or key, and the way out.

    Raised where the fault is found and turned into that sentence on stderr and exit code 2 by `fastsmart.cli.main`,
    nowhere else. Anything that is not a `UserError` is a bug and keeps its traceback.
    """
