"""Coverage-guided fuzzing of whatever reads strangers' files, for those who want more than the suite's mutations.

    pip install atheris                            # beside lines; where there is a build of it for your Python
    python tests/support/fuzz.py header --seconds 60       # or pickle, torch_file, index, config, ...

It begins with `corpus/`, and keeps what it finds worth keeping, and any input that breaks a rule, in `fuzz-out/`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lines_cli", "yaml", "json"]):
    import hostile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=hostile.KINDS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    hostile.prepare(folder, options.kind)
    out = Path("fuzz-out") / options.kind
    out.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={options.seconds}", "-rss_limit_mb=1024", "-timeout=20", f"-artifact_prefix={out}/"]
    where = [str(out), str(hostile.CORPUS / options.kind)]
    atheris.Setup([sys.argv[0], *limits, *where], lambda data: hostile.check(options.kind, folder, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
