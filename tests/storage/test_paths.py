"""Paths of object stores: names, joints and what travels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.errors import StorageError
from moe_compress.storage import StoredPath, address, as_path, is_stored

from .conftest import Store

NAMES = st.text(st.characters(codec="ascii", exclude_characters="/?#\\\0"), min_size=1).filter(
    lambda n: n.strip(".") != ""
)
OPTIONS = "endpoint_override=127.0.0.1:5000&scheme=http"


@given(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["", f"?{OPTIONS}"]))
def test_an_address_survives_everything(names: list[str], options: str) -> None:
    uri = f"s3://bucket/{'/'.join(names)}{options}"
    path = as_path(uri)
    assert isinstance(path, StoredPath)
    assert path.uri == address(path) == uri
    assert pickle.loads(pickle.dumps(path)) == path
    joined = path.parent / path.name
    assert isinstance(joined, StoredPath)
    assert joined == path
    assert as_path(Path(uri)) == path  # two slashes have become one
    assert str(path) == f"s3://bucket/{'/'.join(names)}"


@pytest.mark.parametrize(
    ("name", "path"),
    [("file:///data/model", "/data/model"), ("~/x", os.path.expanduser("~/x")), ("owner/name", "owner/name")],
)
def test_other_names_are_of_the_disk(name: str, path: str) -> None:
    assert as_path(name) == Path(path)
    assert not is_stored(name)


def test_secrets_are_not_shown() -> None:
    path = as_path(f"s3://key:secret@bucket/folder/name?{OPTIONS}")
    assert str(path) == "s3://bucket/folder/name"
    assert "secret" in address(path)
    assert path.with_name("other").name == "other"


def test_no_name_on_the_disk() -> None:
    with pytest.raises(TypeError, match=r"use storage\.local"):
        os.fspath(as_path("s3://bucket/name"))


def test_unknown_kind_of_store() -> None:
    with pytest.raises(StorageError, match="nowhere://bucket: no filesystem"):
        as_path("nowhere://bucket/name").exists()


def test_what_a_store_is_asked(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    store.put(tmp_path / "a.txt", "folder/a.txt")
    store.put(tmp_path / "a.txt", "folder/deeper/b.json")
    folder = store.path("folder")
    assert folder.is_dir()
    assert not folder.is_file()
    assert (folder / "a.txt").is_file()
    assert (folder / "a.txt").stat().st_size == 5
    assert (folder / "a.txt").read_text() == "text\n"
    assert not (folder / "none").exists()
    assert [path.name for path in folder.iterdir()] == ["a.txt", "deeper"]
    assert list(folder.glob("*.txt")) == [folder / "a.txt"]
    with (folder / "a.txt").open() as file:
        assert list(file) == ["text\n"]
    with pytest.raises(StorageError, match="objects are written whole"):
        (folder / "a.txt").open("w")
    (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").read_bytes()


def test_seal(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    store.put(tmp_path / "a", "folder/a")
    sealed = pickle.loads(pickle.dumps(store.path("folder").sealed()))
    sealed.check_seal()
    assert (sealed / "a").read_text() == "before"
    (tmp_path / "a").write_text("afterwards")
    store.put(tmp_path / "a", "folder/a")
    with pytest.raises(StorageError, match="its objects changed since the job began"):
        (sealed / "a").parent.check_seal()
