"""Build the website of the course, from README, docs/ and the stored outputs of notebooks/, without a network.

    python scripts/build_site.py                   # into build/site/; open build/site/index.html
    python scripts/build_site.py --out FOLDER      # into another folder
    python scripts/build_site.py --jobs 4          # with more processes; default: one for each processor

Any warning fails the build, and the site that was there stays. The settings are in docs/site/. Search needs no
server, but a browser shows extracts of what it found only for pages that come from one:
python -m http.server --bind 127.0.0.1 --directory build/site.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.repository import ROOT
from scripts.site_source import SiteError, assemble

SETTINGS = ROOT / "docs" / "site"


def build(out: Path, jobs: int = 1, root: Path = ROOT) -> list[str]:
    """Build the site into `out`, which is replaced; return the names of its pages.

    Raises:
        SiteError: a page cannot be made, or Sphinx warned; the message contains what it wrote.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent, ignore_cleanup_errors=True) as name:
        work = Path(name)
        pages = assemble(root, work / "source")
        _sphinx(work, root, jobs)
        (work / "html" / "_sources").rmdir()  # Sphinx makes it even where sources are not copied
        shutil.rmtree(out, ignore_errors=True)
        (work / "html").rename(out)
    return pages


def _sphinx(work: Path, root: Path, jobs: int) -> None:
    """Run Sphinx in a process of its own: it changes settings of the whole process."""
    options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-j", str(jobs), "-c", str(SETTINGS)]
    options += ["-D", f"repository_root={root}", "-d", str(work / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, str(work / "source"), str(work / "html")]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if run.returncode or run.stderr.strip():
        raise SiteError(f"{run.stdout}{run.stderr}".replace(f"{work / 'source'}{os.sep}", "").strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Build the site as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="default: build/site")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a processor")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        pages = build(args.out.resolve(), args.jobs)
    except SiteError as error:
        print(f"{error}\n\nThe site is not built: each line above has to go.", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {len(pages)} pages, {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
