"""What a fresh interpreter really imports; `make check` reads the source for who may import whom."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "scipy", "matplotlib"}


def imported_by(statement: str) -> set[str]:
    """Names in sys.modules after `statement` in a new interpreter."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tulle",
        "import tulle.native",
        "import tulle.format.spec, tulle.format.pack",
        "import tulle.engine, tulle.engine.bench",
        "import tulle.serve.server, tulle.cli.serve",
    ],
)  # fmt: skip
def test_deployment_rooms_stay_free_of_torch(statement: str) -> None:
    modules = imported_by(statement)
    assert "tulle" in modules
    assert not modules & HEAVY


def test_compress_and_load_are_functions() -> None:
    modules = imported_by(
        "import tulle; assert callable(tulle.compress)\n"
        "import tulle.compression.job; assert callable(tulle.compress) and callable(tulle.load)"
    )
    # Also the counterpart of the test above: an import of torch is seen where there is one.
    assert HEAVY <= modules


def test_unknown_attribute() -> None:
    import tulle

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tulle.nothing
