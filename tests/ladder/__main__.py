"""The ladder by hand.

python -m tests.ladder golden FAMILY...   recompute tests/golden/FAMILY.npz (torch, transformers)
python -m tests.ladder show FAMILY...     print each check's error for each case
python -m tests.ladder table              run everything and write docs/families.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from .checks import CHECKS, Bench
from .models import cases, families, write_golden
from .table import PAGE, page


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.ladder", description=__doc__)
    parser.add_argument("command", choices=["golden", "show", "table"])
    parser.add_argument("family", nargs="*", help="all of them by default")
    options = parser.parse_args()
    chosen = options.family or families()
    if options.command == "golden":
        for name in chosen:
            write_golden(name)
            print(f"{name}: {len(cases(name))} cases")
    elif options.command == "show":
        for name in chosen:
            for case in cases(name).values():
                with TemporaryDirectory() as folder:
                    bench = Bench(case, Path(folder))
                    errors = {check: entry.measure(bench) for check, entry in CHECKS.items()}
                shown = (f"{c} {e:.1e}" for c, e in errors.items() if e is not None)
                print(f"{case}: {', '.join(shown)}", flush=True)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
