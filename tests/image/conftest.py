"""What the tests of images share: the digits as class folders."""

import pytest

from common.data.digits import prepare_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(path, "folder")
    return path
