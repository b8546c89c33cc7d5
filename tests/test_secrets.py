"""Planted secrets are found in no message, log, record or table."""

import io
import logging
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ConfigError, ExitCode, NotFoundError, StorageError, without_secrets
from pipeline.run_log import JsonFormatter, _TextFormatter
from pipeline.run_report import FailedShard, RunReport
from pipeline.source import expand_shards
from pipeline.storage import open_store
from pipeline.storage._backend import checked_url
from pipeline.storage._retry import with_retries

SECRET = "pLaNtEd0123456789SeCrEt"
URLS = [
    f"https://h.example/x.tar?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"https://h.example/x.tar?sv=2024&se=2030&sig={SECRET}",
    f"https://h.example/x.tar?X-Goog-Signature={SECRET}",
    f"https://h.example/x.tar?AWSAccessKeyId={SECRET}&Expires=1",
    f"https://h.example/x.tar#access_token={SECRET}",
    f"https://user:{SECRET}@h.example/x.tar",
    f"https://{SECRET}@h.example/x.tar",
    f"s3://key:{SECRET}@bucket/x.tar",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_credentials_is_refused_unshown_wherever_it_stands(url: str, tmp_path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{url}\n")
    remote = open_store("memory://secrets")
    remote.put("list.txt", url.encode())

    for spec in (url, str(listed), "memory://secrets/list.txt", f"{url}{{0..3}}", f"{url}{{"):
        with pytest.raises(ConfigError) as caught:
            expand_shards(spec)
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_config_with_such_a_url_ends_in_an_error_without_it(
    url: str, command: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    plugins = {"encoder": {"name": "llava"}, "carver": {"name": "uniform_grid"}}
    bad = [
        {"input": {"shards": "x.tar"}, "output": {"url": url}},
        {"input": {"shards": {"a": url}}, "output": {"url": "x"}},
        {"input": {"shards": "x.tar"}, "output": {"url": "x", "part_mib": url}},
    ]
    for values in bad:
        path.write_text(yaml.safe_dump({**plugins, **values}))

        result = CliRunner().invoke(app, [command, "--config", str(path)])

        assert result.exit_code == ExitCode.CONFIG
        assert SECRET not in result.output + result.stderr


@pytest.mark.parametrize("command", ["status", "inspect", "verify", "gc"])
@pytest.mark.parametrize("url", URLS)
def test_commands_on_a_cache_do_not_show_it_either(command: str, url: str) -> None:
    result = CliRunner().invoke(app, [command, url])

    assert result.exit_code == ExitCode.CONFIG
    assert SECRET not in result.output + result.stderr


@pytest.mark.parametrize("url", URLS)
def test_what_a_driver_says_of_its_requests_is_shown_without_them(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    def fails() -> None:
        raise ConnectionError(f"Could not connect to the endpoint URL: '{url}' (timeout)")

    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        with_retries("read", "s3://bucket/x.tar", fails)

    assert "Could not connect" in str(caught.value)
    assert "trying again" in caplog.text
    assert SECRET not in str(caught.value) + caplog.text
    assert SECRET not in repr(caught.value)
    assert SECRET not in str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "HF_TOKEN"]
)
def test_a_secret_of_the_environment_is_taken_out_of_messages(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, SECRET)

    assert str(StorageError(f"denied for {SECRET} here")) == "denied for *** here"
    assert str(NotFoundError("nothing to hide")) == "nothing to hide"


@pytest.mark.parametrize("formatter", [JsonFormatter(), _TextFormatter()])
@pytest.mark.parametrize("url", URLS)
def test_the_log_of_a_run_shows_none_in_lines_or_traces(
    url: str, formatter: logging.Formatter
) -> None:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(formatter)
    log = logging.Logger("pipeline.test")
    log.addHandler(handler)

    try:
        {}[f"a library says {url}"]
    except KeyError:
        log.exception("request to %s failed", url)

    assert "a library says" in sink.getvalue()
    assert "***" in sink.getvalue()
    assert SECRET not in sink.getvalue()


def test_reports_of_a_run_hold_no_secret_of_a_foreign_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    report = RunReport()
    for url in URLS:
        report.failed.append(
            FailedShard(shard="s3://b/x.tar", reason="KeyError", message=f"no {url}", attempts=3)
        )

    report.save(store)

    (failures,) = tmp_path.glob("runs/*/failures.parquet")
    assert len(pq.read_table(failures)) == len(URLS)
    assert SECRET not in str(pq.read_table(failures).to_pylist())
    for path in tmp_path.glob("runs/*/*"):
        assert SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/key with spaces.tar",
        "abfs://container@account.dfs.core.windows.net/x.tar",
        "https://h.example/x.tar?versionId=3",
        "keys k1=2; mail a@b.example; 10:30",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "name", ["TOKENS_URL", "TOKEN_CACHE", "HF_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE"]
)
def test_a_place_that_a_variable_names_is_no_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "s3://bucket/visual-tokens")

    assert without_secrets("no s3://bucket/visual-tokens/x") == "no s3://bucket/visual-tokens/x"
    assert checked_url("s3://bucket/visual-tokens/run") == "s3://bucket/visual-tokens/run"
