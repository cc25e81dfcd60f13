"""Names that clients make up: in paths, in headers, in prompts. None leads anywhere that it should not."""

import pytest
from support.dialects import A1111, DIALECTS, IMAGEN, LONGEST, NATIVE, Dialect
from support.speaking import Speaking

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/{}",
        "/v1/jobs/{}/events",
        "/v1/images/{}/0",
        "/v1/images/0123456789abcdef0123456789abcdef/{}",
        "/status/{}",
        "/outputs/{}",
        "/v1/models/{}",
    ],
)
@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "%00", "%0d%0aSet-Cookie:a=b", "x" * 5000, "%ff", "0" * 32, "é" * 16 + "0" * 16]
)
def test_a_name_of_nothing_is_not_found(path: str, name: str, speaking: Speaking) -> None:
    answer = speaking.send("GET", path.format(name))
    assert answer.status_code == 404, answer.text
    assert len(answer.content) < LONGEST
    message, _ = (IMAGEN if path.startswith(("/status", "/outputs")) else NATIVE).told(answer)
    assert message.isprintable()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_text_of_a_client_s_reaches_no_header_no_file_and_no_line_of_the_log(
    dialect: Dialect, speaking: Speaking, caplog: pytest.LogCaptureFixture
) -> None:
    path, body = dialect.order(prompt="a\r\nSet-Cookie: stolen=1 ../../x")
    with caplog.at_level("DEBUG", logger="serve"):
        answer = speaking.send("POST", path, content=body, headers=JSON | {"x-request-id": "a b\tc"})
    assert "stolen" not in caplog.text
    assert answer.is_success, answer.text
    assert "stolen" not in str(answer.headers)
    assert answer.headers["x-request-id"] != "a b\tc"
    files = [str(each) for each in speaking.folder.rglob("*")]
    assert files
    assert not any("Cookie" in each or ".." in each for each in files)


def test_an_answer_of_an_unknown_route_has_its_dialect_s_shape(speaking: Speaking) -> None:
    roots = (("/v1", NATIVE), ("/sdapi/v1", A1111), ("/internal", A1111), ("/generate", IMAGEN), ("/status", IMAGEN))
    for root, dialect in roots:
        answer = speaking.send("GET", f"{root}/no/such/thing")
        assert answer.status_code == 404
        dialect.told(answer)
    method = speaking.send("PATCH", "/generate")
    assert method.status_code == 405
    IMAGEN.told(method)
