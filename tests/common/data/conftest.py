"""Data sets that several files of tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.digits import prepare_digits
from tests.common.data.backends import samples
from tests.common.data.forms import FORM_NAMES, write_split


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    for form in FORM_NAMES:
        for split in ("train", "val"):
            write_split(root / form, form, samples(), split)
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "digits"
    prepare_digits(root, "folder")
    return root
