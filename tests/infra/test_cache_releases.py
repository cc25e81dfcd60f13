"""Two releases at one cache Redis: another version of the libraries is another key, and nothing mixes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import redis
from support.cache_node import UNIT, Node, stored

from serve.domain.text import Tier
from serve.encoders.libraries import computed_by, digest_of
from serve.encoders.redis_tier import ALL

ROOT = Path(__file__).parents[2]
WRITE = """
import asyncio, sys
from support.cache_node import Node
node = Node(sys.argv[1], b"of another release")
got = asyncio.run(node.get())
print(got.tier)
"""


def another_release(url: str, folder: Path) -> str:
    """Have a process that finds another version of transformers installed ask for the unit; the tier that it had it
    from."""
    found = folder / "transformers-99.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 99.0\n")
    path = os.pathsep.join(map(str, (folder, ROOT / "tests", ROOT)))
    told = subprocess.run(
        [sys.executable, "-c", WRITE, url],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return told.stdout.strip()


def test_releases_with_other_libraries_share_a_redis_and_no_value(redis_url: str, tmp_path: Path) -> None:
    assert another_release(redis_url, tmp_path) == "encoded"
    assert stored(redis_url) is None

    async def mine() -> None:
        for tier in (Tier.ENCODED, Tier.REDIS):
            node = Node(redis_url, b"of this one")
            got = await node.get()
            assert (got.tier, got.value) == (tier, UNIT.key.encode() + b"of this one")
            await node.cache.close()

    asyncio.run(mine())
    with redis.Redis.from_url(redis_url) as client:
        assert len(list(client.scan_iter(f"{ALL}*"))) == 2


def test_the_build_of_a_library_does_not_count_and_its_version_does() -> None:
    installed = {"torch": "2.9.1", "transformers": "4.57.0", "bitsandbytes": ""}
    same, other = installed | {"torch": "2.9.1+cu128"}, installed | {"torch": "2.10.0"}
    of = {name: digest_of(each.__getitem__) for name, each in (("a", installed), ("b", same), ("c", other))}
    assert of["a"] == of["b"] != of["c"]
    assert len(computed_by()) == 8
