"""The output folder of a search: what goes in comes out, whatever happens to the disk or to the process."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import CONFIG, FINGERPRINT, items, manifest, result

from drllm_fast import fingerprint
from drllm_fast.atomic import PREFIX, written
from drllm_fast.search import manifest as manifests
from drllm_fast.search import store as stores
from drllm_fast.search.record import columns
from drllm_fast.search.sqlite_store import _transaction
from drllm_fast.search.store import open_store, read_store
from drllm_fast.search.unit import UnitKey, UnitResult

LIGHT = Path(__file__).with_name("light")  # a place from which processes start fast
KINDS = ("sqlite", "parquet")
TEXT = st.text(max_size=8)
FLOAT = st.floats()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def results(count):
    return [result(item) for item in items(count)]


def contents(folder):
    """Every file's bytes, but SQLite's index of its log, which readers change."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith("-shm")}


def damaged_file(folder, kind):
    return folder / "units.sqlite" if kind == "sqlite" else next((folder / "shards").glob("*.parquet"))


# -- what goes in comes out
@st.composite
def any_result(draw):
    strategies = {
        "int": st.integers(-(2**63), 2**63 - 1), "float": FLOAT, "bool": st.booleans(), "str": TEXT,
        "list[str]": st.lists(TEXT, max_size=3), "list[float]": st.lists(FLOAT, max_size=3),
        "list[bool]": st.lists(st.booleans(), max_size=3),
        "list[list[float]]": st.lists(st.lists(FLOAT, max_size=2), max_size=3),
    }  # fmt: skip
    own = manifest()
    key = UnitKey(draw(TEXT), draw(TEXT), draw(TEXT), own.model_hash, own.config_hash, own.seed)
    values = {}
    for f in dataclasses.fields(UnitResult)[1:]:
        kind = str(f.type)
        strategy = strategies[kind.removesuffix(" | None")]
        values[f.name] = draw(st.none() | strategy if kind.endswith("None") else strategy)
    return UnitResult(key, **values)


@settings(max_examples=25, deadline=None)
@given(given=st.lists(any_result(), max_size=3, unique_by=lambda r: r.key.text()))
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, given):
    with tempfile.TemporaryDirectory() as name:
        with open_store(name, manifest(), kind) as store:
            assert store.put(given) == len(given)
        with open_store(name, manifest()) as store:
            assert store.kind == kind
            found = list(store.results())
            assert store.done() == {r.key.text() for r in given}
    # repr tells nan, -0.0 and 1.0 from 1, and writes every float exactly
    assert [repr(r) for r in found] == [repr(r) for r in sorted(given, key=lambda r: r.key.text())]


def test_every_column_has_a_type_of_its_own():
    assert [n for n in columns() if n not in ("key", "prompt_hash", "task", "item", "model", "config", "seed")] == [
        f.name for f in dataclasses.fields(UnitResult) if f.name != "key"
    ]


def test_putting_twice_keeps_the_first(kind, folder):
    first, again = result(items(1)[0]), result(items(1)[0], best="0-1", seconds=9.0)
    with open_store(folder, manifest(), kind) as store:
        assert store.put([first, again]) == 1
        assert store.put([again]) == 0 and store.put([]) == 0
        assert store.put([again, *results(3)]) == 2
    with open_store(folder, manifest()) as store:
        assert store.put([again]) == 0
        assert list(store.results()) == results(3) and store.duplicates == 0


def test_numbers_of_numpy(kind, folder):
    import numpy as np

    given = result(items(1)[0], rewards=[np.float32(0.5), np.float64(1)], correct=[np.bool_(True), False])
    with open_store(folder, manifest(), kind) as store:
        store.put([given])
        assert next(store.results()).rewards == [0.5, 1.0]


def test_a_unit_of_another_search_is_refused(kind, folder):
    key = result(items(1)[0]).key
    with open_store(folder, manifest(), kind) as store:
        for change in ({"model": "f" * 12}, {"config": "f" * 12}, {"seed": 4}):
            wrong = dataclasses.replace(result(items(2)[1]), key=dataclasses.replace(key, **change))
            with pytest.raises(ValueError, match=next(iter(change))):
                store.put([*results(1), wrong])
        assert store.done() == set()  # all or none


