"""What the verbs of the front door share: how one is added, and the exit codes that it names. It knows no verb."""

import argparse
from typing import TypeAlias

EXIT_CODES = "exit codes: 0 done; 2 wrong input; 3 a fault that a restart can mend; 4 a fault that needs a person"

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(verbs: Verbs, name: str, summary: str, epilog: str = EXIT_CODES) -> argparse.ArgumentParser:
    """A verb, or an action of a verb, with its summary as the first line of its help."""
    return verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
