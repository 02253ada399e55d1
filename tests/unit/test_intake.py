"""Rows read are known after a crash, to the row; and no node's name can break the count."""

import io
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.errors import StoreUnavailable
from proxy_usage.intake import (
    HTTP,
    LOGS,
    MAGIC,
    NAME,
    OTHER_LOGS,
    OTHERS,
    PLACES,
    SIZE,
    SLOT,
    TCP,
    Intake,
    Loss,
    Source,
    by_node,
    label,
    read_counts,
)


def reopened(intake: Intake) -> Intake:
    """As the next process finds it when this one was killed: never closed, never flushed."""
    return Intake(intake.path)


def test_rows_counted_are_there_for_the_next_process_though_nobody_closed_the_file(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 3)
    intake.add("b", 4)
    intake.add("a", 5)
    assert intake.counts() == {Source("a"): 8, Source("b"): 4}
    after = reopened(intake)
    assert after.counts() == {Source("a"): 8, Source("b"): 4}
    after.add("a", 1)
    after.add("c", 1)
    assert reopened(after).counts() == {Source("a"): 9, Source("b"): 4, Source("c"): 1}


def test_what_the_file_says_more_than_the_store_is_what_the_crash_lost(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 10)
    intake.add("b", 5)
    intake.add("c", 2)
    assert reopened(intake).compare({Source("a"): 7, Source("b"): 5}) == Loss(
        {Source("a"): 3, Source("c"): 2}, ()
    )


def test_a_loss_that_was_noted_is_not_a_loss_again(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 10)
    stored = {Source("a"): 7}
    lost = reopened(intake).compare(stored)
    for node, rows in lost.rows.items():
        stored[node] += rows
    assert reopened(intake).compare(stored) == Loss({}, ())


def test_a_file_that_was_lost_makes_the_loss_unknown_and_counts_go_on_from_the_store(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("new", 2)
    assert intake.compare({Source("a"): 7}) == Loss({Source("new"): 2}, ("a",))
    intake.add("a", 1)
    assert reopened(intake).compare({Source("a"): 7, Source("new"): 2}) == Loss({Source("a"): 1}, ())


@pytest.mark.parametrize("content", [b"", b"x", MAGIC, bytes(len(MAGIC) + SLOT * PLACES)])
def test_a_file_that_is_none_of_ours_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "intake"
    path.write_bytes(content)
    intake = Intake(path)
    assert intake.counts() == {}
    intake.add("a", 1)
    assert reopened(intake).counts() == {Source("a"): 1}


def test_a_place_without_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"cannot keep row counts in .*file/intake") as caught:
        Intake(tmp_path / "file" / "intake")
    assert caught.value.hint


def test_a_disk_in_place_of_another_gets_all_that_is_known(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 3)
    (tmp_path / "intake").rename(tmp_path / "gone")
    intake.add("b", 4)
    intake.renew()
    intake.add("a", 1)
    assert reopened(intake).counts() == {Source("a"): 4, Source("b"): 4}
    assert Intake(tmp_path / "gone").counts() == {Source("a"): 3, Source("b"): 4}


def test_what_could_not_be_written_is_known_until_the_file_is_opened_anew(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 3)
    states = [intake.behind]
    writable, intake._fd = intake._fd, os.open(tmp_path / "intake", os.O_RDONLY)
    intake.add("a", 4)
    intake.add("b", 1)
    os.close(intake._fd)
    states.append(intake.behind)
    intake._fd = writable
    assert reopened(intake).counts() == {Source("a"): 3}
    intake.renew()
    assert [*states, intake.behind] == [False, True, False]
    assert reopened(intake).counts() == {Source("a"): 7, Source("b"): 1}


