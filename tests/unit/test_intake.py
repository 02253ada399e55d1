"""Rows read are known after a crash, to the row; and no node's name can break the count."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.errors import StoreUnavailable
from proxy_usage.intake import MAGIC, NAME, NODES, OTHERS, SLOT, Intake, Loss, label


def reopened(intake: Intake) -> Intake:
    """As the next process finds it when this one was killed: never closed, never flushed."""
    return Intake(intake.path)


def test_rows_counted_are_there_for_the_next_process_though_nobody_closed_the_file(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 3)
    intake.add("b", 4)
    intake.add("a", 5)
    assert intake.counts() == {"a": 8, "b": 4}
    after = reopened(intake)
    assert after.counts() == {"a": 8, "b": 4}
    after.add("a", 1)
    after.add("c", 1)
    assert reopened(after).counts() == {"a": 9, "b": 4, "c": 1}


def test_what_the_file_says_more_than_the_store_is_what_the_crash_lost(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 10)
    intake.add("b", 5)
    intake.add("c", 2)
    assert reopened(intake).compare({"a": 7, "b": 5}) == Loss({"a": 3, "c": 2}, ())


def test_a_loss_that_was_noted_is_not_a_loss_again(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("a", 10)
    stored = {"a": 7}
    lost = reopened(intake).compare(stored)
    for node, rows in lost.rows.items():
        stored[node] += rows
    assert reopened(intake).compare(stored) == Loss({}, ())


def test_a_file_that_was_lost_makes_the_loss_unknown_and_counts_go_on_from_the_store(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    intake.add("new", 2)
    assert intake.compare({"a": 7}) == Loss({"new": 2}, ("a",))
    intake.add("a", 1)
    assert reopened(intake).compare({"a": 7, "new": 2}) == Loss({"a": 1}, ())


@pytest.mark.parametrize("content", [b"", b"x", MAGIC, bytes(len(MAGIC) + SLOT * NODES)])
def test_a_file_that_is_none_of_ours_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "intake"
    path.write_bytes(content)
    intake = Intake(path)
    assert intake.counts() == {}
    intake.add("a", 1)
    assert reopened(intake).counts() == {"a": 1}


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
    assert reopened(intake).counts() == {"a": 4, "b": 4}
    assert Intake(tmp_path / "gone").counts() == {"a": 3, "b": 4}


def test_past_the_bound_nodes_share_a_slot_and_no_row_is_lost(tmp_path: Path) -> None:
    intake = Intake(tmp_path / "intake")
    for number in range(NODES + 100):
        intake.add(f"node-{number}", 1)
    intake.add(f"node-{NODES + 50}", 7)
    intake.add("node-3", 2)
    counts = reopened(intake).counts()
    assert len(counts) == NODES
    assert counts[OTHERS] == 101 + 7
    assert counts["node-3"] == 3
    assert sum(counts.values()) == NODES + 100 + 9


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
    assert counts == Counter(map(label, nodes))
    assert all(label(name) == name for name in counts)  # the store knows no other name
    intake.close()


def test_long_names_that_begin_alike_are_kept_apart() -> None:
    assert label("n" * 250 + "1") != label("n" * 250 + "2")
    assert label("a\0b") != label("a b")
