"""Which addresses are called."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from serve.errors import InvalidRequest
from serve.settings.front import WebhookSettings
from serve.webhooks import check_webhook
from serve.webhooks.addresses import checked, public

HOSTS = (
    *("hooks.example.com", "Hooks.example.com:8443", "*.example.org", "192.0.2.7", "8.8.8.8", "[2606:4700::1111]"),
    *("[2606:4700::1111]:444", "*.8.8.8", "only.example.com:9443", "*.example.net:9000"),
)
SECRET = SecretStr("whsec_" + "A" * 32)
SETTINGS = WebhookSettings(allowed_hosts=HOSTS, secret=SECRET)
PRIVATE = WebhookSettings(
    allowed_hosts=(*HOSTS, "localhost", "localhost:9", "127.0.0.1", "::1"), secret=SECRET, allow_private=True
)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/jobs?secret=x",
        "https://HOOKS.example.com:8443",
        "https://hooks.example.com:443/",
        "https://only.example.com:9443/",
        "https://a.example.net:9000/",
        "https://a.example.org/",
        "https://b.a.example.org/",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]/",
        "https://[2606:4700:0:0:0:0:0:1111]:444/",
    ],
)
def test_listed_hosts_are_called(url: str) -> None:
    check_webhook(url, SETTINGS)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://hooks.example.com/", "https"),
        ("ftp://hooks.example.com/", "https"),
        ("hooks.example.com", "https"),
        ("//hooks.example.com/", "https"),
        ("", "https"),
        ("https:///path", "no host"),
        ("https:hooks.example.com", "no host"),
        ("https://hooks.example.com:65536/", "no port"),
        ("https://hooks.example.com:0/", "no port"),
        ("https://hooks.example.com:x/", "not a URL"),
        ("https://hooks.example.com\r\nx: y", "not a URL"),
        ("https://\ud800.com/", "not a URL"),
        ("https://hooks.example.com/\ud800", "not a URL"),
        ("https://me@hooks.example.com/", "user"),
        ("https://me:secret@hooks.example.com/", "user"),
        ("https://hooks.example.com/#there", "fragment"),
        ("https://hooks.example.com/" + "a" * 2048, "2048"),
        ("https://other.example.com/", "does not call"),
        ("https://hooks.example.com.evil.com/", "does not call"),
        ("https://evil.com\\.example.org/", "no host"),
        ("https://hooks.example.com\\@evil.com/", "user"),
        ("https://evil.com/?.example.org", "does not call"),
        ("https://example.org/", "does not call"),
        ("https://.example.org/", "no host"),
        ("https://a b.example.org/", "no host"),
        ("https://" + "a" * 64 + ".example.org/", "no host"),
        ("https://hooks.example.com./", "no host"),
        ("https://evilexample.org/", "does not call"),
        ("https://8.8.4.4/", "does not call"),
        ("https://9.8.8.8/", "does not call"),
        ("https://134744072/", "no host"),
        ("https://0x8.8.8.8/", "no host"),
        ("https://08.8.8.8/", "not a URL"),
        ("https://1.8.8/", "no host"),
        ("https://8.8.8.0x8/", "no host"),
        ("https://localhost/", "does not call"),
        ("https://hooks.example.com:22/", "names a port"),
        ("https://hooks.example.com:80/", "names a port"),
        ("https://a.example.org:8443/", "names a port"),
        ("https://8.8.8.8:8443/", "names a port"),
        ("https://[2606:4700::1111]:445/", "names a port"),
        ("https://only.example.com/", "names a port"),
        ("https://a.example.net/", "names a port"),
        ("https://other.example.com:9443/", "names a host"),
        ("https://[::ffff:8.8.8.8]/", "does not call"),
        ("https://192.0.2.7/", "not public"),
    ],
)
def test_every_other_url_is_refused(url: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        check_webhook(url, SETTINGS)
    assert refused.value.param == "webhook"


@pytest.mark.parametrize("url", ["http://localhost:9/", "http://127.0.0.1/", "https://[::1]/", "https://192.0.2.7/"])
def test_private_addresses_are_called_where_that_is_set(url: str) -> None:
    check_webhook(url, PRIVATE)


@pytest.mark.parametrize("url", ["http://127.0.0.1:443/", "https://127.0.0.1:80/", "http://[::1]:6379/"])
def test_no_other_service_of_this_machine_is_called(url: str) -> None:
    with pytest.raises(InvalidRequest, match="names a port"):
        check_webhook(url, PRIVATE)


def test_a_server_without_allowed_hosts_calls_none() -> None:
    with pytest.raises(InvalidRequest, match=r"calls no webhooks \(webhooks.allowed_hosts\)"):
        check_webhook("https://hooks.example.com/", WebhookSettings(allow_private=True))


@given(
    st.text()
    | st.builds(
        "https://{}{}".format,
        st.text("ab.@:/\\[]#?%0127xé\u3002-", max_size=20),
        st.sampled_from(["", ".example.org", "@hooks.example.com", "hooks.example.com/"]),
    )
)
@example("https://xn--a/")
@example("https://[::1%25eth0]/")
def test_whatever_is_sent_is_read_or_refused(url: str) -> None:
    """And nothing but what it was read as is called: the call uses the same reading."""
    with contextlib.suppress(InvalidRequest):
        host = checked(url, SETTINGS).raw_host.decode()
        assert host in ("hooks.example.com", "8.8.8.8", "2606:4700::1111") or host.endswith(".example.org")


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses(address: str) -> None:
    assert public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "192.0.2.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:a00:1::5",
        "2001::1",
        "2001:db8::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "100::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)
