"""Certificates: what is written, what is refused, and that only those who hold them get a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from splitwise_llm.errors import KeysError, Unreachable
from splitwise_llm.wire import grpc_link, keys
from splitwise_llm.wire.grpc_link import Server, dial, serve
from splitwise_llm.wire.keys import check_files, device_files, make_keys, worker_files
from splitwise_llm.wire.link import Link, TlsFiles


async def echo(link: Link) -> None:
    while (frame := await link.receive()) is not None:
        await link.send(frame)


def with_server(tls: TlsFiles | None, body: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
    async def serve_and_run() -> None:
        async with asyncio.timeout(10), await serve("127.0.0.1:0", echo, tls=tls) as server:
            await body(server)

    asyncio.run(serve_and_run())


async def answers(address: str, tls: TlsFiles) -> bool:
    link = await dial(address, tls=tls)
    await link.send(b"hello")
    answer = await link.receive()
    await link.close()
    return answer == b"hello"


@pytest.fixture
def expired_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of good keys, but for the device's certificate: it ended a quarter of an hour ago."""
    build = keys._builder

    def build_expired(subject: x509.Name, issuer: x509.Name, public_key: Any, days: float) -> Any:
        return build(subject, issuer, public_key, -0.01 if "device" in subject.rfc4514_string() else days)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_builder", build_expired)
        make_keys(tmp_path / "expired")
    return tmp_path / "expired"


# --- files


def test_keys_are_written_once_and_private_keys_are_private(tmp_path: Path) -> None:
    worker, device = make_keys(tmp_path / "new" / "keys")
    assert (worker_files(tmp_path / "new" / "keys"), device_files(tmp_path / "new" / "keys")) == (worker, device)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new" / "keys").iterdir()}
    assert set(modes) == {"ca.pem", "worker.pem", "worker.key", "device.pem", "device.key"}
    assert modes["worker.key"] == modes["device.key"] == 0o600


def test_the_key_of_the_authority_is_nowhere(tmp_path: Path) -> None:
    make_keys(tmp_path)
    ca = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    for path in tmp_path.glob("*.key"):
        assert keys.load_pem_private_key(path.read_bytes(), None).public_key() != ca.public_key()


