"""The Python client of Tandem's native API: `Client`, which blocks, and `AsyncClient`. docs/client.md shows them.

    from serve.client import Client

    with Client("http://127.0.0.1:8000") as tandem:
        tandem.generate("a red circle", seed=7)[0].save("circle.png")

It needs httpx and pydantic, and nothing of the server's but its messages and errors.
"""

from serve.client.answers import ImageInfo, Job, Picture, Pool, Preview, Progress
from serve.client.calls import bearer
from serve.client.clients import AsyncClient, Client
from serve.client.errors import JobFailed, Lost, NoServer, NotTandem
from serve.client.orders import (
    AnalysisOptions,
    CaptionOptions,
    EmbeddingOptions,
    Entry,
    Options,
    Order,
    PictureSource,
    Piece,
    Prompt,
)
from serve.client.server import Limits, Model, Placement, Quote
from serve.client.texts import Analysis, Caption, Compared, Encoded
from serve.domain.jobs import JobState

__all__ = [
    "Analysis",
    "AnalysisOptions",
    "AsyncClient",
    "Caption",
    "CaptionOptions",
    "Client",
    "Compared",
    "EmbeddingOptions",
    "Encoded",
    "Entry",
    "ImageInfo",
    "Job",
    "JobFailed",
    "JobState",
    "Limits",
    "Lost",
    "Model",
    "NoServer",
    "NotTandem",
    "Options",
    "Order",
    "Picture",
    "PictureSource",
    "Piece",
    "Placement",
    "Pool",
    "Preview",
    "Progress",
    "Prompt",
    "Quote",
    "bearer",
]
