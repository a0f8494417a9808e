"""Print the test matrix that the classifiers in pyproject.toml claim, as outputs of a GitHub Actions step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import tomllib

SYSTEMS = {"POSIX": "ubuntu-latest", "MacOS": "macos-latest", "Microsoft :: Windows": "windows-latest"}

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
classifiers = project["classifiers"]
pythons = [
    found[1] for each in classifiers if (found := re.fullmatch(r"Programming Language :: Python :: (\d+\.\d+)", each))
]
if any(each.startswith("Programming Language :: Python :: Free Threading ::") for each in classifiers):
    pythons.append(f"{pythons[-1]}t")
systems = [SYSTEMS[name] for each in classifiers if (name := each.removeprefix("Operating System :: ")) != each]
print(f"pythons={json.dumps(pythons)}")
print(f"systems={json.dumps(systems)}")
