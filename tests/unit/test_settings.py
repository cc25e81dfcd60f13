"""Settings: four origins, the later wins, nothing unknown slips through, no secret gets out."""

import base64
import contextlib
import json
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError
from standardwebhooks import Webhook

from serve.errors import OperatorError
from serve.origins import EnvironmentSecret, flatten, load, load_args, plain_secrets, shown
from serve.settings.telemetry import header_pairs
from serve.settings.tree import Settings

NAMES = [name for name, _ in flatten(Settings())]
AMBIGUOUS = ("hunter2/x", "hunter2#x", "hunter2?x", "hunter2@x", "x/hunter2", "x#hunter2", "x?hunter2", "x@hunter2/y")


def refused(file: Path | None = None, environ: dict[str, str] | None = None, **overrides: Any) -> str:
    with pytest.raises(OperatorError) as error:
        load(file, environ or {}, {name.replace("__", "."): value for name, value in overrides.items()})
    assert "\n" not in error.value.message
    return error.value.message


def yaml(folder: Path, text: str) -> Path:
    file = folder / "tandem.yaml"
    file.write_text(text)
    return file


def test_nothing_given_is_all_defaults() -> None:
    loaded = load(None, {}, {})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert list(loaded.origins) == NAMES


def test_later_origins_win_and_are_named(tmp_path: Path) -> None:
    file = yaml(tmp_path, "http: {port: 1001, host: 0.0.0.0}\njobs: {lease_s: 5}\nlog: {level: debug}\n")
    environ = {"TANDEM_HTTP__PORT": "1002", "TANDEM_JOBS__LEASE_S": "6", "PATH": "/bin"}
    loaded = load(file, environ, {"http.port": 1003, "http.host": None})
    http, jobs = loaded.settings.http, loaded.settings.jobs
    assert (http.port, http.host, jobs.lease_s, loaded.settings.log.level) == (1003, "0.0.0.0", 6.0, "debug")
    assert loaded.origins["http.port"] == "command line"
    assert loaded.origins["http.host"] == f"file {file}"
    assert loaded.origins["jobs.lease_s"] == "environment TANDEM_JOBS__LEASE_S"
    assert loaded.origins["jobs.max_queued"] == "default"


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = yaml(tmp_path, "results: {store: s3, s3: {bucket: pictures}}")
    loaded = load(None, {"TANDEM_CONFIG": str(file)})
    assert loaded.settings.results.s3.bucket == "pictures"
    assert loaded.origins["results.s3.bucket"] == f"file {file}"


def test_what_is_unknown_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    assert "http.prot" in refused(yaml(tmp_path, "http: {prot: 1}"))
    assert "https" in refused(yaml(tmp_path, "https: {port: 1}"))
    assert "TANDEM_HTTP__PROT" in refused(environ={"TANDEM_HTTP__PROT": "1"})
    assert "TANDEM_HTTP_PORT" in refused(environ={"TANDEM_HTTP_PORT": "1"})
    assert "http.prot" in refused(http__prot=1)


def test_a_wrong_value_names_the_setting_and_its_origin(tmp_path: Path) -> None:
    assert "environment TANDEM_HTTP__PORT" in refused(environ={"TANDEM_HTTP__PORT": "many"})
    assert "http.port" in refused(http__port=70000)
    assert "model.source" in refused(yaml(tmp_path, "model: {source: [a, b]}"))
    assert "http" in refused(http=5)
    assert "http.port" in refused(http__port__x=5)


