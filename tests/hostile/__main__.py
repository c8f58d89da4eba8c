"""Write the corpus of malicious files: ``python -m ebmkit_tests.hostile OUT [--open]``.

``OUT/index.json`` lists the files. With ``--open`` each file is opened in a separate process, and
the command exits with 1 if one of them violates its limits. ``--json`` saves the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import sys
import time
from pathlib import Path

from ebmkit_tests.hostile.case import Case, outside
from ebmkit_tests.hostile.corpus import all_cases, index, slug, write
from ebmkit_tests.hostile.watch import Outcome, run_in_fork

from ebmkit.compute import environment


def fault(case: Case, outcome: Outcome) -> str | None:
    """Description of a violation when ``case`` was opened, or None."""
    expected = "opened" if case.message is None else "refused"
    if outcome.how != expected:
        return f"{outcome.how} instead of {expected}: {outcome.text}"
    if case.message is not None and not re.search(case.message, outcome.text):
        return f"the message {outcome.text!r} does not match {case.message!r}"
    if not outcome.text.isprintable() or len(outcome.text) > 1500:
        return f"not one printable sentence: {len(outcome.text)} characters, {outcome.text!r:.300}"
    if outcome.touched:
        return "accessed other files or processes: " + "; ".join(outcome.touched[:5])
    if outcome.mib > case.mib:
        return f"took {outcome.mib} MiB of memory, more than {case.mib}"
    if outcome.seconds > case.seconds:
        return f"took {outcome.seconds} s, more than {case.seconds}"
    return None


def main() -> int:
    """Write the corpus, and open it with ``--open``."""
    parser = argparse.ArgumentParser(prog="python -m ebmkit_tests.hostile", description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--open", action="store_true", help="also open each file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="skip slow cases")
    which.add_argument("--slow", action="store_true", help="only slow cases")
    parser.add_argument("--only", default="", help="part of a case's name, or a kind")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    cases, openers = all_cases()
    cases = [c for c in cases if options.only in c.name or options.only == c.kind]
    cases = [c for c in cases if not (c.slow if options.quick else options.slow and not c.slow)]
    home = options.out.resolve()
    paths = [write(case, home) for case in cases]
    (home / "index.json").write_text(index(cases, paths, home))
    print(f"{len(cases)} hostile files in {home}")
    if not options.open:
        return 0
    from ebmkit_tests.hostile.files_models import warm_up

    warm_up()
    gc.collect()
    gc.freeze()  # otherwise a collection in a fork copies the memory of all imports
    start, rows, failed = time.perf_counter(), [], 0
    for case, path in zip(cases, paths, strict=True):
        folder = home / "cases" / slug(case.name)
        outcome = run_in_fork(openers[case.kind], path, folder, outside(folder), case.seconds)
        wrong = fault(case, outcome)
        failed += wrong is not None
        rows.append(
            {"name": case.name, "kind": case.kind, "wrong": wrong, **dataclasses.asdict(outcome)}
        )
        if wrong is not None:
            print(f"{case.kind}: {case.name}: {wrong}")
    spent = time.perf_counter() - start
    recorded = ("ebmkit", "python", "torch", "cores", "git_commit")
    document = {
        "command": "python -m ebmkit_tests.hostile OUT --open",
        "environment": {k: v for k, v in environment().items() if k in recorded},
        "files": len(rows),
        "refused": sum(row["how"] == "refused" for row in rows),
        "opened_harmlessly": sum(row["how"] == "opened" for row in rows),
        "failed": failed,
        "seconds": round(spent, 1),
        "most_mib": max((row["mib"] for row in rows), default=0),
        "cases": [{**row, "text": row["text"].replace(str(home), "OUT")} for row in rows],
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['refused']} refused, {document['opened_harmlessly']} opened harmlessly, "
          f"{failed} failed, in {spent:.1f} s")  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
