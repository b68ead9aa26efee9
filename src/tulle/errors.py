"""The one exception that bad input raises."""


class UserError(Exception):
    """Something the user can mend.

    The message is one line: what was expected, what was found, what to try. The command line prints it
    on stderr and exits with code 2; a traceback appears only with ``--debug``.
    """