def test_past_the_bound_nodes_share_a_slot_and_no_row_is_lost(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    for number in range(PLACES + 100):
        intake.add(f"node-{number}", 1, "http", HTTP)
    intake.add(f"node-{PLACES + 50}", 7, "http", HTTP)
    intake.add(f"node-{PLACES + 50}", 5, "conn", TCP)
    intake.add("node-3", 2, "http", HTTP)
    counts = reopened(intake).counts()
    assert len(counts) == PLACES - 3 + 2  # one place for each kind of the others
    assert counts[Source(OTHERS, "", HTTP)] == 103 + 7
    assert counts[Source(OTHERS, "", TCP)] == 5
    assert counts[Source("node-3", "http", HTTP)] == 3
    assert sum(counts.values()) == PLACES + 100 + 14


def test_a_node_that_invents_log_names_does_not_take_the_places_of_others(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    for number in range(10 * LOGS):
        intake.add("a", 1, f"log-{number}", HTTP)
    intake.add("b", 1, "http", HTTP)
    counts = reopened(intake).counts()
    assert counts[Source("a", OTHER_LOGS, HTTP)] == 9 * LOGS
    assert counts[Source("b", "http", HTTP)] == 1
    assert len(counts) == LOGS + 2
    again = reopened(intake)
    again.add("a", 1, "log-new", HTTP)
    assert again.counts()[Source("a", OTHER_LOGS, HTTP)] == 9 * LOGS + 1


def test_logs_and_kinds_are_counted_apart(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 3, "http", HTTP)
    intake.add("a", 4, "conn", TCP)
    intake.add("a", 5, "http", TCP)
    counts = reopened(intake).counts()
    assert counts == {Source("a", "http", HTTP): 3, Source("a", "conn", TCP): 4, Source("a", "http", TCP): 5}
    assert by_node(counts) == {"a": 12}


def test_a_file_that_counted_by_node_alone_is_taken_over_with_what_no_store_has_yet(tmp_path: Path) -> None:
    path = tmp_path / "intake"
    former = ((b"a", 9), (b"b", 4))
    slots = b"".join(struct.pack("<Q", rows) + name.ljust(248, b"\0") for name, rows in former)
    path.write_bytes((b"proxy-usage rows read 1\n".ljust(64, b"\0") + slots).ljust(64 + 256 * 4096, b"\0"))
    assert read_counts(path) == {Source("a"): 9, Source("b"): 4}
    intake = Intake(path)
    assert intake.compare({Source("a"): 7, Source("b"): 4}) == Loss({Source("a"): 2}, ())
    intake.add("a", 1, "http", HTTP)
    assert reopened(intake).counts() == {Source("a"): 9, Source("b"): 4, Source("a", "http", HTTP): 1}


@given(st.lists(st.text() | st.sampled_from(["\0" * 300, "é" * 300, "a\0b", "\0", "x" * 200, "x" * 201, ""])))
def test_any_name_is_counted_under_one_label_that_fits(
    tmp_path_factory: pytest.TempPathFactory, nodes: list[str]
) -> None:
    intake = Intake(tmp_path_factory.mktemp("intake") / "intake")
    for node in nodes:
        intake.add(node, 1)
        assert 0 < len(label(node).encode()) <= min(NAME, 200)
        assert "\0" not in label(node)
    counts = reopened(intake).counts()
    assert by_node(counts) == Counter(map(label, nodes))
    assert all(label(name) == name for name in by_node(counts))  # the store knows no other name
    intake.close()


def test_long_names_that_begin_alike_are_kept_apart() -> None:
    assert label("n" * 250 + "1") != label("n" * 250 + "2")
    assert label("a\0b") != label("a b")


def test_the_file_is_made_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in one go it is cached in large pieces, and a count costs six times as much to write."""
    sizes: list[int] = []
    true_open = Path.open

    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            sizes.append(len(memoryview(data)))
            return super().write(data)

    def opened(path: Path, mode: str = "r", buffering: int = -1) -> object:
        if mode == "wb":
            return io.BufferedWriter(Watched(path, mode), buffering)
        return true_open(path, mode, buffering)

    monkeypatch.setattr(Path, "open", opened)
    Intake(tmp_path / "intake").close()
    assert sum(sizes) == SIZE
    assert max(sizes) <= 4_096