def test_a_table_is_merged_from_all_origins(tmp_path: Path) -> None:
    file = yaml(
        tmp_path,
        "encoder: {dtype: float16}\nencoders: {t5-xxl: {num_gpus: 2, shard: true}}\ntext_models: [{source: /a}]",
    )
    environ = {"TANDEM_ENCODERS": '{"t5-xxl": {"num_gpus": 1}}'}
    overrides = {"encoders.clip-l.dtype": "float32", "text_models": '[{"source": "/b", "name": "b"}]'}
    loaded = load(file, environ, overrides)
    t5, clip = loaded.settings.encoder_named("t5-xxl"), loaded.settings.encoder_named("clip-l")
    assert (t5.num_gpus, t5.shard, t5.dtype) == (1, True, "float16")
    assert (clip.num_gpus, clip.shard, clip.dtype) == (0, False, "float32")
    assert loaded.settings.encoder_named("openclip-bigg") == loaded.settings.encoder
    assert [model.name for model in loaded.settings.text_models] == ["b"]
    places = {f"file {file}", "environment TANDEM_ENCODERS", "command line"}
    assert set(loaded.origins["encoders"].split(", ")) == places
    assert loaded.origins["text_models"] == "command line"


def test_a_wrong_table_names_the_place(tmp_path: Path) -> None:
    assert "encoders.t5.dtpe: no such setting" in refused(yaml(tmp_path, "encoders: {t5: {dtpe: float16}}"))
    assert "encoders.t5.num_gpus" in refused(encoders__t5__num_gpus="many")
    message = refused(encoders__t5__min_replicas=3)
    assert message == "encoders.t5: min_replicas 3 is more than max_replicas 1"
    assert refused(encoder__compile=True, encoder__shard=True) == "encoder: compile and shard can't be combined"
    assert "encoders.t5: compile and shard" in refused(yaml(tmp_path, "encoders: {t5: {compile: true, shard: true}}"))
    assert "encoders.t5" in refused(encoders__t5=3)
    assert "TANDEM_ENCODERS: its value is not JSON" in refused(environ={"TANDEM_ENCODERS": "float16"})
    assert "text_models.0.sauce" in refused(text_models="[{sauce: /a}]")
    assert "text_models" in refused(text_models="/a")


def test_a_fault_inside_a_list_or_a_table_has_the_origin_of_the_whole(tmp_path: Path) -> None:
    file = yaml(tmp_path, "text_models: [{sauce: /a}]")
    assert refused(file) == f"text_models.0.sauce: no such setting (from file {file})"
    environ = {"TANDEM_TEXT_MODELS": '[{"source": "/a"}, {"source": 3}]'}
    assert refused(environ=environ).startswith("text_models.1.source: ")
    assert refused(environ=environ).endswith("(from environment TANDEM_TEXT_MODELS)")
    assert refused(encoders__t5__dtype="float8").endswith("(from command line)")


def test_classes_and_placements_come_from_all_origins(tmp_path: Path) -> None:
    file = yaml(
        tmp_path,
        "models: [{source: /b}]\ngpu_classes: {4gb: {memory_gb: 4}}\n"
        "diffusion: {max_batch_size: 3}\nplacements: {small: {gpu_class: 4gb, max_pixels: 65536}}",
    )
    environ = {"TANDEM_GPU_CLASSES": '{"11gb": {"memory_gb": 11, "label": "big"}}'}
    overrides = {"placements.small.max_batch_size": 2, "placements.large": '{"gpu_class": "11gb"}'}
    settings = load(file, environ, overrides).settings
    assert settings.gpu_classes["4gb"].dtypes == ("bfloat16", "float16", "float32")
    assert settings.gpu_classes["11gb"].label == "big"
    small, large = settings.placement_named("small"), settings.placement_named("large")
    assert (small.max_batch_size, small.max_pixels, small.gpu_class) == (2, 65536, "4gb")
    assert (large.max_batch_size, large.max_pixels, large.gpu_class) == (3, None, "11gb")
    assert [model.source for model in settings.models] == ["/b"]


def test_a_group_that_says_nothing_is_there(tmp_path: Path) -> None:
    settings = load(yaml(tmp_path, "http: {}\nplacements: {small: {}}"), {"TANDEM_HTTP__PORT": "1001"}).settings
    assert settings.placements == {"small": {}}
    assert settings.http.port == 1001


