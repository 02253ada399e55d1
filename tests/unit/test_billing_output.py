"""What the billing endpoint's answers mean: each line of its contract, and answers that keep to none."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.outputs import FORMATS
from proxy_usage.outputs.answers import MAX_RETRY_AFTER_MS
from proxy_usage.outputs.base import (
    Ambiguous,
    Answer,
    Paused,
    Refused,
    Retry,
    Settled,
    Shortfall,
    Verdict,
)
from proxy_usage.outputs.billing import EVENT_CODES, Billing
from proxy_usage.store import Fate, Queued

A, B, C = (letter * 26 for letter in "ABC")
OUTPUT = OutputConfig.model_validate({"name": "billing", "url": "http://127.0.0.1/x"})
SENT = tuple(Queued(seq, id_, "alpha", "requests", 1, b"{}") for seq, id_ in ((11, A), (12, B), (13, C)))
DELIVERED = Fate("delivered", 200)


def read(
    status: int, body: object = b"", headers: Mapping[str, str] | None = None, sent: tuple[Queued, ...] = SENT
) -> Verdict:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Billing().read(Answer(status, headers or {}, raw), sent)


# --- requests -------------------------------------------------------------------------------------


def test_a_batch_is_the_stored_bytes_joined_into_an_array() -> None:
    events = [SENT[0]._replace(body=b'{"a": 1}'), SENT[1]._replace(body=b'{"b":"\xc3\xa9"}')]
    request = FORMATS["billing"](OUTPUT, 60_000).encode(events)
    assert request.body == b'[{"a": 1},{"b":"\xc3\xa9"}]'
    assert request.headers == {"Content-Type": "application/json"}


# --- successes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"accepted": 3},
        {"accepted": 3, "rejected": []},
        {"accepted": 3, "rejected": None},
        {"accepted": 3, "warnings": ["x"]},
    ],
)
def test_as_many_accepted_as_sent_is_a_delivery(body: object) -> None:
    assert read(200, body) == Settled(dict.fromkeys((11, 12, 13), DELIVERED))


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_fewer_accepted_than_sent_is_no_delivery_of_any(accepted: int) -> None:
    verdict = read(200, {"accepted": accepted})
    assert isinstance(verdict, Shortfall)
    assert verdict.fates == {}
    assert f"{accepted} of 3" in verdict.answer


def test_the_rejections_of_a_207_are_matched_by_id_and_the_rest_is_delivered() -> None:
    rejected = [{"id": B, "reason": "INVALID_VALUE_TYPE", "detail": "not a string"}]
    assert read(207, {"accepted": 2, "rejected": rejected}) == Settled(
        {
            11: Fate("delivered", 207),
            12: Fate("dead", 207, "INVALID_VALUE_TYPE", "not a string"),
            13: Fate("delivered", 207),
        }
    )


def test_a_207_that_rejects_everything_settles_everything() -> None:
    rejected = [{"id": event.id, "reason": "INVALID_ULID"} for event in SENT]
    verdict = read(207, {"accepted": 0, "rejected": rejected})
    assert isinstance(verdict, Settled)
    assert {fate.name for fate in verdict.fates.values()} == {"dead"}


def test_a_207_with_an_empty_id_does_not_say_whom_it_means() -> None:
    rejected = [{"id": "", "reason": "INVALID_ULID"}, {"id": A, "reason": "INVALID_VALUE_TYPE"}]
    verdict = read(207, {"accepted": 1, "rejected": rejected})
    assert isinstance(verdict, Shortfall)
    assert verdict.fates == {11: Fate("dead", 207, "INVALID_VALUE_TYPE")}


def test_a_rejection_without_an_id_means_the_one_event_that_was_sent() -> None:
    verdict = read(207, {"accepted": 0, "rejected": [{"id": "", "reason": "INVALID_ULID"}]}, sent=SENT[:1])
    assert verdict == Settled({11: Fate("dead", 207, "INVALID_ULID")})


@pytest.mark.parametrize(
    "rejected",
    [
        [{"id": "Z" * 26, "reason": "INVALID_ULID"}],  # an id that was not sent
        [{"reason": "INVALID_ULID"}],
        ["INVALID_ULID"],
        [None],
        [{"id": [A]}],
    ],
)
def test_rejections_that_match_nothing_leave_open_who_was_accepted(rejected: list[Any]) -> None:
    verdict = read(207, {"accepted": 2, "rejected": rejected})
    assert isinstance(verdict, Shortfall)
    assert verdict.fates == {}


def test_an_event_rejected_twice_over_does_not_stand_for_two() -> None:
    rejected = [{"id": A, "reason": "INVALID_ULID"}] * 2
    assert isinstance(read(207, {"accepted": 1, "rejected": rejected}), Shortfall)


def test_accepted_and_rejected_that_fall_short_together_leave_somebody_open() -> None:
    """An account that is not ready is left out of both."""
    verdict = read(207, {"accepted": 1, "rejected": [{"id": A, "reason": "INVALID_ULID"}]})
    assert isinstance(verdict, Shortfall)
    assert set(verdict.fates) == {11}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<!doctype html><title>Sign in</title>",
        b"null",
        b"3",
        b"[]",
        b'"accepted"',
        b"{}",
        b'{"accepted": 3',
        b'{"accepted":3}{"accepted":3}',
        {"accepted": "3"},
        {"accepted": 3.0},
        {"accepted": True},
        {"accepted": None},
        {"accepted": -1},
        {"accepted": 4},
        {"accepted": 3, "rejected": [{"id": A}]},
        {"accepted": 3, "rejected": {"id": A}},
        {"accepted": 3, "rejected": "all"},
        b'{"accepted":3,"x":"\xff"}',
        b'{"accepted":3,"x":"\\ud800"}',
        b'{"accepted":' + b"9" * 5_000 + b"}",
        b'{"accepted":1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b" " * (1 << 20),
    ],
    ids=lambda body: repr(body)[:40],
)
@pytest.mark.parametrize("status", [200, 202, 207])
def test_a_success_that_does_not_say_what_was_accepted_is_ambiguous(status: int, body: object) -> None:
    verdict = read(status, body)
    assert isinstance(verdict, Ambiguous)
    assert len(verdict.answer) < 700


def test_a_204_has_no_proof_to_show() -> None:
    assert isinstance(read(204), Ambiguous)


def test_one_event_accepted_as_true_is_not_one() -> None:
    assert isinstance(read(200, {"accepted": True}, sent=SENT[:1]), Ambiguous)


# --- refusals -------------------------------------------------------------------------------------


def test_a_400_refuses_the_batch() -> None:
    verdict = read(400, {"code": "INVALID_REQUEST", "message": "not an array"})
    assert verdict == Refused(400, "INVALID_REQUEST: not an array")


@pytest.mark.parametrize("code", sorted(EVENT_CODES))
def test_a_400_with_the_code_of_an_event_says_so(code: str) -> None:
    assert read(400, {"code": code, "message": "x"}) == Refused(400, f"{code}: x", event_code=code)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"", ""),
        (b"<html>", "<html>"),
        (b"[1]", "[1]"),
        (b'{"message":"no code"}', "no code"),
        (b'{"code":7}', "7: "),
        (b"\xff", "\ufffd"),
        (b"[" * 100_000, "[" * 500),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_400_of_somebody_else_carries_no_code(body: bytes, answer: str) -> None:
    assert read(400, body) == Refused(400, answer)


def test_a_413_was_the_size() -> None:
    assert read(413, b"too large") == Refused(413, "too large", too_large=True)


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_let_in_waits_for_a_person(status: int) -> None:
    verdict = read(status, b"no", {"retry-after": "7"})
    assert verdict == Paused("unauthorized", f"{status}: no", 7_000)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 399])
def test_a_redirect_is_not_followed_and_named(status: int) -> None:
    verdict = read(status, b"", {"location": "https://login.example/" + "x" * 999})
    assert isinstance(verdict, Paused)
    assert verdict.reason == "redirected"
    assert verdict.answer.startswith(f"{status} to https://login.example/")
    assert len(verdict.answer) < 250


@pytest.mark.parametrize("status", [402, 404, 405, 406, 409, 410, 418, 451, 499, 501])
def test_other_client_errors_are_a_wrong_configuration(status: int) -> None:
    verdict = read(status, b"what?")
    assert verdict == Paused("misconfigured", f"{status}: what?")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (408, "timeout"),
        (425, "too_early"),
        (429, "throttled"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "server_error"),
        (504, "server_error"),
        (599, "server_error"),
    ],
)
def test_what_may_pass_by_itself_is_tried_again(status: int, reason: str) -> None:
    assert read(status, b"later") == Retry(reason, f"{status}: later")


# --- Retry-After ----------------------------------------------------------------------------------

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)


def after(value: str, date: str | None = None) -> int:
    headers = {"retry-after": value} | ({} if date is None else {"date": date})
    verdict = read(429, b"", headers)
    assert isinstance(verdict, Retry)
    return verdict.after_ms


@pytest.mark.parametrize(
    ("value", "expected_ms"),
    [
        ("0", 0),
        ("1", 1_000),
        (" 120 ", 120_000),
        ("3600", 3_600_000),
        ("3601", MAX_RETRY_AFTER_MS),
        ("9" * 400, MAX_RETRY_AFTER_MS),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("", 0),
        ("\u00b2", 0),
        ("Sun, 22 Nov 99999999999999999999 10:00:00 GMT", 0),
        ("Sun, 22 Nov 2026 99999999999999999999:00:00 GMT", 0),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_retry_after_in_seconds(value: str, expected_ms: int) -> None:
    assert after(value, format_datetime(NOW, usegmt=True)) == expected_ms


@pytest.mark.parametrize(
    ("wait", "expected_ms"),
    [
        (timedelta(seconds=90), 90_000),
        (timedelta(0), 0),
        (timedelta(seconds=-1), 0),
        (timedelta(days=-400), 0),
        (timedelta(days=2), MAX_RETRY_AFTER_MS),
    ],
)
def test_retry_after_as_a_date_counts_from_the_answers_own_date(wait: timedelta, expected_ms: int) -> None:
    date = format_datetime(NOW, usegmt=True)
    assert after(format_datetime(NOW + wait, usegmt=True), date) == expected_ms


def test_retry_after_as_a_date_counts_from_our_clock_where_the_answer_has_no_date() -> None:
    assert after(format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)) == MAX_RETRY_AFTER_MS
    assert after(format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)) == 0


# --- anything at all ------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([A, B, C]),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["accepted", "rejected", "id", "reason"]), inner)
    ),
)


@given(
    status=st.integers(200, 599),
    body=st.binary() | _json.map(lambda value: json.dumps(value).encode()),
    headers=st.dictionaries(st.sampled_from(["retry-after", "date", "location"]), st.text()),
)
@example(status=207, body=b'{"accepted":0,"rejected":[{"id":"' + A.encode() + b'"}]}', headers={})
def test_no_answer_is_past_reading_and_none_settles_an_event_it_does_not_name(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    verdict = read(status, body, headers)
    if isinstance(verdict, Settled):
        assert 200 <= status < 300
        assert set(verdict.fates) == {11, 12, 13}
        accepted = sum(fate.name == "delivered" for fate in verdict.fates.values())
        assert accepted == json.loads(body)["accepted"]
    if isinstance(verdict, Shortfall):
        assert set(verdict.fates) < {11, 12, 13}
        assert {fate.name for fate in verdict.fates.values()} <= {"dead"}
    if isinstance(verdict, Retry | Paused):
        assert 0 <= verdict.after_ms <= MAX_RETRY_AFTER_MS
