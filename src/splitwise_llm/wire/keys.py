"""A small certificate authority for mutual TLS: who may be a worker, who may be a device.

It knows files and dates; it opens no connection. The key of the authority is used once and never
written, so nobody can make one more certificate of the same authority later: make a new set instead.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitwise_llm.errors import KeysError
from splitwise_llm.wire.link import TlsFiles

_CLOCK_SKEW = timedelta(hours=1)  # a device whose clock runs late must not refuse a fresh certificate


def make_keys(
    directory: str | Path, *, names: Sequence[str] = (), days: int = 365, overwrite: bool = False
) -> tuple[TlsFiles, TlsFiles]:
    """Writes `ca.pem`, `worker.pem`, `worker.key`, `device.pem`, `device.key`; gives (worker's, device's) files.

    `names` are the hosts and IP addresses by which devices reach the workers; `localhost` and
    `127.0.0.1` are always among them. Raises KeysError rather than touch files that exist.
    """
    place = Path(directory)
    worker, device = _files(place, "worker"), _files(place, "device")
    wanted = dict.fromkeys(Path(p) for t in (worker, device) for p in (t.ca, t.certificate, t.key))
    existing = [path.name for path in wanted if path.exists()]
    if existing and not overwrite:
        raise KeysError(
            f"{place} already holds {', '.join(existing)}; give another directory, or ask to overwrite"
            " (every machine then needs the new files)"
        )
    if days < 1:
        raise KeysError(f"certificates for {days} days are of no use; give at least 1")
    hosts = [_host(name) for name in dict.fromkeys(("localhost", "127.0.0.1", *names))]
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _common_name("splitwise CA")
    place.mkdir(parents=True, exist_ok=True)
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    Path(worker.ca).write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    # A worker may also dial other workers, so its certificate serves at both ends of a link.
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    for files, role, purposes in ((worker, "worker", both), (device, "device", both[1:])):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_common_name(f"splitwise {role}"), ca_name, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        if role == "worker":
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        certificate = builder.sign(ca_key, hashes.SHA256())
        Path(files.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_secret(Path(files.key), key)
    return worker, device


def worker_files(directory: str | Path) -> TlsFiles:
    """The worker's files in a directory made by `make_keys`. Raises KeysError if they cannot be used today."""
    files = _files(Path(directory), "worker")
    check_files(files)
    return files


def device_files(directory: str | Path) -> TlsFiles:
    """The device's files in a directory made by `make_keys`. Raises KeysError if they cannot be used today."""
    files = _files(Path(directory), "device")
    check_files(files)
    return files


def check_files(files: TlsFiles) -> None:
    """Raises KeysError unless the files are there, valid today, and belong together."""
    ca = _certificate(files.ca)
    own = _certificate(files.certificate)
    try:
        key = load_pem_private_key(_bytes(files.key), password=None)
    except (ValueError, TypeError) as error:
        raise KeysError(f"{files.key} is no unencrypted private key in PEM; {_REMEDY}") from error
    now = datetime.now(UTC)
    for path, certificate in ((files.ca, ca), (files.certificate, own)):
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now > end:
            raise KeysError(f"{path} expired on {end:%Y-%m-%d %H:%M} UTC; {_REMEDY}")
        if now < start:
            raise KeysError(
                f"{path} is valid only from {start:%Y-%m-%d %H:%M} UTC on, and the clock here says"
                f" {now:%Y-%m-%d %H:%M} UTC; set the clock, or {_REMEDY}"
            )
    if key.public_key() != own.public_key():
        raise KeysError(f"{files.key} is not the key of {files.certificate}; {_REMEDY}")
    try:
        own.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise KeysError(f"{files.certificate} was not issued by {files.ca}; {_REMEDY}") from error


_REMEDY = "run `splitwise keys --out DIR --host NAME` and copy the new files to every machine"


def _files(place: Path, role: str) -> TlsFiles:
    return TlsFiles(str(place / "ca.pem"), str(place / f"{role}.pem"), str(place / f"{role}.key"))


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise KeysError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from error


def _certificate(path: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_bytes(path))
    except ValueError as error:
        raise KeysError(f"{path} is no certificate in PEM; {_REMEDY}") from error


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        if not name or name.strip() != name or any(c in name for c in ":/ "):
            raise ValueError(name)
        return x509.DNSName(name)
    except ValueError as error:
        raise KeysError(
            f"{name!r} is neither a host name nor an IP address; write it without port, as in"
            " 'gpu.example.org' or '192.0.2.7'"
        ) from error


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_secret(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Writes the key readable by its owner alone, from its first byte on."""
    path.unlink(missing_ok=True)  # an old file would keep its old mode
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