def test_a_wrong_placement_names_the_place_and_the_origin(tmp_path: Path) -> None:
    assert "placements.small.gpu_clas: no such setting" in refused(yaml(tmp_path, "placements: {small: {gpu_clas: a}}"))
    assert refused(placements__small__replicas="few").startswith("placements.small.replicas: ")
    assert refused(placements__small__replicas="few").endswith("(from command line)")
    message = refused(yaml(tmp_path, "gpu_classes: {a: {memory_gb: 4}}\nplacements: {small: {gpu_class: b}}"))
    assert message.startswith("placements.small.gpu_class: there is no GPU class b; gpu_classes has a (from file")
    assert refused(diffusion__gpu_class="a").startswith("diffusion.gpu_class: there is no GPU class a")
    assert "placements.a/b" in refused(yaml(tmp_path, "placements: {a/b: {}}"))
    assert "gpu_classes.a.memory_gb" in refused(yaml(tmp_path, "gpu_classes: {a: {memory_gb: 0}}"))
    assert "gpu_classes.a: dtypes is empty" in refused(yaml(tmp_path, "gpu_classes: {a: {memory_gb: 4, dtypes: []}}"))


def test_a_denoiser_runs_on_one_gpu() -> None:
    assert refused(diffusion__num_gpus=2).startswith("diffusion.num_gpus: ")
    assert refused(placements__a__num_gpus=1.5).startswith("placements.a.num_gpus: ")
    assert load(None, {}, {"diffusion.num_gpus": 1}).settings.diffusion.num_gpus == 1


def test_the_benchmark_is_offered_where_somebody_said_so() -> None:
    """`host` says nothing of who reaches a cluster's proxy."""
    assert not Settings().http.offers_benchmark
    assert not Settings(http={"benchmark": False}).http.offers_benchmark
    assert Settings(http={"host": "0.0.0.0", "benchmark": True}).http.offers_benchmark


@pytest.mark.parametrize("size", [24, 32, 64])
def test_webhooks_are_signed_by_a_secret_of_the_standard_form(size: int) -> None:
    secret = "whsec_" + base64.b64encode(bytes(range(size))).decode()
    settings = load(None, {}, {"webhooks.allowed_hosts": ["a.example"], "webhooks.secret": secret}).settings
    assert settings.webhooks.secret == SecretStr(secret)
    Webhook(secret)


def test_webhooks_without_a_secret_or_with_another_are_refused() -> None:
    said = "webhooks.secret: required with webhooks.allowed_hosts"
    assert refused(webhooks__allowed_hosts=["a.example"]).startswith(said)
    good = base64.b64encode(bytes(32)).decode()
    short, long = (base64.b64encode(bytes(size)).decode() for size in (23, 65))
    url_safe = base64.urlsafe_b64encode(b"\xff" * 32).decode()
    for wrong in (
        "",
        "hunter2",
        good,
        f"whsec{good}",
        f"whsec_a_{good}",
        *(f"whsec_{key}" for key in ("", short, long, url_safe, f" {good}", f"{good}\n", good.rstrip("="), "ä" * 40)),
    ):
        message = refused(webhooks__secret=wrong)
        assert message.startswith("webhooks.secret: whsec_ and 24 to 64 bytes in base64")
        assert message.endswith("(from command line)")
        assert "hunter2" not in message


@pytest.mark.parametrize(
    "wrong",
    [
        "otel-collector:4318",
        "grpc://otel-collector:4317",
        "http://",
        "http://ada:hunter2@collector/v1/traces",
        "http://c/?x=1",
    ],
)
def test_a_collector_that_is_none_is_refused_by_its_setting(wrong: str) -> None:
    message = refused(tracing__endpoint=wrong)
    assert message.startswith("tracing.endpoint: must be an http or https URL")
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "wrong",
    ["hunter2", "api key=hunter2", "=hunter2", "api-key=", "a=b,hunter2", "a=hunter2%0Ab", "a=hunter2%E2%80%A6"],
)
def test_headers_for_a_collector_that_are_none_are_refused_and_not_shown(wrong: str) -> None:
    message = refused(tracing__headers=wrong)
    assert message.startswith("tracing.headers: name=value")
    assert "hunter2" not in message


