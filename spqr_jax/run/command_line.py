"""Commands with a config on their command line: a mistake that the user can mend is one line, and exit status 2."""

import sys
from collections.abc import Callable

from absl import flags, logging


def read_flags(program: str, argv: list[str]) -> list[str]:
    """Read the flags; every mistake in a config field is answered with one line. program: its name in messages."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]  # an error that a config file raises comes as a traceback
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error.args[0] if error.args else error)
    print(f"{program}: {message}\nTry --help.", file=sys.stderr)
    sys.exit(2)


def guarded(program: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run `main`; an error that the user can mend is one line instead of a traceback, unless --verbosity asks for more
    than INFO."""
    try:
        main(argv)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if logging.get_verbosity() > logging.INFO:
            raise
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
