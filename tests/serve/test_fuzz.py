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


@pytest.fixture(scope="module")
def document(url):
    config = schemathesis.Config.from_dict({"generation": {"database": "none"}})
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)


@schemathesis.pytest.from_fixture("document").parametrize()
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_whatever_comes_is_answered_as_the_document_says(case):
    case.call_and_validate(checks=CHECKS, timeout=60)