def test_headers_for_a_collector_are_read_as_opentelemetry_spells_them() -> None:
    assert header_pairs(" Authorization=Bearer%20a%3Db%2Cc , x-tenant=two=1,") == {
        "authorization": "Bearer a=b,c",
        "x-tenant": "two=1",
    }
    assert header_pairs("") == {}


@pytest.mark.parametrize("wrong", ["", "hunter2", f"tdm_{'b' * 12}_{'B' * 42}", f"tdm_{'1' * 12}_{'B' * 43}"])
def test_a_first_key_of_another_form_is_refused_and_not_shown(wrong: str) -> None:
    message = refused(environ={"TANDEM_KEYS__FIRST": wrong})
    assert message.startswith("keys.first: tdm_ and 12 of a-z2-7, _ and 43 of")
    assert message.endswith("(from environment TANDEM_KEYS__FIRST)")
    assert not wrong or wrong not in message


def test_on_a_cluster_the_environment_has_what_the_args_leave_open(tmp_path: Path) -> None:
    file = yaml(tmp_path, "http: {prot: 1}")
    args = {"jobs": {"lease_s": 5}, "placements": {"sd1.5": {"replicas": 2}}, "data_dir": "/data"}
    environ = {
        "TANDEM_JOBS__REDIS_URL": "redis://:hunter2@jobs:6379/0",
        "TANDEM_JOBS__LEASE_S": "6",
        "TANDEM_LOG__LEVEL": "debug",
        "TANDEM_CONFIG": str(file),
        "TANDEM_KEY": "a client's",
    }
    loaded = load_args(args, environ)
    jobs = loaded.settings.jobs
    assert (jobs.lease_s, loaded.settings.log.level, loaded.settings.data_dir) == (5, "debug", Path("/data"))
    assert jobs.redis_url is not None
    assert jobs.redis_url.get_secret_value() == "redis://:hunter2@jobs:6379/0"
    assert loaded.settings.placements == {"sd1.5": {"replicas": 2}}
    assert loaded.origins["jobs.lease_s"] == "args of the Serve application"
    assert loaded.origins["jobs.redis_url"] == "environment TANDEM_JOBS__REDIS_URL"


def refused_args(args: dict[str, Any], **environ: str) -> str:
    with pytest.raises(OperatorError) as error:
        load_args(args, environ)
    assert "\n" not in error.value.message
    return error.value.message


def test_args_are_judged_with_the_environment_and_not_before() -> None:
    hooks = {"webhooks": {"allowed_hosts": ["a.example"]}}
    secret = "whsec_" + base64.b64encode(bytes(32)).decode()
    assert load_args(hooks, {"TANDEM_WEBHOOKS__SECRET": secret}).settings.webhooks.secret is not None
    assert refused_args(hooks).startswith("webhooks.secret: required with webhooks.allowed_hosts")
    assert "TANDEM_HTTP__PROT" in refused_args({}, TANDEM_HTTP__PROT="1")
    assert refused_args({"http": {"prot": 1}}) == "http.prot: no such setting (from args of the Serve application)"
    assert refused_args({"http": {"port": "many"}}).endswith("(from args of the Serve application)")
    s3 = {"results": {"store": "s3"}}
    assert "results.s3.bucket" in refused_args(s3)
    assert load_args(s3, {"TANDEM_RESULTS__S3__BUCKET": "pictures"}).settings.results.s3.bucket == "pictures"


def test_a_name_in_a_table_may_have_a_dot_wherever_it_comes_from(tmp_path: Path) -> None:
    expected = {"sd1.5": {"replicas": 2}}
    assert load(yaml(tmp_path, "placements: {sd1.5: {replicas: 2}}"), {}).settings.placements == expected
    assert load(None, {"TANDEM_PLACEMENTS": '{"sd1.5": {"replicas": 2}}'}).settings.placements == expected