def test_export_is_what_datasets_reads(kind, folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(stores, "EXPORT_ROWS", 4)
    with open_store(folder, manifest(), kind) as store:
        store.put(results(10)[5:])
        store.put(results(10)[:5])
        assert store.export(tmp_path / "all.parquet") == 10
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "all.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded["item"] == [item.id for item in items(10)]
    assert loaded[9]["scores"] == [[-1.0, -9.0], [-math.inf, 0.1]] and loaded[0]["level"] is None
    assert loaded[3]["prompt"] == "prompt 3" and loaded[3]["prompt_hash"] == results(4)[3].key.prompt
    stored = json.loads(pq.read_schema(tmp_path / "all.parquet").metadata[b"drllm_fast"])
    assert stored["config"]["simulations"] == 7 and stored["model_hash"] == manifest().model_hash


def test_an_export_that_fails_leaves_the_old_one(kind, folder, tmp_path, monkeypatch):
    (tmp_path / "all.parquet").write_text("old")
    with open_store(folder, manifest(), kind) as store:
        store.put(results(3))
        monkeypatch.setattr(type(store), "results", lambda self: (1 / 0 for _ in range(1)))
        with pytest.raises(ZeroDivisionError):
            store.export(tmp_path / "all.parquet")
    assert (tmp_path / "all.parquet").read_text() == "old" and not list(tmp_path.glob(PREFIX + "*"))


def test_an_empty_store(kind, folder, tmp_path):
    with open_store(folder, manifest(), kind) as store:
        assert list(store.results()) == [] and store.export(tmp_path / "none.parquet") == 0
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


# -- the folder
def test_the_manifest(folder):
    open_store(folder, manifest()).close()
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored["format"] == "drllm-fast search" and stored["format_version"] == 1 and stored["package_version"]
    assert stored["model"] == "tiny" and stored["fingerprint"] == FINGERPRINT and stored["seed"] == 3
    assert stored["config_hash"] == CONFIG.hash() and stored["grader"] == CONFIG.grader


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": dataclasses.replace(CONFIG, simulations=8)}, "config.simulations is 7, not 8"),
        ({"config": dataclasses.replace(CONFIG, options={"levels": (1,)})}, r"config.options.levels is \[1, 2\], not"),
        ({"task": {"name": "fake", "limit": 5}}, "task.limit is None, not 5"),
        ({"task": "fake"}, "task is {'name'"),
        ({"seed": 4}, "seed is 3, not 4"),
        ({"fingerprint": FINGERPRINT | {"norms": []}, "model": "other"}, r"model: tiny \(\w+\), not other"),
    ],
)
def test_another_search_is_refused(kind, folder, changes, message):
    with open_store(folder, manifest(), kind) as store:
        store.put(results(3))
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_store(folder, manifest(**changes))
    assert "another --output" in str(error.value)
    assert contents(folder) == before


def test_another_name_of_the_same_model_is_not(folder):
    open_store(folder, manifest()).close()
    open_store(folder, manifest(model="/models/tiny")).close()


def test_the_model_itself_can_be_asked(folder):
    model = tiny("llama")
    own = fingerprint.fingerprint(model)
    open_store(folder, manifest(fingerprint=own)).close()
    half = fingerprint.fingerprint(model.bfloat16())
    assert half != own  # by rounding only, but the hash differs
    with pytest.raises(ValueError, match="model"):
        open_store(folder, manifest(fingerprint=half))
    check = functools.partial(fingerprint.check, model)
    with open_store(folder, manifest(fingerprint=half), check=check) as store:
        assert store.manifest.model_hash == manifest(fingerprint=own).model_hash
    other = functools.partial(fingerprint.check, tiny("qwen2"))
    with pytest.raises(ValueError, match="another search: model: Qwen2.*is not the model"):
        open_store(folder, manifest(fingerprint=own), check=other)


def test_another_kind_is_refused(kind, folder):
    open_store(folder, manifest(), kind).close()
    with pytest.raises(ValueError, match="is a store of kind"):
        open_store(folder, manifest(), KINDS[kind == "sqlite"])


def test_auto_chooses_by_the_disk_and_the_launch(folder, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert stores.choose_kind(folder) == "sqlite"
    assert stores.disk_type(Path("/proc/self")) == "proc"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert stores.choose_kind(folder) == "sqlite"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert stores.choose_kind(folder) == "parquet"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for disk, chosen in (("nfs4", "parquet"), ("fuse.sshfs", "parquet"), ("ext4", "sqlite"), ("", "sqlite")):
        monkeypatch.setattr(stores, "disk_type", lambda folder, disk=disk: disk)
        assert stores.choose_kind(folder) == chosen
    with open_store(folder, manifest(), "auto") as store:
        assert store.kind == "sqlite"


def test_a_folder_of_something_else(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"thesis.tex but no manifest.json. Give a new folder"):
        open_store(folder, manifest())
    assert os.listdir(folder) == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        open_store(folder / "thesis.tex", manifest())
    with pytest.raises(FileNotFoundError, match="no output of a search"):
        read_store(folder)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", OSError, "damaged"),
        ('{"format": "drllm-fast search"', OSError, "damaged"),
        ('{"format": "drllm-fast search", "format_version": 1}', OSError, "damaged"),
        ('{"format": "drllm-fast search", "format_version": 2}', ValueError, "expected .*'format_version': 1"),
        ('["mine"]', ValueError, "found .'mine'"),
    ],
)
def test_a_manifest_that_is_none(folder, text, error, message):
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(error, match=message):
        open_store(folder, manifest())
    assert (folder / "manifest.json").read_text() == text


