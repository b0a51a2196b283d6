"""The command that begins a folder of one's own: init."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.cli.common import Commands, add_command, print_tables, say
from megadistill.redaction import printable_line

if TYPE_CHECKING:
    from rich.tree import Tree

INIT_EPILOG = """\
DIR gets a first recipe to edit (recipes/mine.yaml), the other recipes, for one
to 512 nodes, with the public configs that they name, the DeepSpeed files and the
scripts for Slurm, Kubernetes, SkyPilot and ssh. A file of yours is never overwritten. The paths in a recipe are
relative to the folder that you start in: start the commands in DIR.

example: megadistill init work && cd work"""

NEXT = """\
Next, with your teacher on Hugging Face for ORG/MODEL, and files or folders of
text for TEXT (recipes/mine.yaml says the rest):

{cd}  hf download ORG/MODEL --local-dir models/teacher
  megadistill tokenize TEXT --tokenizer models/teacher --sequence-length 512 \\
      --heldout-fraction 0.05 --output data/mine
  megadistill doctor recipes/mine.yaml
  megadistill train recipes/mine.yaml
  megadistill export runs/mine --output models/student
  megadistill evaluate models/student --teacher models/teacher \\
      --data data/mine/heldout/manifest.json
  megadistill sample models/student --prompt 'The'

On Slurm: slurm/env.sh.example begins with what to do. Elsewhere: launch/."""


def add(commands: Commands) -> None:
    summary = "begin a folder of your own: a first recipe, all recipes, DeepSpeed files, launch scripts"
    command = add_command(commands, "init", summary, INIT_EPILOG, _init)
    command.add_argument("folder", type=Path, metavar="DIR", help="the folder, which is made if it is not there")


def _init(options: argparse.Namespace) -> None:
    from megadistill.shipped import write_starter_files

    folder = options.folder
    print_tables(_tree(folder, write_starter_files(folder)))
    here = folder.resolve() == Path.cwd()
    say("\n" + NEXT.format(cd="" if here else f"  cd {shlex.quote(str(folder))}\n"))


def _tree(folder: Path, paths: Sequence[Path]) -> "Tree":
    """The files of each folder by name, those of its subfolders by number."""
    from rich.text import Text
    from rich.tree import Tree

    from megadistill.shipped import FIRST_RECIPE, FOLDERS

    top = Tree(Text(printable_line(str(folder))))
    for name in FOLDERS:
        branch = top.add(Text(f"{name}/"))
        inside = [path.relative_to(name) for path in paths if path.parts[0] == name]
        for path in inside:
            if len(path.parts) == 1:
                branch.add(Text(f"{path}   the one to edit first" if name / path == FIRST_RECIPE else str(path)))
        for each in sorted({path.parts[0] for path in inside if len(path.parts) > 1}):
            count = sum(path.parts[0] == each for path in inside)
            branch.add(Text(f"{each}/ ({count} files)"))
    return top
