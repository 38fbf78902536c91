"""The service keeps to its own description, whatever is sent (schemathesis against a server)."""

from __future__ import annotations

import warnings
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="a tool of development (pip: dev)")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from tests.support.serving_world import World  # noqa: E402

schemathesis.serializer.alias("application/vnd.cenacle.sealed-query", "application/octet-stream")

MODEL = "/v2/models/{name}"
OPERATIONS = [
    ("GET", "/v2"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", MODEL),
    ("GET", f"{MODEL}/ready"),
    ("GET", f"{MODEL}/versions/{{version}}"),
    ("GET", f"{MODEL}/versions/{{version}}/ready"),
    ("POST", f"{MODEL}/infer"),
    ("POST", f"{MODEL}/versions/{{version}}/infer"),
    ("POST", "/v1/sealed/{name}"),
    ("POST", "/v1/attestation"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]


@pytest.fixture(scope="module")
def description(world: World) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return schemathesis.openapi.from_url(f"{world.url}/openapi.json")


def test_every_address_is_described_and_tested(world: World) -> None:
    paths = httpx.get(f"{world.url}/openapi.json").json()["paths"]
    listed = {
        (method.upper(), path)
        for path, found in paths.items()
        for method in found
        if method != "parameters"
    }
    assert listed == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_description_is_true(
    description: Any, world: World, method: str, path: str, mode: str
) -> None:
    operation = description[path][method]
    if mode == "negative" and method == "GET" and "{" not in path:
        pytest.skip("nothing is sent that could be wrong")
    # JSON Schema cannot say that the data has as many elements as the shape promises.
    unsaid = [positive_data_acceptance] if path.endswith("/infer") else []

    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def exchange(case: Any) -> None:
        case.call_and_validate(excluded_checks=unsaid)

    exchange()
    assert httpx.get(f"{world.url}/v2/health/ready").status_code == 200
