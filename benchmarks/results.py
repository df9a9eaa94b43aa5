"""Run every benchmark of this folder, or those named, and write RESULTS.md."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

from convnn_geo.bench import machine

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
HEAD = """# Results

Made by `make bench`. Each table is one run, side by side: medians,
tenth and ninetieth percentiles, ratios to its first row, and the memory that one call adds. Compare
ratios, not milliseconds.
"""


def sections() -> dict[str, str]:
    """What RESULTS.md holds already, by script."""
    if not RESULTS.exists():
        return {}
    parts = re.split(r"^(?=## )", RESULTS.read_text(), flags=re.MULTILINE)[1:]
    return {re.findall(r"`benchmarks/(\w+)\.py`", part)[0]: part.rstrip() + "\n" for part in parts}


def run(script: Path, before: str | None) -> str:
    """A script's section, or the one before where it awaits another machine; a failure stops."""
    claim = (ast.get_docstring(ast.parse(script.read_text())) or script.stem).splitlines()[0]
    print(claim, flush=True)
    done = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True)
    tables = done.stdout.split("\n", 1)[1].strip()  # the first line names the machine, as here
    print(tables, flush=True)
    if tables.startswith("Awaits") and before is not None:  # measured where there was a GPU
        return before
    where = f"{date.today().isoformat()}, {machine()}"
    return f"## {claim}\n\n`benchmarks/{script.name}` on {where}\n\n{tables}\n"


def main() -> None:
    """Run the scripts one after the other; each result is written at once."""
    scripts = {script.stem: script for script in sorted(FOLDER.glob("*_*.py"))}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *scripts], help="scripts; all by default")
    found = sections()
    for name in parser.parse_args().names or scripts:
        found[name] = run(scripts[name], found.get(name))
        kept = [found[name] for name in scripts if name in found]
        RESULTS.write_text("\n".join([HEAD, *kept]))


if __name__ == "__main__":
    main()
