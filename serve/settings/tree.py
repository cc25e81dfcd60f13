"""The whole tree, frozen, and what holds between its groups."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve.callers import API_KEY
from serve.settings.front import HttpSettings, KeySettings, WebhookSettings
from serve.settings.orders import ConceptSettings, LimitSettings, PromptSettings
from serve.settings.pools import CaptionSettings, DiffusionSettings, EncoderSettings, GpuClassSettings, ModelSettings
from serve.settings.stores import CacheSettings, JobSettings, ResultSettings
from serve.settings.telemetry import HEADERS_FORM, LogSettings, MetricsSettings, TracingSettings, header_pairs

ENV_PREFIX = "TANDEM_"
ENV_DELIMITER = "__"
_PLACEMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPLATE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TEMPLATE_FORM = "the name of a template or an arm has up to 64 letters, digits, '_' and '-' alone"
_FIRST_KEY_FORM = "tdm_ and 12 of a-z2-7, _ and 43 of A-Za-z0-9_-"
_WEBHOOK_KEY_BYTES = range(24, 65)
_WEBHOOK_SECRET_FORM = "whsec_ and 24 to 64 bytes in base64 (`echo whsec_$(openssl rand -base64 32)`)"


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path(".tandem")
    """Folder for everything that the local server keeps: images, Redis files, logs."""
    http: HttpSettings = HttpSettings()
    model: ModelSettings = ModelSettings()
    models: tuple[ModelSettings, ...] = ()
    """Further models that images are drawn with; a list of groups like `model`."""
    text_models: tuple[ModelSettings, ...] = ()
    """Further models whose text is encoded here, for diffusion that runs elsewhere; a list of groups like `model`."""
    limits: LimitSettings = LimitSettings()
    prompts: PromptSettings = PromptSettings()
    jobs: JobSettings = JobSettings()
    keys: KeySettings = KeySettings()
    webhooks: WebhookSettings = WebhookSettings()
    cache: CacheSettings = CacheSettings()
    encoder: EncoderSettings = EncoderSettings()
    encoders: dict[str, dict[str, Any]] = {}
    """What differs from `encoder` for one of the encoders, by its name: `{t5-xxl: {num_gpus: 1, min_replicas: 0}}`."""
    gpu_classes: dict[str, GpuClassSettings] = {}
    """Kinds of GPU, by name: `{4gb: {memory_gb: 4, dtypes: [float16]}}`."""
    diffusion: DiffusionSettings = DiffusionSettings()
    placements: dict[str, dict[str, Any]] = {}
    """Which model is drawn on which GPU class, by a name of its own; what differs from `diffusion`:
    `{sd-small: {model: sd15, gpu_class: 4gb}}`. Without any, each model has one placement with `diffusion` as it is."""
    captions: CaptionSettings = CaptionSettings()
    results: ResultSettings = ResultSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    log: LogSettings = LogSettings()
    concepts: ConceptSettings = ConceptSettings()

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        """Names and types. An entry that may stand on another's (`t5-xxl-3f9a2c` on `t5-xxl`) is not known as a whole
        before the encoders are: the registry checks that it fits."""
        for name in self.encoders:
            self._check_class(self.encoders[name].get("gpu_class"), ("encoders", name, "gpu_class"))
            stands = any(name.startswith(f"{other}-") for other in self.encoders)
            try:
                self.encoder_named(name)
            except ValidationError as error:
                if faults := [one for one in error.errors(include_url=False) if one["loc"] or not stands]:
                    raise _relocated(error.title, faults, ("encoders", name)) from None
        self._check_class(self.encoder.gpu_class, ("encoder", "gpu_class"))
        return self

    @model_validator(mode="after")
    def _placements_fit(self) -> Self:
        """Names, types and GPU classes; which models there are is not known before they are looked at."""
        for name in self.placements:
            if not _PLACEMENT.fullmatch(name):
                raise _misplaced(("placements", name), "a placement's name has letters, digits, '.', '_' and '-' alone")
            try:
                gpu_class = self.placement_named(name).gpu_class
            except ValidationError as error:
                raise _relocated(error.title, error.errors(include_url=False), ("placements", name)) from None
            if "gpu_class" in self.placements[name]:
                self._check_class(gpu_class, ("placements", name, "gpu_class"))
        self._check_class(self.diffusion.gpu_class, ("diffusion", "gpu_class"))
        self._check_class(self.captions.gpu_class, ("captions", "gpu_class"))
        return self

    @model_validator(mode="after")
    def _templates_fit(self) -> Self:
        """Their names are labels of metrics, and clients write them."""
        for name, template in self.prompts.templates.items():
            for place in ((name,), *((name, "arms", arm) for arm in template.arms)):
                if not _TEMPLATE.fullmatch(place[-1]):
                    raise _misplaced(("prompts", "templates", *place), _TEMPLATE_FORM)
        return self

    @model_validator(mode="after")
    def _first_key_is_one(self) -> Self:
        first = self.keys.first
        if first is not None and not API_KEY.fullmatch(first.get_secret_value()):
            raise _misplaced(("keys", "first"), _FIRST_KEY_FORM)
        return self

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        """By the letter of base64: what a lenient decoder drops, such as a stray blank, a receiver's may not."""
        secret = self.webhooks.secret
        if secret is None and self.webhooks.allowed_hosts:
            raise _misplaced(("webhooks", "secret"), f"required with webhooks.allowed_hosts: {_WEBHOOK_SECRET_FORM}")
        if secret is not None and not _signs_webhooks(secret.get_secret_value()):
            raise _misplaced(("webhooks", "secret"), _WEBHOOK_SECRET_FORM)
        return self

    @model_validator(mode="after")
    def _tracing_headers_are_some(self) -> Self:
        headers = self.tracing.headers
        if headers is not None:
            try:
                header_pairs(headers.get_secret_value())
            except ValueError:
                raise _misplaced(("tracing", "headers"), HEADERS_FORM) from None
        return self

    @property
    def concept_folder(self) -> Path:
        return self.data_dir / "concepts" if self.concepts.folder is None else self.concepts.folder.expanduser()

    def _check_class(self, name: Any, place: tuple[str, ...]) -> None:
        """What is no name at all is told by its own group."""
        if isinstance(name, str) and name not in self.gpu_classes:
            known = ", ".join(self.gpu_classes) or "none"
            raise _misplaced(place, f"there is no GPU class {name}; gpu_classes has {known}")

    def placement_named(self, name: str) -> DiffusionSettings:
        """The settings of one placement: `diffusion`, over it what `placements` says. Raises ValidationError."""
        return DiffusionSettings.model_validate(self.diffusion.model_dump() | self.placements.get(name, {}))

    def encoder_named(self, *names: str) -> EncoderSettings:
        """The settings of one encoder: `encoder`, over it what `encoders` says of each of these names in order. Raises
        ValidationError."""
        options = self.encoder.model_dump()
        for name in names:
            options |= self.encoders.get(name, {})
        return EncoderSettings.model_validate(options)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_: Any
    ) -> tuple[Any, ...]:
        # `load` merges the origins itself, so that it can say where each value came from.
        return (init_settings,)


def _signs_webhooks(secret: str) -> bool:
    prefix, _, key = secret.rpartition("_")
    try:
        return prefix == "whsec" and len(base64.b64decode(key, validate=True)) in _WEBHOOK_KEY_BYTES
    except ValueError:  # not base64, or not even ASCII
        return False


def _misplaced(place: tuple[str, ...], reason: str) -> ValidationError:
    """A complaint about one field, however deep it lies."""
    told = PydanticCustomError("value_error", "{reason}", {"reason": reason})
    return ValidationError.from_exception_data("Settings", [InitErrorDetails(type=told, loc=place, input=None)])


def _relocated(title: str, faults: Sequence[ErrorDetails], place: tuple[str, ...]) -> ValidationError:
    """The same complaints, about fields that lie deeper in the tree."""
    return ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError(one["type"], "{reason}", {"reason": one["msg"]}),
                loc=(*place, *one["loc"]),
                input=one["input"],
            )
            for one in faults
        ],
    )
