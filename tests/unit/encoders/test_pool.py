"""One pool over the real text encoders of an SDXL and an SD 3 that share their CLIP-L."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from support.text_models import sd3_folder, sdxl_folder

from deployments.doors import Order
from serve.domain.text import EncodeUnit, TextRequest, Tier
from serve.encoders.codec import unpack
from serve.encoders.forward import Row, TextTower
from serve.encoders.pool import Ask, EncoderPool
from serve.encoders.registry import Encoder, Registry, register
from serve.errors import BackendUnavailable, DeviceLost, GenerationFailed, OutOfMemory
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.settings.pools import EncoderSettings, ModelSettings
from serve.settings.stores import CacheSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

FORWARDS, ROWS, DROPPED = (
    "tandem_encoder_forwards_total",
    "tandem_encoder_forward_rows_total",
    "tandem_encoder_dropped_rows_total",
)
Text = Callable[..., list[EncodeUnit]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, ModelFolder], Registry]:
    home = tmp_path_factory.mktemp("models")
    folders = (sdxl_folder(home / "sdxl"), sd3_folder(home / "sd3"))
    models = [resolve(ModelSettings(source=str(folder)), home, text_only=True) for folder in folders]
    return {model.name: model for model in models}, register(models, Settings(data_dir=home))


@pytest.fixture(scope="module")
def encoder(served: tuple[dict[str, ModelFolder], Registry]) -> Encoder:
    """The CLIP-L of both."""
    return next(each for each in served[1].encoders if each.models == ("sdxl", "sd3") and each.part.row_tokens == 77)


@pytest.fixture(scope="module")
def tower(encoder: Encoder) -> TextTower:
    """Its counters only ever grow: compare differences."""
    return TextTower.load(encoder, "cpu")


@pytest.fixture(scope="module")
def text(served: tuple[dict[str, ModelFolder], Registry], encoder: Encoder) -> Text:
    """The units of `encoder` that a model asks for."""
    models, registry = served
    planners = {name: Planner(model, registry.sources(name)) for name, model in models.items()}

    def units(prompt: str, negative: str | None = None, model: str = "sdxl", **options: object) -> list[EncodeUnit]:
        request = TextRequest(model=model, prompt=prompt, negative_prompt=negative, width=1024, height=1024, **options)
        return [unit for unit in planners[model].plan(request).units if unit.encoder == encoder.fingerprint]

    return units


class Gate:
    """A tower that runs only when it is let: what is under way stays so."""

    def __init__(self, tower: TextTower) -> None:
        self._tower = tower
        self.started = threading.Semaphore(0)
        self.let = threading.Semaphore(0)
        self.batches: list[list[Row]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._tower, name)

    def encode(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        self.batches.append(list(rows))
        self.started.release()
        assert self.let.acquire(timeout=10)
        return self._tower.encode(rows)


class Faulty:
    """A tower on a device that has its limits: `fault` is asked before each forward."""

    def __init__(self, tower: TextTower, fault: Callable[[Sequence[Row]], Exception | None]) -> None:
        self._tower = tower
        self._fault = fault
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._tower, name)

    def encode(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        self.batches.append(len(rows))
        if error := self._fault(rows):
            raise error
        return self._tower.encode(rows)


class Spoilt:
    """A tower that gives no numbers for one row, in some of its outputs."""

    def __init__(self, tower: TextTower, row: tuple[int, ...], outputs: Sequence[str], value: float) -> None:
        self._tower = tower
        self._row = row
        self._outputs = outputs
        self._value = value

    def __getattr__(self, name: str) -> object:
        return getattr(self._tower, name)

    def encode(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        encoded = self._tower.encode(rows)
        for row, outputs in zip(rows, encoded, strict=True):
            for name in self._outputs if row.token_ids == self._row else ():
                outputs[name] = outputs[name].clone()
                outputs[name].view(-1)[-1] = self._value
        return encoded


async def until_started(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.started.acquire, timeout=10)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def make(
    tower: TextTower, encoder: Encoder, cache: CacheSettings = CacheSettings(), **options: object
) -> tuple[EncoderPool, InProcessMetrics]:
    metrics = InProcessMetrics()
    own = replace(encoder, settings=EncoderSettings(**options))
    return EncoderPool(tower, own, Settings(cache=cache), metrics), metrics


def test_both_sides_share_one_forward_and_other_weights_need_none(
    tower: TextTower, encoder: Encoder, text: Text
) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        first = await pool.encode(text("a (red:1.5) circle", "blurry"))
        assert [got.tier for got in first] == [Tier.ENCODED] * 2
        assert (metrics.value(FORWARDS, encoder=encoder.name), metrics.value(ROWS, encoder=encoder.name)) == (1, 2)
        again = await pool.encode(text("a [red] (circle:0.3)", "(blurry:1.2)"))
        assert [got.tier for got in again] == [Tier.MEMORY] * 2
        assert [got.value for got in again] == [got.value for got in first]
        assert metrics.value(FORWARDS) == 1
        assert metrics.value("tandem_encode_seconds", encoder=encoder.name) == 2
        await pool.close()

    asyncio.run(main())


def test_what_one_model_had_encoded_is_there_for_the_other(tower: TextTower, encoder: Encoder, text: Text) -> None:
    """SDXL reads the penultimate layer, SD 3 that and its own projected vector: one forward."""

    async def main() -> None:
        pool, metrics = make(tower, encoder)
        (sdxl,) = await pool.encode(text("a red circle", model="sdxl"))
        units = text("a red circle", model="sd3")
        sd3 = await pool.encode(units)
        assert [unit.output.partition(":")[0] for unit in units] == ["skip", "projected"]
        assert [got.tier for got in sd3] == [Tier.MEMORY] * 2
        assert sd3[0].value == sdxl.value
        (exact,) = tower.encode([Row(units[0].token_ids)])
        for unit, got in zip(units, sd3, strict=True):
            torch.testing.assert_close(unpack(got.value), exact[unit.output], atol=1e-5, rtol=0)
        assert metrics.value(ROWS) == 1
        await pool.close()

    asyncio.run(main())


def test_a_hundred_simultaneous_misses_are_one_forward(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        units = text("a red circle", "blurry")
        results = await asyncio.gather(*(pool.encode(units) for _ in range(100)))
        assert metrics.value(FORWARDS) == 1
        assert metrics.value("tandem_encoder_batch_rows") == 1
        assert metrics.value(ROWS) == 2
        assert all(result == results[0] for result in results)
        await pool.close()

    asyncio.run(main())


def test_a_hundred_different_prompts_are_few_forwards(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder, max_batch_size=32)
        rows = [text(f"{number // 10} red circles and {number % 10} stars") for number in range(100)]
        results = await asyncio.gather(*map(pool.encode, rows))
        assert metrics.value(ROWS) == 100
        assert metrics.value(FORWARDS) <= 6
        for (unit,), (got,) in zip(rows[:10], results, strict=False):
            (alone,) = tower.encode([Row(unit.token_ids)])
            torch.testing.assert_close(unpack(got.value), alone[unit.output], atol=1e-5, rtol=0)
        assert metrics.value("tandem_encoder_queue_tokens", encoder=encoder.name) == 0
        await pool.close()

    asyncio.run(main())


def test_the_token_cap_bounds_a_batch(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        gate = Gate(tower)
        gate.let.release(100)
        pool, _ = make(gate, encoder, max_batch_size=32, max_batch_tokens=4 * 77 + 1)
        await asyncio.gather(*(pool.encode(text(f"{number} circles")) for number in range(10)))
        assert max(map(len, gate.batches)) == 4
        await pool.close()

    asyncio.run(main())


def test_a_layer_that_no_model_reads_by_default_comes_with_the_standing_ones(
    tower: TextTower, encoder: Encoder, text: Text
) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        units = text("a red circle", clip_skip=1)
        assert {unit.output for unit in units} == {"skip:2"}
        (got,) = await pool.encode(units)
        (exact,) = tower.encode([Row(units[0].token_ids, "skip:2")])
        torch.testing.assert_close(unpack(got.value), exact["skip:2"], atol=1e-5, rtol=0)
        assert [each.tier for each in await pool.encode(text("a red circle", model="sd3"))] == [Tier.MEMORY] * 2
        assert metrics.value(FORWARDS) == 1
        await pool.close()

    asyncio.run(main())


def test_tenants_share_neither_entries_nor_forwards_under_way(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        gate = Gate(tower)
        pool, _ = make(gate, encoder)
        one = asyncio.create_task(pool.encode(text("a red circle", salt="one")))
        await until_started(gate)
        two = asyncio.create_task(pool.encode(text("a red circle", salt="two")))
        await settle()
        gate.let.release(10)
        (first,), (second,) = await one, await two
        assert (first.tier, second.tier) == (Tier.ENCODED, Tier.ENCODED)
        assert len(gate.batches) == 2
        third = await pool.encode(text("a red circle", model="sd3", salt="one"))
        assert [got.tier for got in third] == [Tier.MEMORY] * 2
        (fourth,) = await pool.encode(text("a red circle"))
        assert fourth.tier is Tier.ENCODED
        await pool.close()

    asyncio.run(main())


def test_rows_of_cancelled_callers_are_dropped_before_the_forward(
    tower: TextTower, encoder: Encoder, text: Text
) -> None:
    async def main() -> None:
        gate = Gate(tower)
        pool, metrics = make(gate, encoder)
        first = asyncio.create_task(pool.encode(text("a red circle")))
        await until_started(gate)
        leavers = [asyncio.create_task(pool.encode(text(f"{number} circles", "dull"))) for number in range(50)]
        stayer = asyncio.create_task(pool.encode(text("7 circles")))
        await settle()
        assert pool.load.queued_tokens == 77 * 52, "50 prompts, one negative prompt, and what runs"
        for leaver in leavers:
            leaver.cancel()
        await asyncio.gather(*leavers, return_exceptions=True)
        gate.let.release(10)
        await asyncio.gather(first, stayer)
        assert [len(batch) for batch in gate.batches] == [1, 1]
        assert metrics.value(DROPPED, encoder=encoder.name) == 50
        assert pool.load.queued_tokens == 0
        await pool.close()

    asyncio.run(main())


def test_what_was_computed_for_nobody_is_kept(tower: TextTower, encoder: Encoder, text: Text) -> None:
    """Else a forward that takes longer than its callers' patience would be paid for again and again."""

    async def main() -> None:
        gate = Gate(tower)
        pool, metrics = make(gate, encoder)
        leaver = asyncio.create_task(pool.encode(text("a red circle")))
        await until_started(gate)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        gate.let.release(10)
        # The next forward runs after it, in the same thread.
        await pool.encode(text("a blue circle"))
        (again,) = await pool.encode(text("a red circle"))
        assert again.tier is Tier.MEMORY
        assert metrics.value(FORWARDS) == 2
        leaver = asyncio.create_task(pool.encode(text("a green circle")))
        await asyncio.to_thread(gate.started.acquire)  # of the blue one
        await until_started(gate)
        leaver.cancel()
        while pool.load.queued_tokens:  # noqa: ASYNC110  the forward ends in a thread
            await asyncio.sleep(0)
        await settle()
        assert metrics.value("tandem_encoder_queue_tokens", encoder=encoder.name) == 0
        await pool.close()

    asyncio.run(main())


