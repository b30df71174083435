"""schemathesis reads /openapi.json and sends what it says may be sent, and what it says may not: never a 5xx."""

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = {
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/models": "get",
    "/v1/models/{name}": "get",
    "/healthz": "get",
    "/metrics": "get",
}


@pytest.fixture(scope="module")
def document(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_of_the_document_is_tried(document):
    operations = {result.ok().path: result.ok().method.lower() for result in document.get_all_operations()}
    assert operations == OPERATIONS


POSITIVE, NEGATIVE = schemathesis.GenerationMode


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, POSITIVE) for path in OPERATIONS]
    + [(path, NEGATIVE) for path, method in OPERATIONS.items() if method == "post"],
)
def test_whatever_comes_is_answered_as_the_document_says(document, path, mode):
    operation, statuses = document[path][OPERATIONS[path]], set()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=40 if OPERATIONS[path] == "post" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def send(case):
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    send()
    assert (200 in statuses) == (mode is POSITIVE), statuses
