"""Settings of every test: the same examples each run, and no network."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Machines differ in speed, so an example has no deadline; derandomised, a failure is the same everywhere.
hypothesis.settings.register_profile("tulle", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tulle")


@pytest.fixture(scope="module")
def no_pages() -> Iterator[None]:
    """Compressing without ``report.html``, which takes longer than compressing a model this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tulle.compression.job.write_report", lambda report, file: file.write_text("page"))
        yield