def test_what_kubernetes_tells_of_services_called_like_us_is_no_setting() -> None:
    links = {
        "TANDEM_REDIS_JOBS_SERVICE_HOST": "10.0.0.1",
        "TANDEM_REDIS_JOBS_SERVICE_PORT": "6379",
        "TANDEM_REDIS_JOBS_SERVICE_PORT_REDIS": "6379",
        "TANDEM_REDIS_JOBS_PORT": "tcp://10.0.0.1:6379",
        "TANDEM_REDIS_JOBS_PORT_6379_TCP": "tcp://10.0.0.1:6379",
        "TANDEM_REDIS_JOBS_PORT_6379_TCP_ADDR": "10.0.0.1",
    }
    assert load(None, links).settings == Settings()
    assert "TANDEM_REDIS_JOBS_PORTS" in refused(environ=links | {"TANDEM_REDIS_JOBS_PORTS": "1"})
    assert "TANDEM_REDIS_JOBS_PORT" in refused(environ={"TANDEM_REDIS_JOBS_PORT": "6379"})


def test_a_secret_of_the_environment_is_in_no_copy_that_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", "redis://:hunter2@jobs:6379/0")
    args = {"cache": {"redis_url": "redis://:hunter3@cache:6379/0"}}
    copy = pickle.dumps(load_args(args).settings)
    assert b"hunter2" not in copy
    assert b"hunter3" in copy, "what lies in args travels, and so it belongs into the environment"
    url = pickle.loads(copy).jobs.redis_url
    assert isinstance(url, EnvironmentSecret)
    assert url.get_secret_value() == "redis://:hunter2@jobs:6379/0"
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", "redis://:another@jobs:6379/0")
    assert pickle.loads(copy).jobs.redis_url.get_secret_value() == "redis://:another@jobs:6379/0"
    monkeypatch.delenv("TANDEM_JOBS__REDIS_URL")
    with pytest.raises(OperatorError, match="environment TANDEM_JOBS__REDIS_URL: "):
        pickle.loads(copy)


def test_a_variable_in_small_letters_is_none_of_ours() -> None:
    url = "redis://:hunter2@jobs:6379/0"
    for name in ("tandem_jobs__redis_url", "Tandem_Jobs__Redis_Url"):
        assert load_args({}, {name: url}).settings.jobs.redis_url is None
    assert load_args({}, {"tandem_jobs": json.dumps({"redis_url": url})}).settings.jobs.redis_url is None


def test_args_that_say_nothing_leave_open_what_the_environment_has() -> None:
    environ = {"TANDEM_JOBS__REDIS_URL": "redis://jobs:6379/0"}
    for args in ({"jobs": {"redis_url": None}}, {"jobs": None}):
        url = load_args(args, environ).settings.jobs.redis_url
        assert url is not None
        assert url.get_secret_value() == "redis://jobs:6379/0"


def test_secrets_that_travel_are_told_by_name() -> None:
    args = {"cache": {"redis_url": "redis://cache:6379/0"}}
    settings = load_args(args, {"TANDEM_JOBS__REDIS_URL": "redis://jobs:6379/0"}).settings
    assert plain_secrets(settings) == ["cache.redis_url"]
    assert settings.model_copy(deep=True).jobs.redis_url is settings.jobs.redis_url


def test_an_encoder_s_class_is_there() -> None:
    """Also where the entry stands on another, and is not known as a whole."""
    encoders = {"t5-xxl": {"max_replicas": 4}, "t5-xxl-abc123": {"min_replicas": 2, "gpu_class": "b", "num_gpus": 1}}
    with pytest.raises(ValidationError, match="there is no GPU class b; gpu_classes has none") as raised:
        Settings(encoders=encoders)
    assert raised.value.errors()[0]["loc"] == ("encoders", "t5-xxl-abc123", "gpu_class")
    with pytest.raises(ValidationError, match="there is no GPU class b"):
        Settings(encoder={"gpu_class": "b"})


