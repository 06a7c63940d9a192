"""Write `digests.json` anew, and print which of its lines became different: `python tests/golden/record.py`.

A line may change only where the numbers are meant to, in the commit that changes them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

Recorded = dict[str, dict[str, str]]


def main() -> None:
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # this checkout's tests and package, whatever is installed
    import lines_cli as lines
    from golden.recipes import DIGESTS, input_digests, output_digests, write_inputs

    before: Recorded = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        outputs = {
            f"{case}/{file}": digest
            for case, files in output_digests(Path(folder), lines.Resources(device="cpu"))
            for file, digest in files.items()
        }
    now: Recorded = {"inputs": input_digests(), "outputs": outputs}
    DIGESTS.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for section, lines_now in now.items():
        lines_before = before.get(section, {})
        for name in sorted(lines_before.keys() | lines_now.keys()):
            if lines_before.get(name) != lines_now.get(name):
                what = "new" if name not in lines_before else "gone" if name not in lines_now else "changed"
                print(f"{what:8}{section:8} {name}")
    print(f"{len(outputs)} files of {len({name.partition('/')[0] for name in outputs})} recipes")


if __name__ == "__main__":
    main()
