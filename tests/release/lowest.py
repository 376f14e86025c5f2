"""Print the lowest declared version of every dependency, as pip's constraints.

    python tests/release/lowest.py pyproject.toml > lowest.txt

torch and torchvision come in pairs, and old pairs not for every Python: they are left as installed.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PAIRED = {"torch", "torchvision"}


def floors(pyproject: Path, extras: tuple[str, ...]) -> dict[str, str]:
    """Return the lowest version of each dependency and of those of some extras."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = {}
    for requirement in map(Requirement, lines):
        lowest = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if not lowest:
            raise SystemExit(f"{requirement.name}: no lowest version is declared")
        found[requirement.name] = lowest[0]
    return found


if __name__ == "__main__":
    for name, version in floors(Path(sys.argv[1]), ("test",)).items():
        if name not in PAIRED:
            print(f"{name}=={version}")
