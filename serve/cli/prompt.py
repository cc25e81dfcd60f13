"""What `tandem prompt` does: say what a prompt comes to, or how near several are to one another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.cli.client import Client
from serve.cli.prompt_screen import shown_analysis, shown_similarity
from serve.errors import OperatorError

MOST_COMPARED = 16


async def prompt(client: Client, prompts: Sequence[str], order: Mapping[str, Any], *, as_json: bool) -> int:
    """`order` has the other fields of `POST /v1/prompts/analyze`; several prompts are compared, and then there are none
    but a model."""
    if len(prompts) > 1:
        return await _compare(client, prompts, order, as_json=as_json)
    async with client:
        found = await client.post("/v1/prompts/analyze", {**order, "prompt": prompts[0] if prompts else None})
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        shown_analysis(found)
    return 0


async def _compare(client: Client, prompts: Sequence[str], order: Mapping[str, Any], *, as_json: bool) -> int:
    if len(prompts) > MOST_COMPARED:
        raise OperatorError(f"prompt: at most {MOST_COMPARED} are compared", "prompt")
    if others := [name for name, value in order.items() if value is not None and name != "model"]:
        raise OperatorError(f"prompt: several prompts are compared as plain text, without {others[0]}", others[0])
    async with client:
        found = await client.post("/v1/prompts/similarity", {"prompts": list(prompts), "model": order.get("model")})
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        shown_similarity(found, prompts)
    return 0
