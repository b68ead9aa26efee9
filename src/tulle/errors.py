"""The one exception that bad input raises."""

LONGEST = 4000
"""Characters of a message."""


class UserError(Exception):
    """Something the user can mend.

    The message is one line: what was expected, what was found, what to try. The command line prints it
    on stderr and exits with code 2; a traceback appears only with ``--debug``.

    Names that come from a file may hold anything: line breaks become spaces, what a terminal would obey (control
    characters) or cannot print (surrogates) is escaped, and a message longer than :data:`LONGEST` loses its middle.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).splitlines())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
