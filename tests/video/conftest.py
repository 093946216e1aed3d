import pytest

from common.data.video.digits import prepare_moving_digits
from tests.video.runs import train


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """24 training and 12 validation videos of the moving digits."""
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_moving_digits(path, {"train": 2, "val": 1})
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory, digits):
    """A run that nothing ever disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    train(folder, digits)
    return folder
