"""`lines`, without measuring what rounding leaves of the coefficients: `unmeasured.py edit BASE FT -o OUT ...`.

What that costs is the difference to `lines` itself.
"""

from __future__ import annotations

from lines_cli.cli.app import main
from lines_cli.engine import run
from lines_cli.plan.realised import Groups

setattr(run, "groups_of", lambda _: Groups((), {}, frozenset(), frozenset()))  # noqa: B010 - it is imported there

if __name__ == "__main__":
    main()
