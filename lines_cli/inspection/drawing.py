"""The file that a report is drawn into: a picture, or a page. It appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report


class Drawing:
    """A file that a report will be drawn into.

    Args:
        path: ends in .svg, .png or .html.

    Raises:
        RecipeError: it ends in something else.
        OutputError: it cannot be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._form = path.suffix.lower().removeprefix(".")
        if self._form not in ("svg", "png", "html"):
            raise RecipeError(
                f"--plot {path}: the formats are SVG, PNG and HTML",
                hint="Name a file that ends in .svg, .png or .html.",
            )
        self._drawn = _drawing(self._form)
        if os.path.isdir(path):
            raise OutputError(f"--plot {path}: a folder", hint="Name a file.")
        self._staged = path.with_name(f".lines-{os.getpid()}.part")
        self._write(b"")  # whether that works is better known before the weights are read
        os.unlink(self._staged)
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # such as a name that is too long
            raise self._refusal(error) from error

    def spare(self, inputs: Iterable[Path]) -> None:
        """Refuse to replace any of the inputs.

        Raises:
            OutputError: the file is one.
        """
        if any(self.path.exists() and self.path.samefile(file) for file in inputs):
            raise OutputError(f"--plot {self.path}: an input", hint="Name another file.")

    def save(self, report: Report) -> None:
        """Draw and write it; the file appears whole or not at all, and replaces an older one.

        Raises:
            OutputError: it cannot be written.
        """
        self._write(self._drawn(report))
        try:
            os.replace(self._staged, self.path)
        except OSError as error:
            raise self._refusal(error) from error

    def _write(self, content: bytes) -> None:
        try:
            self._staged.write_bytes(content)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        with suppress(OSError):
            self._staged.unlink()
        return OutputError(
            f"--plot {self.path}: cannot be written: {error.strerror or error}",
            hint="Name a file in a folder that exists and that you may write to.",
        )


def _drawing(form: str) -> Callable[[Report], bytes]:
    """What draws a report in a form. Only pictures need matplotlib."""
    if form == "html":
        from lines_cli.inspection.html import page

        return lambda report: page(report).encode()
    from lines_cli.inspection.plot import picture

    return lambda report: picture(report, form)
