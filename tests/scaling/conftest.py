"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.schedules import DTYPES, MODELS, sides


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Both sides of every model."""
    folder = tmp_path_factory.mktemp("models")
    return {key: sides(folder / key, list(model.places), model.config, dtypes=DTYPES) for key, model in MODELS.items()}
