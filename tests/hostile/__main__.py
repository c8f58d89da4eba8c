"""Write the corpus of hostile files, and open it: ``python -m ebmkit_tests.hostile OUT [--open]``.

``OUT/index.json`` says what lies where. With ``--open`` each file is opened in a process of its
own, and the command ends with 1 if one of them did what it must not. ``--json`` keeps the figures.
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
from ebmkit_tests.hostile.watch import Ending, opened

from ebmkit.compute import environment


def complaint(case: Case, ending: Ending) -> str | None:
    """What is wrong with how opening ``case`` ended, if anything is."""
    wanted = "opened" if case.says is None else "refused"
    if ending.how != wanted:
        return f"{ending.how} instead of {wanted}: {ending.text}"
    if case.says is not None and not re.search(case.says, ending.text):
        return f"says {ending.text!r}, which does not match {case.says!r}"
    if not ending.text.isprintable() or len(ending.text) > 1500:
        return f"no sentence: {len(ending.text)} characters, {ending.text!r:.300}"
    if ending.touched:
        return "touched what is not its own: " + "; ".join(ending.touched[:5])
    if ending.mib > case.mib:
        return f"took {ending.mib} MiB of memory, more than {case.mib}"
    if ending.seconds > case.seconds:
        return f"took {ending.seconds} s, more than {case.seconds}"
    return None


def main() -> int:
    """Write, and open if asked to."""
    parser = argparse.ArgumentParser(prog="python -m ebmkit_tests.hostile", description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--open", action="store_true", help="open each file too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="without the slow ones")
    which.add_argument("--slow", action="store_true", help="the slow ones alone")
    parser.add_argument("--only", default="", help="part of the name or kind of the cases wanted")
    parser.add_argument("--json", type=Path, help="where to keep what came of opening them")
    wanted = parser.parse_args()
    cases, openers = all_cases()
    cases = [c for c in cases if wanted.only in c.name or wanted.only == c.kind]
    cases = [c for c in cases if not (c.slow if wanted.quick else wanted.slow and not c.slow)]
    home = wanted.out.resolve()
    paths = [write(case, home) for case in cases]
    (home / "index.json").write_text(index(cases, paths, home))
    print(f"{len(cases)} hostile files in {home}")
    if not wanted.open:
        return 0
    from ebmkit_tests.hostile.files_models import warm_up

    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that was imported
    start, rows, failed = time.perf_counter(), [], 0
    for case, path in zip(cases, paths, strict=True):
        own = home / "cases" / slug(case.name)
        ending = opened(openers[case.kind], path, own, outside(own), case.seconds)
        wrong = complaint(case, ending)
        failed += wrong is not None
        rows.append(
            {"name": case.name, "kind": case.kind, "wrong": wrong, **dataclasses.asdict(ending)}
        )
        if wrong is not None:
            print(f"{case.kind}: {case.name}: {wrong}")
    spent = time.perf_counter() - start
    told = ("ebmkit", "python", "torch", "cores", "git_commit")
    document = {
        "command": "python -m ebmkit_tests.hostile OUT --open",
        "environment": {k: v for k, v in environment().items() if k in told},
        "files": len(rows),
        "refused": sum(row["how"] == "refused" for row in rows),
        "opened_harmlessly": sum(row["how"] == "opened" for row in rows),
        "failed": failed,
        "seconds": round(spent, 1),
        "most_mib": max((row["mib"] for row in rows), default=0),
        "cases": [{**row, "text": row["text"].replace(str(home), "OUT")} for row in rows],
    }
    if wanted.json:
        wanted.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['refused']} refused, {document['opened_harmlessly']} opened harmlessly, "
          f"{failed} failed, in {spent:.1f} s")  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
