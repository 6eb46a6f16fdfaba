"""Uploads in parts that nobody will finish: the store keeps, and bills, the parts of a killed process.

pyarrow has no call for them, so the two requests of S3's own protocol are made and signed (Signature Version 4) here.
The keys are those of the address or of the environment; where there are none, as in a cluster that hands out roles, a
lifecycle rule of the bucket (AbortIncompleteMultipartUpload) must do it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

from .paths import StoredPath

log = logging.getLogger(__name__)

_TIMEOUT_S = 30
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class _Bucket:
    """The endpoint of a bucket of S3 and the keys to it."""

    def __init__(self, path: StoredPath) -> None:
        address = urlsplit(path.bucket)
        options = {name: values[-1] for name, values in parse_qs(address.query).items()}
        self.name = address.hostname or ""
        self.region = options.get("region") or os.environ.get("AWS_REGION") or _default_region()
        self.access_key = unquote(address.username or "") or os.environ.get("AWS_ACCESS_KEY_ID", "")
        self.secret_key = unquote(address.password or "") or os.environ.get("AWS_SECRET_ACCESS_KEY", "")
        self.token = None if address.username else os.environ.get("AWS_SESSION_TOKEN")
        endpoint = options.get("endpoint_override") or _endpoint_of_environment()
        if endpoint is None:
            self.endpoint = f"https://s3.{self.region}.amazonaws.com"
        else:
            self.endpoint = endpoint if "://" in endpoint else f"{options.get('scheme', 'https')}://{endpoint}"

    def request(
        self, method: str, key: str, query: dict[str, str], now: datetime | None = None
    ) -> urllib.request.Request:
        """A signed request without a body."""
        path = quote("/".join(filter(None, (f"/{self.name}", key))))
        canonical_query = "&".join(f"{quote(k, safe='')}={quote(query[k], safe='')}" for k in sorted(query))
        host = urlsplit(self.endpoint).netloc
        time = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        headers = {"host": host, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": time}
        if self.token:
            headers["x-amz-security-token"] = self.token
        signed = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join((method, path, canonical_query, lines, signed, _EMPTY_SHA256))
        scope = f"{time[:8]}/{self.region}/s3/aws4_request"
        to_sign = "\n".join(("AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key_bytes = f"AWS4{self.secret_key}".encode()
        for part in scope.split("/"):
            key_bytes = hmac.digest(key_bytes, part.encode(), "sha256")
        signature = hmac.new(key_bytes, to_sign.encode(), "sha256").hexdigest()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        )
        return urllib.request.Request(f"{self.endpoint}{path}?{canonical_query}", headers=headers, method=method)


def unfinished_uploads(folder: StoredPath) -> list[tuple[str, str]]:
    """(key, upload id) of the uploads below a folder that were begun and not finished.

    Raises:
        OSError: the store does not answer, or refuses.
    """
    return list(_listed(_Bucket(folder), "/".join((*folder.parts[3:], ""))))


def _listed(bucket: _Bucket, prefix: str) -> Iterator[tuple[str, str]]:
    query = {"uploads": "", "prefix": prefix}
    while True:
        with urllib.request.urlopen(bucket.request("GET", "", query), timeout=_TIMEOUT_S) as answer:
            found = ElementTree.fromstring(answer.read())
        space = found.tag.rpartition("}")[0] + "}" if "}" in found.tag else ""
        for upload in found.iter(f"{space}Upload"):
            yield upload.findtext(f"{space}Key", ""), upload.findtext(f"{space}UploadId", "")
        if found.findtext(f"{space}IsTruncated") != "true":
            return
        query["key-marker"] = found.findtext(f"{space}NextKeyMarker", "")
        query["upload-id-marker"] = found.findtext(f"{space}NextUploadIdMarker", "")


def abort_unfinished(folder: StoredPath) -> None:
    """Gives up the uploads below a folder that were begun and not finished; only where nobody else writes there.

    Without keys, on other stores than S3, and where the store refuses, they stay.
    """
    if folder.parts[1] != "s3:":
        return
    bucket = _Bucket(folder)
    if not bucket.access_key:
        return
    try:
        for key, upload_id in unfinished_uploads(folder):
            request = bucket.request("DELETE", key, {"uploadId": upload_id})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
                pass
    except (OSError, ElementTree.ParseError) as error:
        log.warning("%s: unfinished uploads could not be looked for (%s)", folder, error)


def _default_region() -> str:
    return os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _endpoint_of_environment() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
