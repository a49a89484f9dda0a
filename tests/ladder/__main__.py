"""The ladder by hand.

python -m tests.ladder golden FAMILY...   recompute tests/golden/FAMILY.npz (torch, transformers)
python -m tests.ladder show FAMILY...     print each check's error for each case
python -m tests.ladder table              run everything and write docs/families.md
python -m tests.ladder answer FOLDER TEXT print transformers' likeliest answer of 24 tokens
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from .answer import answer
from .checks import CHECKS, Bench, prefill_by_position
from .models import cases, families, write_golden
from .table import PAGE, page


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["golden", "show", "table", "answer"])
    parser.add_argument("words", nargs="*", help="families (all by default), or FOLDER TEXT")
    options = parser.parse_args()
    chosen = options.words or families()
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
                    by_position = prefill_by_position(bench)
                shown = (f"{c} {e:.1e}" for c, e in errors.items() if e is not None)
                print(f"{case}: {', '.join(shown)}", flush=True)
                if max(by_position) > CHECKS["prefill"].tolerance:
                    print("  prefill, position 0 first:", *(f"{e:.0e}" for e in by_position))
    elif options.command == "answer":
        folder, text = options.words
        print(answer(Path(folder), text, max_tokens=24))
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
