"""A small corpus for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpora import random_documents, write_files


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(1, 60)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_files(tmp_path / "text", documents)
