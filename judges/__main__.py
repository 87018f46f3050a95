"""List the safety judges that a config may name: built in, and of installed plug-ins.

    python -m judges                     # all of them, with their options and the defaults
    python -m judges my_lab.Dark --json  # one alone, here by its dotted path

Exit status: 1 if a judge that was named cannot be used.
"""

import argparse
import sys
from collections.abc import Sequence

from judges import listing, plugged, plugins
from judges.listing import BUILT_IN, Item
from judges.opening import JUDGES
from judges.options import NOT_OPTIONS, option_types
from judges.session import JudgeError, open_session


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m judges", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listing.add_arguments(parser)
    return listing.show(parser.parse_args(argv), plugins.JUDGES, JUDGES, describe)


def describe(name: str) -> Item:
    """A judge by its name, built in or not. Raises JudgeError if there is none, or if it cannot be used."""
    if name in JUDGES:
        opener, place, origin = JUDGES[name], None, BUILT_IN
    else:
        plugin = plugged.find(name, name)
        if plugin is None:
            known = [*JUDGES, *plugins.offered(plugins.JUDGES)]
            raise JudgeError(f"no such judge; expected one of {', '.join(known)}, or a dotted path")
        opener, place = plugged.opener(plugin, name), plugin.value
        origin = plugin.source(opener)
    known_defaults = listing.defaults(open_session, skip=1) | listing.defaults(opener, skip=1)
    options = {option: known_defaults.get(option, "") for option in option_types(opener) if option not in NOT_OPTIONS}
    module = sys.modules.get(opener.__module__)
    return Item(name, origin, listing.first_line(place, module, opener), options, plugins.source_file(opener))


if __name__ == "__main__":
    sys.exit(main())
