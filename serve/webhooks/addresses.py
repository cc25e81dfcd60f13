"""Which addresses the server calls: hosts that the operator has listed, on the public internet."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from serve.errors import InvalidRequest
from serve.settings.front import WebhookSettings

Address = IPv4Address | IPv6Address

_PORTS = {"https": 443, "http": 80}
_ENTRY = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>[0-9]{1,5})")
_LONGEST_URL = 2048
# A last label that is a number makes the name another spelling of an IPv4 address.
_NAME = re.compile(r"(?!(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_DOCUMENTATION = IPv6Network("3fff::/20")  # ipaddress counts it as global before Python 3.14


def check_webhook(url: str, settings: WebhookSettings) -> None:
    """InvalidRequest, naming `webhook`, unless this server would call `url`. Nothing is resolved here."""
    checked(url, settings)


def checked(url: str, settings: WebhookSettings) -> httpx.URL:
    """`check_webhook`, and what it has read: so the call goes where the check has looked, whatever the spelling."""
    if not settings.allowed_hosts:
        raise InvalidRequest("webhook: this server calls no webhooks (webhooks.allowed_hosts)", "webhook")
    if len(url) > _LONGEST_URL:
        raise _refusal(f"must be at most {_LONGEST_URL} characters long")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        raise _refusal("is not a URL") from None
    if parsed.scheme != "https" and not (parsed.scheme == "http" and settings.allow_private):
        raise _refusal("must be an https URL")
    if parsed.port is not None and not 1 <= parsed.port <= 65535:
        raise _refusal("names no port")
    if parsed.userinfo or parsed.fragment:
        raise _refusal("must have neither a user nor a fragment (#)")
    _check_place(host, parsed.port or _PORTS[parsed.scheme], _PORTS[parsed.scheme], settings)
    return parsed


def host_of(entry: str) -> str:
    """The host of an entry of `webhooks.allowed_hosts`, without a port or brackets."""
    return _entry(entry)[0].strip("[]")


def public(text: str) -> bool:
    """Whether an IP address is one host's on the public internet. Of an IPv6 address that stands for an IPv4 one, the
    latter counts: NAT64, 6to4 and mapped addresses lead there."""
    address: Address = ip_address(text)
    if isinstance(address, IPv6Address):
        embedded = _embedded(address)
        if embedded is None:
            return address in _UNICAST and address not in _DOCUMENTATION and address.is_global
        address = embedded
    return address.is_global and not address.is_multicast and not address.is_reserved


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _check_place(host: str, port: int, usual: int, settings: WebhookSettings) -> None:
    """Behind another port of a listed host there may be somebody else: only `host:port` on the list opens that."""
    if _literal(host) is None and not _NAME.fullmatch(host):
        raise _refusal("names no host")
    ports = {opened for allowed, opened in map(_entry, settings.allowed_hosts) if _matches(host, allowed)}
    if not ports:
        raise _refusal("names a host that this server does not call (webhooks.allowed_hosts)")
    if port not in {opened or usual for opened in ports}:
        raise _refusal("names a port of this host that this server does not call (webhooks.allowed_hosts)")
    if _literal(host) is not None and not settings.allow_private and not public(host):
        raise _refusal("names an address that is not public (webhooks.allow_private)")


def _entry(allowed: str) -> tuple[str, int | None]:
    """The host of the list, and the port where it names one. An IPv6 address with a port stands in brackets."""
    found = _ENTRY.fullmatch(allowed.lower())
    return (found["host"], int(found["port"])) if found else (allowed.lower(), None)


def _matches(host: str, allowed: str) -> bool:
    """An IP address is only what is listed, in whatever spelling; no `*` stands for a part of one."""
    literal = _literal(host)
    if literal is not None:
        return _literal(allowed.strip("[]")) == literal
    return host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]) and host != allowed[1:])


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _refusal(reason: str) -> InvalidRequest:
    return InvalidRequest(f"webhook {reason}", "webhook")