def test_reading_needs_nothing_but_the_folder(kind, folder):
    with open_store(folder, manifest(), kind) as store:
        store.put(results(3))
    before = contents(folder)
    with read_store(folder) as store:
        assert list(store.results()) == results(3)
        assert store.manifest == dataclasses.replace(manifest(), store=kind)
    assert contents(folder) == before


@contextlib.contextmanager
def read_only(folder):
    """root may write anywhere, so it becomes nobody for a while."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder(kind):
    folder = Path(tempfile.mkdtemp())
    try:
        with read_only(folder), pytest.raises(OSError, match="make the folder writable or choose another"):
            open_store(folder / "out", manifest(), kind)
        with read_only(folder), pytest.raises(OSError, match="make the folder writable or choose another"):
            open_store(folder, manifest(), kind)
        assert os.listdir(folder) == []
        with open_store(folder, manifest(), kind) as store:
            store.put(results(3))
        folder.chmod(0o555)
        with read_only(folder), read_store(folder) as store:
            assert list(store.results()) == results(3)
        assert not list(folder.glob("*-wal"))
    finally:
        shutil.rmtree(folder)


# -- faults
def test_a_full_disk(kind, folder):
    """Files may not grow over a limit, which the system reports as it does a full disk."""
    with open_store(folder, manifest(), kind) as store:
        store.put(results(20))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        large = [result(item, prompt=os.urandom(40_000).hex()) for item in items(40)[20:]]
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with pytest.raises(OSError, match="What is stored already stays; .* and run the same command again"):
                store.put(large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(store.results()) == results(20)
        assert not list(folder.rglob(PREFIX + "*"))
        assert store.put(large) == 20
    with open_store(folder, manifest()) as store:
        assert len(store.done()) == 40 and list(store.results())[20:] == large


def test_a_disk_that_is_full_from_the_start(kind, folder):
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="raise the limit on file sizes"):
            open_store(folder, manifest(), kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(folder) == []


def test_sqlite_says_what_to_do_when_the_disk_is_full(folder):
    with open_store(folder, manifest(), "sqlite") as store:
        store.put(results(2))
        store._connection.execute("PRAGMA max_page_count = 4")  # SQLite's error is that of ENOSPC
        with pytest.raises(OSError, match="No space left on device.*make room"):
            store.put([result(items(3)[2], prompt=os.urandom(20_000).hex())])
        assert list(store.results()) == results(2)


def _truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _emptied(file):
    file.write_bytes(b"")


def _scrambled(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def _overwritten_inside(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = b"\xff" * 64
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncated, _emptied, _scrambled, _overwritten_inside])
def test_damage_is_named_and_its_units_searched_anew(kind, folder, damage):
    with open_store(folder, manifest(), kind) as store:
        store.put(results(200))
    file = damaged_file(folder, kind)
    damage(file)
    before = contents(folder)
    with pytest.raises(OSError, match=f"{file.name} is damaged.*move it .*away.* and run again") as error:
        with open_store(folder, manifest()) as store:
            list(store.results())
    assert str(file) in str(error.value)
    after = contents(folder)
    assert all(after[path] == data for path, data in before.items())
    for leftover in (file, *file.parent.glob(file.name + "-*")):
        leftover.rename(folder.parent / leftover.name)
    with open_store(folder, manifest()) as store:
        assert store.done() == set() and store.put(results(200)) == 200


def test_a_changed_byte_of_a_shard_is_never_a_changed_result(folder):
    with open_store(folder, manifest(), "parquet") as store:
        store.put(results(200))
    file = damaged_file(folder, "parquet")
    sound = file.read_bytes()
    noticed = 0
    for place in range(4, len(sound) * 2 // 3, len(sound) // 60):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            with open_store(folder, manifest()) as store:
                assert list(store.results()) == results(200)
        except (OSError, ValueError) as error:  # damaged, or of another search
            assert file.name in str(error)
            noticed += 1
    assert noticed > 10


def test_a_transaction_that_fails_is_undone(folder):
    with open_store(folder, manifest(), "sqlite") as store:
        with pytest.raises(ZeroDivisionError), _transaction(store._connection):
            store._connection.execute("INSERT INTO units VALUES ('half', x'00')")
            1 / 0  # noqa: B018
        assert store.done() == set() and store.put(results(3)) == 3


def test_a_writer_waits_for_another(folder):
    with open_store(folder, manifest(), "sqlite") as store, open_store(folder, manifest()) as other:
        with _transaction(other._connection):
            thread_says = []

            def put():
                with open_store(folder, manifest()) as mine:
                    thread_says.append(mine.put(results(2)))

            thread = threading.Thread(target=put)
            thread.start()
            time.sleep(0.3)
            assert thread.is_alive() and store.done() == set()
        thread.join()
        assert thread_says == [2]


def test_the_first_manifest_stays(folder):
    """Two processes have both found none."""
    folder.mkdir()
    first = manifests.write(folder, manifest())
    assert manifests.write(folder, manifest(seed=4)) == first == manifest()


def test_a_log_without_its_database_is_not_mixed_into_a_new_one(folder):
    store = open_store(folder, manifest(), "sqlite")
    store.put(results(5))
    (folder / "units.sqlite").rename(folder.parent / "away")
    with pytest.raises(OSError, match="units.sqlite-wal is there without it"):
        open_store(folder, manifest())
    store.close()


def test_a_file_of_another_search(kind, folder):
    with open_store(folder, manifest(), kind) as store:
        store.put(results(3))
    with open_store(folder.parent / "other", manifest(task="other"), kind) as store:
        store.put(results(4))
    ours, theirs = damaged_file(folder, kind), damaged_file(folder.parent / "other", kind)
    shutil.copy(theirs, ours)
    with pytest.raises(ValueError, match=f"{ours.name} is (not of this|of another) search"):
        open_store(folder, manifest())


def test_a_file_that_is_no_shard(folder):
    with open_store(folder, manifest(), "parquet") as store:
        store.put(results(3))
        store.export(folder / "shards" / "all.parquet")
    with pytest.raises(ValueError, match=r"all.parquet is not of this search"):
        open_store(folder, manifest())


def test_leftovers_are_ignored_and_removed_when_old(kind, folder):
    folder.mkdir()
    (folder / (PREFIX + "young")).write_text("{")
    with open_store(folder, manifest(), kind) as store:  # a killed process had left it: still a new folder
        store.put(results(3))
    inside = folder / "shards" if kind == "parquet" else folder
    for age, name in ((0, "fresh"), (3600, "hour"), (25 * 3600, "day")):
        (inside / (PREFIX + name)).write_bytes(b"half")
        os.utime(inside / (PREFIX + name), (time.time() - age,) * 2)
    with open_store(folder, manifest()) as store:
        assert list(store.results()) == results(3)
    assert {p.name for p in folder.rglob(PREFIX + "*")} == {PREFIX + n for n in ("young", "fresh", "hour")}


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), written(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with written(path, once=True) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), written(path, once=True) as file:
        file.write(b"second")
    with written(path) as file:
        file.write(b"third")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"third" and os.listdir(tmp_path) == ["file"]


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    with open_store(tmp_path / "out", manifest(), "sqlite") as store:
        store.put(results(2))
    with pytest.raises(FileExistsError), written(tmp_path / "out" / "manifest.json", once=True) as file:
        file.write(b"second")


# -- several processes
PUT = """
import sys
sys.path.append({tests!r})
from search_cases import items, manifest, result
from drllm_fast.search.store import open_store

