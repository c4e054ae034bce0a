"""Folders of saved models, which several processes load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tools.models import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), set()

    def path(family: str, **over: Any) -> str:
        name = "-".join((family, *(f"{key}{value}" for key, value in over.items())))
        if name not in made:
            tiny(family, **over).save_pretrained(folder / name)
            made.add(name)
        return str(Path(folder) / name)

    return path
