"""Lists of shards that somebody else wrote: what they can make this machine read."""

import pytest

from pipeline.errors import ConfigError, PipelineError
from pipeline.source import expand_shards
from pipeline.storage import open_store

LIST = "memory://elsewhere/list.txt"


@pytest.fixture
def elsewhere():
    store = open_store("memory://elsewhere")
    store.put("a.tar", bytes(1024))
    yield store
    store.delete_tree("a.tar")


def named(store, *lines, **options):
    store.put("list.txt", "\n".join(lines).encode())
    return [shard.url for shard in expand_shards(LIST, **options)]


def test_a_list_on_a_store_names_objects_of_that_store(elsewhere):
    assert named(elsewhere, "a.tar", "memory://elsewhere/a.tar") == ["memory://elsewhere/a.tar"]


@pytest.mark.parametrize(
    "entry",
    [
        "/etc/passwd",
        "/etc/*.tar",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "local:///etc/passwd",
        "{file,memory}:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "https://localhost/x.tar",
        "s3://other/x.tar",
        "reference://x.tar",
        "github://org:repo@main/x.tar",
        "simplecache::file:///etc/passwd",
        "zip://x.tar::file:///etc/a.zip",
    ],
)
def test_a_list_on_a_store_cannot_name_other_places(elsewhere, tmp_path, entry):
    with pytest.raises(ConfigError, match=r"another store|chained"):
        named(elsewhere, "a.tar", entry)


def test_what_is_allowed_by_name_can_be_listed(elsewhere, tmp_path):
    path = tmp_path / "local.tar"
    path.write_bytes(bytes(1024))

    found = named(elsewhere, str(path), allow_list_schemes=["file"])

    assert found == [str(path)]
    with pytest.raises(ConfigError, match=r"put 's3' into input\.allow_list_schemes"):
        named(elsewhere, "s3://b/x.tar", allow_list_schemes=["file"])


def test_a_list_over_http_cannot_name_another_server(monkeypatch):
    lines = b"http://10.0.0.1/x.tar\n"
    monkeypatch.setattr("pipeline.source._shards.read_input", lambda url: lines)

    with pytest.raises(ConfigError, match="another store"):
        expand_shards("http://lists.example/list.txt")


@pytest.mark.parametrize("entry", ["pipe:touch {}", "pipe:cat x.tar | touch {}", "| touch {}"])
@pytest.mark.parametrize("rewrite", [None, "memory://elsewhere=/etc"])
def test_nothing_in_a_list_is_ever_run(elsewhere, tmp_path, monkeypatch, entry, rewrite):
    proof = tmp_path / "proof"
    if rewrite is not None:
        monkeypatch.setenv("GOPEN_REWRITE", rewrite)
        monkeypatch.setenv("WDS_REWRITE", rewrite)
        monkeypatch.setenv("WDS_SECURE", "0")
    command = entry.format(proof)
    local = tmp_path / "list.txt"
    local.write_text(command)

    for spec in (str(local), command):
        with pytest.raises(PipelineError):
            expand_shards(spec)
    with pytest.raises(PipelineError):
        named(elsewhere, command)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["list.txt", "other.list", "../elsewhere/list.txt"])
def test_a_list_that_names_a_list_is_refused_itself_included(elsewhere, name):
    with pytest.raises(ConfigError, match="names another list"):
        named(elsewhere, name)


@pytest.mark.parametrize(
    "braces",
    ["x-{0..99999999999}.tar", "x-{0..9999999999999999999999}.tar", "{a,b}" * 30 + ".tar"],
)
def test_braces_that_stand_for_billions_are_refused_unfolded(elsewhere, braces):
    for spec in (braces, f"memory://elsewhere/{braces}"):
        with pytest.raises(ConfigError, match="stands for more than 4000000 shards"):
            expand_shards(spec)
    with pytest.raises(ConfigError, match="stands for more than"):
        named(elsewhere, braces)


def test_environment_variables_in_names_are_not_filled_in(elsewhere, monkeypatch):
    monkeypatch.setenv("WDS_WHERE", "a")

    with pytest.raises(ConfigError, match="no shards found"):
        named(elsewhere, "${WHERE}.tar")
    with pytest.raises(ConfigError, match="no shards found"):
        named(elsewhere, "$WDS_WHERE.tar")