input()
print(flush=True)
store = open_store({folder!r}, manifest(), {kind!r})
for start in range(0, 300, 5):
    print(store.put([result(item) for item in items(300)[start : start + 5]]), flush=True)
"""


def test_two_processes_put_the_same_units(kind, folder):
    """Both open a new folder at once, too."""
    code = PUT.format(tests=str(Path(__file__).parent), folder=str(folder), kind=kind)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=LIGHT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:  # both have imported everything before either begins
        process.stdin.write("\n")
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    new = sum(int(line) for output in outputs for line in output.split())
    with open_store(folder, manifest()) as store:
        assert list(store.results()) == results(300) and len(store.done()) == 300
        assert new - store.duplicates == 300
        assert kind == "parquet" or new == 300


def test_a_unit_in_two_shards_is_the_first_by_name(folder):
    one, two = (open_store(folder, manifest(), "parquet") for _ in range(2))
    names = {}
    for number, store in enumerate((one, two)):
        assert store.put([result(item, forwards=number) for item in items(3)[: 2 + number]]) == 2 + number
        (names[number],) = {p.name for p in (folder / "shards").iterdir()} - set(names.values())
    with open_store(folder, manifest()) as store:
        found = list(store.results())
        first = 0 if names[0] < names[1] else 1
        assert [r.forwards for r in found] == [first, first, 1] and store.duplicates == 2
        assert store.export(folder / "all.parquet") == 3
    assert one.done() == two.done() == store.done()  # each sees what the other has put since
