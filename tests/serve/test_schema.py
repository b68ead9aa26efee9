"""Whatever the OpenAPI document allows or forbids: no request is the server's fault."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import hypothesis.errors
import pytest
import schemathesis
from live_server import LiveServer, demo_folder
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

EXAMPLES = int(os.environ.get("TULLE_EXAMPLES", "3"))
"""Requests per operation and mode."""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(demo_folder(tmp_path_factory.mktemp("schema") / "demo"), timeout=0.5, context=96)
    yield server
    server.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_server_error(tried: LiveServer, mode: GenerationMode) -> None:
    """Answers have the shape that the document says."""
    document = schemathesis.openapi.from_url(f"{tried.origin}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 14
    tries: Counter[str] = Counter()
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=EXAMPLES,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def one(case: schemathesis.Case) -> None:
            response = case.call(timeout=30)
            tries[f"{case.method} {case.path}"] += 1
            # A full queue and a timeout that is over are no faults.
            faults = [] if response.status_code in (503, 504) else [not_a_server_error]
            case.validate_response(response, checks=[*faults, response_schema_conformance])

        try:
            one()
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a route without parameters has nothing to get wrong
    assert tries["POST /v1/chat/completions"] == EXAMPLES
