"""Compiles the Triton kernels for GPUs that need not be here, and judges the machine code.

`python -m benchmarks.audit [family ...] [--chip CHIP] [--only TEXT] [--full]`.

The launchers themselves are called on tensors without data, so what is compiled is what they would launch. Each other
module of this folder, but for the parts that all share, is a family: what it asks of a kernel is in its docstring.
"""

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks.audit.chips import CHIPS
from benchmarks.audit.report import report

SHARED = ("__main__", "chips", "machine_code", "report")
FAMILIES = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in SHARED]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help=f"one of {', '.join(FAMILIES)}; by default all")
    parser.add_argument("--chip", choices=tuple(CHIPS), action="append", help="only this chip")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--full", action="store_true", help="every size, dtype and case")
    options = parser.parse_args()
    if unknown := set(options.family) - set(FAMILIES):
        parser.error(f"family: expected some of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    # All are imported first: a family whose markers are not in the sources is refused before anything is compiled.
    families = {name: importlib.import_module(f"benchmarks.audit.{name}") for name in options.family or FAMILIES}
    chosen = {
        name: [
            (chip, *case)
            for chip in options.chip or CHIPS
            for case in family.cases(chip, options.full)
            if options.only in case[-1]
        ]
        for name, family in families.items()
    }
    if not any(chosen.values()):
        parser.error(f"--only: expected a part of a case's name, got {options.only!r}")
    failed = 0
    for name, family in families.items():
        print(f"\n## {name}\n")
        failed += report(family.FIGURES, (row for case in chosen[name] for row in family.audit(*case)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
