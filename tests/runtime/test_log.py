"""Log lines with numbers; sizes and times read and written."""

import logging

import pytest

from reelpool.errors import ConfigError
from reelpool.runtime.log import format_bytes, format_seconds, parse_bytes, setup, timed


@pytest.fixture
def package_logger():
    logger = logging.getLogger("reelpool")
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("8GB", 8 * 10**9),
        ("8G", 8 * 2**30),
        ("1.5 kib", 1536),
        ("0.5TB", 5 * 10**11),
        ("512", 512),
        ("512 B", 512),
        (" 2 Mb ", 2_000_000),
        ("0", 0),
        ("4Gi", 4 * 2**30),
    ],
)
def test_parse_bytes_reads_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "8 GiBB", "8 GBB", "1e9", "8,5G", "nan", "8 XB", "9" * 30, "8 Gi B"]
)
def test_parse_bytes_refuses_the_rest(text):
    with pytest.raises(ConfigError, match=r"memory: .* is not a size; write it like 8GiB"):
        parse_bytes(text, "memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 2**20, "512 MiB"),
        (2**30 - 1, "1 GiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (-(2**20), "-1 MiB"),
        (5 * 2**60, "5120 PiB"),
    ],
)
def test_format_bytes_is_short(size, text):
    assert format_bytes(size) == text


def test_written_sizes_are_read_back():
    for size in (0, 7, 2**10, 512 * 2**20, 3 * 2**40):
        assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.000 s"),
        (0.0412, "0.041 s"),
        (0.9999, "1.00 s"),
        (9.999, "10.0 s"),
        (59.99, "1 min 00 s"),
        (119.6, "2 min 00 s"),
        (3599.9, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (-2, "-2.00 s"),
    ],
)
def test_format_seconds_never_shows_60(seconds, text):
    assert format_seconds(seconds) == text


def test_timed_measures_and_logs_one_line(caplog):
    caplog.set_level(logging.DEBUG, "reelpool.runtime.log")
    with timed("h2d", 512 * 2**20) as timing:
        assert timing.seconds == 0
    assert timing.seconds > 0
    assert timing.gbps == pytest.approx(512 * 2**20 / timing.seconds / 1e9)
    [record] = caplog.records
    timing.seconds = 0.041
    assert str(timing) == "h2d 512 MiB 0.041 s 13.1 GB/s"
    assert record.levelno == logging.DEBUG


def test_timed_says_when_the_block_failed(caplog):
    caplog.set_level(logging.DEBUG, "reelpool.runtime.log")
    with pytest.raises(KeyError), timed("step") as timing:
        raise KeyError
    assert caplog.messages[0].endswith(" (failed)")
    assert timing.gbps is None


def test_setup_takes_argument_before_environment(package_logger, monkeypatch):
    monkeypatch.setenv("REELPOOL_LOG", "error")
    setup()
    assert package_logger.level == logging.ERROR
    count = len(package_logger.handlers)
    setup("Debug")
    assert package_logger.level == logging.DEBUG
    assert len(package_logger.handlers) == count


def test_setup_names_the_wrong_level(package_logger, monkeypatch):
    monkeypatch.setenv("REELPOOL_LOG", "loud")
    with pytest.raises(ConfigError, match="REELPOOL_LOG: 'loud' is no log level; use one of debug"):
        setup()
