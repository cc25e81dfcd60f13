"""Who calls: the API key of a request, looked up before anything of its body is read.

A key comes as `Authorization: Bearer`, as `x-api-key`, or as the password of HTTP Basic.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from serve.api.dialects import GUARDED, below
from serve.api.errors import respond_to
from serve.callers import Caller, Scope
from serve.errors import Forbidden, TandemError, Unauthorized
from serve.keys import KeyStore

_CALLER = "tandem.caller"
_NO_KEY = "this server wants an API key: Authorization: Bearer <key>"

_bearer = HTTPBearer(auto_error=False, scheme_name="key", description="An API key, where the server wants one.")
_header = APIKeyHeader(name="x-api-key", auto_error=False, scheme_name="x-api-key", description="The same.")


class Doorkeeper:
    """Refuses whoever has no valid key with 401 before the body is read: who is not known holds none of the room for
    bodies. All dialects are guarded; what asks for `caller` elsewhere is too, when its route begins."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and below(scope, *GUARDED):
            try:
                await _identified(Request(scope))
            except TandemError as error:
                await respond_to(error, scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def caller(request: Request) -> Caller:
    """Whoever sends the request. Raises Unauthorized, BackendUnavailable."""
    return await _identified(request)


def _needs(*scopes: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """Any of them will do."""

    async def allowed(request: Request) -> Caller:
        found = await _identified(request)
        if found.scopes.isdisjoint(scopes):
            raise Forbidden(f"the API key lacks the scope {' or '.join(scopes)}")
        return found

    return allowed


Known = Annotated[Caller, Depends(caller)]
Generates = Annotated[Caller, Depends(_needs(Scope.GENERATE))]
Embeds = Annotated[Caller, Depends(_needs(Scope.EMBED))]
Uses = Annotated[Caller, Depends(_needs(Scope.GENERATE, Scope.EMBED))]
Administers = Annotated[Caller, Depends(_needs(Scope.ADMIN))]

KEYED = (Security(_bearer), Security(_header))
"""Tells the API's page how a key is sent, so that it can send one too."""


def token_of(request: Request) -> str | None:
    """The key that a request carries, None without one. Raises Unauthorized for a header that can't be read."""
    if own := request.headers.get("x-api-key"):
        return own
    kind, _, rest = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip() or None
    if kind.lower() == "basic":
        try:
            _, colon, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):  # UnicodeDecodeError is one
            raise Unauthorized("Authorization: Basic must be followed by user:key in base64") from None
        return password if colon and password else None
    return None


def tenant_of(request: Request) -> str:
    """What the authenticating proxy calls the caller, as 16 hex digits; "" where no tenant is named.

    A header that came twice counts as a tenant of its own, so that a client whose proxy appends instead of replacing
    can't pass for another.
    """
    header = request.app.state.salt_header
    name = ",".join(request.headers.getlist(header)) if header else ""
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest() if name else ""


async def _identified(request: Request) -> Caller:
    """The caller, found once for each request."""
    known: Caller | None = request.scope.get(_CALLER)
    if known is None:
        known = request.scope[_CALLER] = await _found(request)
    return known


async def _found(request: Request) -> Caller:
    keys: KeyStore | None = request.app.state.keys
    tenant = tenant_of(request)
    if keys is None:
        return Caller(owner=tenant, salt=tenant)
    token = token_of(request)
    if token is None:
        raise Unauthorized(_NO_KEY)
    key = await keys.find(token)
    salted = request.app.state.salted_keys
    return Caller(
        owner=key.id,
        scopes=frozenset(key.scopes),
        weight=key.weight,
        allowance=key.allowance,
        # The proxy's tenants stay apart behind one key too.
        salt=".".join(filter(None, (key.id if salted else "", tenant))),
    )
