"""The commands run in the tests' process, where transformers is already imported: what a fresh one reads from the
environment is set directly.
"""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