def test_units_of_another_encoder_or_projection_are_not_encoded_by_this_one(
    tower: TextTower, encoder: Encoder, text: Text
) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        (unit,) = text("a red circle")
        for foreign in (replace(unit, encoder="another"), replace(unit, output="projected:00000000")):
            with pytest.raises(BackendUnavailable) as raised:
                await pool.encode([foreign])
            assert raised.value.retry_after_s == 1.0
        assert metrics.value(FORWARDS) == 0
        assert len(await pool.encode([unit])) == 1
        await pool.close()

    asyncio.run(main())


def test_a_row_that_fails_fails_alone(tower: TextTower, encoder: Encoder, text: Text) -> None:
    """A token id beyond the vocabulary, as a client with another tokenizer would send it."""

    async def main() -> None:
        pool, _ = make(tower, encoder)
        (good,) = text("a red circle")
        bad = replace(good, token_ids=(10**6,) * 77)
        results = await asyncio.gather(pool.encode([good]), pool.encode([bad]), return_exceptions=True)
        assert isinstance(results[1], Exception)
        assert results[0][0].tier is Tier.ENCODED
        assert len(await pool.encode(text("a blue circle"))) == 1
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_fails_its_own_row_and_is_kept_nowhere(
    tower: TextTower, encoder: Encoder, text: Text, value: float, values: str
) -> None:
    async def main() -> None:
        (bad,), (good,) = text("a black circle"), text("a red circle")
        pool, metrics = make(
            Spoilt(tower, bad.token_ids, tower.outputs, value), encoder, CacheSettings(values=values), dtype="float16"
        )
        for _ in range(2):
            results = await asyncio.gather(pool.encode([bad]), pool.encode([good]), return_exceptions=True)
            assert isinstance(results[0], GenerationFailed)
            assert str(results[0]).startswith(f"text encoder {encoder.name} gave values that are no numbers; encoder.")
            (got,) = results[1]
            assert unpack(got.value).isfinite().all()
        assert metrics.value(FORWARDS) == 2, "the batch was not tried again, and the failure was not kept"
        assert pool.cache.stats().entries == len(tower.outputs)
        await pool.close()

    asyncio.run(main())


