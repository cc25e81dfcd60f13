"""The text of a bench's orders, encoded once before anything is measured: diffusion alone is compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serve.domain.conditioning import Schedule
from serve.domain.orders import ImageRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.models import ModelFolder
from serve.prompts.plan import Planner
from serve.settings.tree import Settings


def encode_orders(model: ModelFolder, orders: Iterable[ImageRequest], data_dir: Path) -> dict[ImageRequest, Schedule]:
    """The text of each order's steps. The encoders are loaded for this and let go of."""
    registry = register([model], Settings(data_dir=data_dir))
    planner = Planner(model, registry.sources(model.name))
    plans = {order: planner.plan(order.text) for order in orders}
    units = {unit.key: unit for plan in plans.values() for unit in plan.units}.values()
    embeddings = {}
    for encoder in registry.encoders:
        tower = TextTower.load(encoder, "cpu")
        for unit in units:
            if unit.encoder == encoder.fingerprint:
                embeddings[unit.key] = pack(tower.encode([Row.of(unit, tower.outputs)])[0][unit.output])
    return {order: compose(plan, embeddings) for order, plan in plans.items()}
