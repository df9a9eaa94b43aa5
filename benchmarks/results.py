"""Run every benchmark of this folder and write RESULTS.md."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from datetime import date
from pathlib import Path

from convnn_geo.bench import machine

FOLDER = Path(__file__).parent
HEAD = """# Results

Made by `make bench` on {date}. Each table is one run, side by side: medians, tenth and ninetieth
percentiles, ratios to its first row, and the memory that one call adds. Compare ratios, not
milliseconds.

Machine: {machine}
"""


def main() -> None:
    """Run the scripts one after the other; a failure stops."""
    parts = [HEAD.format(date=date.today().isoformat(), machine=machine())]
    for script in sorted(FOLDER.glob("*_*.py")):
        claim = (ast.get_docstring(ast.parse(script.read_text())) or script.stem).splitlines()[0]
        print(claim, flush=True)
        done = subprocess.run(
            [sys.executable, script], check=True, stdout=subprocess.PIPE, text=True
        )
        tables = done.stdout.split("\n", 1)[1].strip()  # the first line names the machine again
        parts.append(f"## {claim}\n\n`benchmarks/{script.name}`\n\n{tables}\n")
        print(tables, flush=True)
    (FOLDER / "RESULTS.md").write_text("\n".join(parts))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