def test_existing_files_are_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    make_keys(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "worker.key").chmod(0o644)
    with pytest.raises(KeysError, match=r"already holds ca\.pem.*overwrite"):
        make_keys(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    make_keys(tmp_path, overwrite=True)
    assert all(path.read_bytes() != old for path, old in before.items())
    assert (tmp_path / "worker.key").stat().st_mode & 0o777 == 0o600
    worker_files(tmp_path)


def test_the_worker_is_known_by_every_name_given_and_by_loopback(tmp_path: Path) -> None:
    worker, _ = make_keys(tmp_path, names=["gpu.example.org", "192.0.2.7", "2001:db8::7", "localhost"])
    certificate = x509.load_pem_x509_certificate(Path(worker.certificate).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gpu.example.org"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "192.0.2.7", "2001:db8::7"]


@pytest.mark.parametrize("name", ["", "host:7070", "https://host", "two hosts", "bücher.example"])
def test_what_is_no_host_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="neither a host name nor an IP address"):
        make_keys(tmp_path / "keys", names=[name])
    assert not (tmp_path / "keys").exists()


def test_certificates_last_as_long_as_asked(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="at least 1"):
        make_keys(tmp_path, days=0)
    make_keys(tmp_path, days=10)
    for path in tmp_path.glob("*.pem"):
        end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        assert timedelta(days=9) < end - datetime.now(UTC) <= timedelta(days=10)


# --- checks before use


@pytest.mark.parametrize("missing", ["ca.pem", "worker.pem", "worker.key"])
def test_a_missing_or_garbled_file_is_named_with_the_remedy(tmp_path: Path, missing: str) -> None:
    worker, _ = make_keys(tmp_path)
    (tmp_path / missing).write_text("not PEM")
    with pytest.raises(KeysError, match=rf"{missing} is no .* in PEM; run `splitwise keys"):
        worker_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(KeysError, match=rf"{missing} cannot be read .*No such file.*; run `splitwise keys"):
        worker_files(tmp_path)
    with pytest.raises(KeysError, match=missing):
        asyncio.run(dial("127.0.0.1:1", tls=worker))


def test_expired_certificates_are_refused(expired_device: Path) -> None:
    worker_files(expired_device)
    with pytest.raises(KeysError, match=r"device\.pem expired on .* UTC; run `splitwise keys"):
        device_files(expired_device)


def test_certificates_of_the_future_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_CLOCK_SKEW", -timedelta(days=2))
    make_keys(tmp_path, days=9)
    with pytest.raises(KeysError, match=r"valid only from .* set the clock"):
        device_files(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    worker, device = make_keys(tmp_path / "a")
    other, _ = make_keys(tmp_path / "b")
    with pytest.raises(KeysError, match=r"device\.key is not the key of .*worker\.pem"):
        check_files(replace(worker, key=device.key))
    with pytest.raises(KeysError, match=r"a/worker\.pem was not issued by .*b/ca\.pem"):
        check_files(replace(worker, ca=other.ca))


# --- mutual TLS


def test_device_and_worker_certificates_of_one_authority_get_a_link(tmp_path: Path) -> None:
    worker, device = make_keys(tmp_path)

    async def body(server: Server) -> None:
        assert await answers(server.address, device)
        assert await answers(server.address, worker)  # workers dial each other, too
        assert await answers(server.address.replace("127.0.0.1", "localhost"), device)

    with_server(worker, body)


def test_without_a_certificate_there_is_no_link(tmp_path: Path) -> None:
    worker, device = make_keys(tmp_path)
    grpc = grpc_link.grpc
    only_ca = grpc.ssl_channel_credentials(Path(worker.ca).read_bytes())

    async def body(server: Server) -> None:
        with pytest.raises(Unreachable, match="most likely it demands TLS"):
            await dial(server.address)
        async with grpc_link.aio.secure_channel(server.address, only_ca) as channel:
            call = channel.stream_stream("/splitwise.Link/Open")()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await answers(server.address, device)

    with_server(worker, body)


def test_a_certificate_of_another_authority_gets_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, device = make_keys(tmp_path / "ours")
    _, stranger = make_keys(tmp_path / "theirs")

    async def body(server: Server) -> None:
        with pytest.raises(KeysError, match=r"no worker's by .*theirs/ca\.pem"):
            await dial(server.address, tls=stranger)
        monkeypatch.setattr(grpc_link, "check_files", lambda files: None)  # a stranger would not check
        with pytest.raises(KeysError, match=r"hung up when it saw .*theirs/device\.pem"):
            await dial(server.address, tls=replace(stranger, ca=worker.ca))
        assert await answers(server.address, device)

    with_server(worker, body)


def test_the_worker_itself_refuses_an_expired_device(expired_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: Server) -> None:
        monkeypatch.setattr(grpc_link, "check_files", lambda files: None)  # as if the device's clock were slow
        with pytest.raises(KeysError, match=r"hung up when it saw .*device\.pem.*expired"):
            await dial(server.address, tls=keys._files(expired_device, "device"))

    with_server(worker_files(expired_device), body)


def test_a_device_cannot_pose_as_a_worker(tmp_path: Path) -> None:
    _, device = make_keys(tmp_path)

    async def body(server: Server) -> None:
        with pytest.raises(KeysError, match="no worker's"):
            await dial(server.address, tls=device)

    with_server(device, body)


def test_a_worker_under_another_host_name_is_refused(tmp_path: Path) -> None:
    worker, device = make_keys(tmp_path)

    async def body() -> None:
        async with await serve("127.0.0.2:0", echo, tls=worker) as server:
            with pytest.raises(KeysError, match=r"for other hosts.*--host"):
                await dial(server.address, tls=device)

    asyncio.run(body())


def test_a_device_with_certificates_is_told_that_the_worker_speaks_no_tls(tmp_path: Path) -> None:
    _, device = make_keys(tmp_path)

    async def body(server: Server) -> None:
        with pytest.raises(Unreachable, match="does not speak TLS"):
            await dial(server.address, tls=device)

    with_server(None, body)