def test_an_output_that_is_no_number_spoils_no_other(tower: TextTower, encoder: Encoder, text: Text) -> None:
    """A late layer may overflow where the one that a model reads did not."""

    async def main() -> None:
        units = text("a red circle", model="sd3")
        projected = next(unit for unit in units if unit.output.startswith("projected:"))
        pool, _ = make(Spoilt(tower, units[0].token_ids, [projected.output], float("nan")), encoder)
        (got,) = await pool.encode(text("a red circle", model="sdxl"))
        assert got.tier is Tier.ENCODED
        with pytest.raises(GenerationFailed):
            await pool.encode([projected])
        await pool.close()

    asyncio.run(main())


def test_a_batch_too_large_for_the_device_runs_in_parts(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        def fault(rows: Sequence[Row]) -> Exception | None:
            return torch.OutOfMemoryError("CUDA out of memory") if len(rows) > most else None

        most = 2
        machine = Faulty(tower, fault)
        pool, _ = make(machine, encoder)
        results = await pool.encode([unit for number in range(5) for unit in text(f"{number} circles")])
        assert [got.tier for got in results] == [Tier.ENCODED] * 5
        assert machine.batches == [5, 2, 3, 1, 2]
        most = 0
        with pytest.raises(OutOfMemory, match="the device ran out of memory") as raised:
            await pool.encode(text("a red circle"))
        assert "CUDA" not in raised.value.message
        assert not pool.lost
        await pool.close()

    asyncio.run(main())


def test_nothing_is_tried_on_a_device_that_is_lost(tower: TextTower, encoder: Encoder, text: Text) -> None:
    """A CUDA error sticks to the process: whatever it does next fails as well."""

    async def main() -> None:
        machine = Faulty(tower, lambda rows: torch.AcceleratorError("an illegal memory access"))
        pool, _ = make(machine, encoder)
        texts = [text(f"{number} circles") for number in range(4)]
        results = await asyncio.gather(*map(pool.encode, texts), return_exceptions=True)
        assert [type(result) for result in results] == [DeviceLost] * 4
        assert pool.lost
        with pytest.raises(DeviceLost):
            await pool.encode(text("a red circle"))
        order = Order(lambda: pool.encode(text("a red circle")), "a text encoder")
        order.start()
        with pytest.raises(BackendUnavailable, match="being replaced") as refused:
            await order.answer()
        assert refused.value.retry_after_s, "the text is not to blame"
        assert machine.batches == [4]
        assert (pool.busy_s, pool.load.queued_tokens) == (0.0, 0)
        await pool.close()

    asyncio.run(main())


def test_what_torch_says_stays_in_the_log(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        pool, _ = make(Faulty(tower, lambda rows: RuntimeError("cuBLAS at 0x7f")), encoder)
        with pytest.raises(GenerationFailed, match=f"text encoder {encoder.name} failed on this request"):
            await pool.encode(text("a red circle"))
        await pool.close()

    asyncio.run(main())


def test_plain_encode_batch(tower: TextTower, encoder: Encoder, text: Text) -> None:
    pool, _ = make(tower, encoder)
    asks = [Ask(Row(text(prompt)[0].token_ids), "") for prompt in ("one", "two", "one")]
    encoded = pool.encode_batch(asks)
    assert encoded[0].values == encoded[2].values
    assert encoded[0].values.keys() == set(encoder.outputs)
    assert encoded[0].forward.rows == 2


def test_int8_values_tell_how_close_they_are(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        exact, _ = make(tower, encoder)
        small, metrics = make(tower, encoder, CacheSettings(values="int8"))
        (one,), (other,) = await exact.encode(text("a red circle")), await small.encode(text("a red circle"))
        assert len(other.value) < len(one.value)
        assert metrics.value("tandem_embedding_similarity", encoder=encoder.name) == len(encoder.outputs)
        cosine = torch.cosine_similarity(unpack(one.value).flatten(), unpack(other.value).flatten(), dim=0)
        assert cosine > 0.999
        await exact.close()
        await small.close()

    asyncio.run(main())


def test_a_slow_request_is_logged_without_its_text(
    tower: TextTower, encoder: Encoder, text: Text, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        pool, _ = make(tower, encoder, slow_s=1e-6)
        with caplog.at_level(logging.WARNING, "serve.encoders.pool"):
            await pool.encode(text("a red circle", "secret"))
        await pool.close()

    asyncio.run(main())
    (record,) = caplog.records
    told = {key: record.__dict__[key] for key in ("encoder", "rows", "tokens", "batch_rows")}
    assert told == {"encoder": encoder.name, "rows": 2, "tokens": 154, "batch_rows": 2}
    assert 0 <= float(record.__dict__["wait_s"]) <= float(record.__dict__["took_s"])
    assert float(record.__dict__["forward_s"]) <= float(record.__dict__["took_s"])
    assert "secret" not in str(record.__dict__)
    assert str(text("secret")[0].token_ids[1]) not in str({**told, "message": record.getMessage()})


def test_it_tells_its_load(tower: TextTower, encoder: Encoder, text: Text) -> None:
    async def main() -> None:
        gate = Gate(tower)
        pool, _ = make(gate, encoder)
        assert (pool.load.queued_tokens, pool.load.forward_s, pool.load.requests, pool.busy_s) == (0, 0.0, 0, 0.0)
        task = asyncio.create_task(pool.encode(text("a red circle", "blurry")))
        await until_started(gate)
        assert pool.load.queued_tokens == 154
        assert pool.busy_s > 0
        assert pool.load.forward_s > 0, "a forward under way counts"
        gate.let.release()
        await task
        assert (pool.load.queued_tokens, pool.load.requests, pool.busy_s) == (0, 1, 0.0)
        assert pool.load.forward_s > 0
        await pool.close()

    asyncio.run(main())