def test_an_override_that_may_stand_on_another_is_checked_by_itself_alone(tmp_path: Path) -> None:
    """The registry knows which of them are one encoder's."""
    encoders = "encoders: {t5-xxl: {max_replicas: 4}, t5-xxl-abc123: {min_replicas: 2}}"
    settings = load(yaml(tmp_path, encoders), {}).settings
    whole = settings.encoder_named("t5-xxl", "t5-xxl-abc123")
    assert (whole.min_replicas, whole.max_replicas) == (2, 4)
    wrong = yaml(tmp_path, "encoders: {t5-xxl: {max_replicas: 4}, t5-xxl-abc123: {min_replicas: few}}")
    assert "encoders.t5-xxl-abc123.min_replicas" in refused(wrong)
    wrong = yaml(tmp_path, "encoders: {t5-xxl: {max_replicas: 4}, t5-xxl-abc123: {minimum: 2}}")
    assert "encoders.t5-xxl-abc123.minimum: no such setting" in refused(wrong)


@pytest.mark.parametrize("text", ["a: [", "- a list", "just text", "a: b: c"])
def test_a_file_that_is_no_settings_file_is_refused(text: str, tmp_path: Path) -> None:
    assert "tandem.yaml" in refused(yaml(tmp_path, text)) or "no such setting" in refused(yaml(tmp_path, text))


def test_an_empty_or_missing_file(tmp_path: Path) -> None:
    assert load(yaml(tmp_path, ""), {}).settings == Settings()
    assert "No such file" in refused(tmp_path / "missing.yaml")


@given(st.dictionaries(st.sampled_from(NAMES), st.one_of(st.text(), st.integers(), st.floats(), st.none())))
def test_any_values_give_settings_or_one_line(overrides: dict[str, Any]) -> None:
    with contextlib.suppress(OperatorError):
        loaded = load(None, {}, overrides)
        assert all(loaded.origins[name] == "command line" for name, value in overrides.items() if value is not None)


def test_the_tree_is_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.http.port = 1
    with pytest.raises(ValidationError):
        settings.data_dir = Path()


def test_every_setting_is_described_and_named_as_the_environment_can_spell_it() -> None:
    def described(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                described(field.annotation)
                continue
            assert field.description, f"{model.__name__}.{name} has no description"
            for inside in get_args(field.annotation):
                if isinstance(inside, type) and issubclass(inside, BaseModel):
                    described(inside)

    described(Settings)


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("redis://:hunter2@host:6379/1", "redis://**********@host:6379"),
        ("redis://user:hunter2@host/0?password=hunter2", "redis://**********@host"),
        ("rediss://:hunter2@[::1]:6379/0", "rediss://**********@[::1]:6379"),
        ("redis://host:6379", "redis://host:6379"),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock"),
        ("hunter2", "**********"),
        # Nobody can tell where these passwords end.
        *((f"redis://:{password}@host:6379/0", "**********") for password in AMBIGUOUS),
        ("redis://:hunter2/0", "**********"),
        ("redis://me:hunter2", "**********"),
        ("unix://:hunter2/x@/run/redis.sock", "**********"),
        ("redis://[hunter2", "**********"),
    ],
)
def test_a_secret_is_never_shown(secret: str, text: str) -> None:
    assert shown(SecretStr(secret)) == text
    settings = load(None, {"TANDEM_JOBS__REDIS_URL": secret}).settings
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


@given(st.text(), st.text("a1.:/?#@[]%-", max_size=6))
def test_no_password_is_shown_whatever_is_in_it(password: str, rest: str) -> None:
    told = shown(SecretStr(f"redis://:Zq{password}Zq@host{rest}"))
    assert "Zq" not in told
    assert told == "**********" or told.startswith("redis://**********@host")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://key:hunter2@minio:9000", "https://**********@minio:9000"),
        ("https://key:hunter2@minio:9000/base?token=hunter2", "https://**********@minio:9000/base"),
        *((f"https://key:{password}@minio:9000", "**********") for password in AMBIGUOUS),
        ("https://minio:9000/base", "https://minio:9000/base"),
        ("/pictures/a@b", "/pictures/a@b"),
    ],
)
def test_no_url_names_a_user(url: str, text: str) -> None:
    settings = load(None, {}, {"results.s3.endpoint_url": url, "webhooks.public_url": url}).settings
    values = {name: shown(value) for name, value in flatten(settings)}
    assert values["results.s3.endpoint_url"] == values["webhooks.public_url"] == text
