"""Object storage against a real server: round trips, conditional writes, errors with a remedy."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from finetune_api.names import storage_env
from finetune_trainer.failures import (
    DataError,
    StorageDenied,
    StorageUnavailable,
    TrainerError,
    UserError,
)
from finetune_trainer.storage import objects
from finetune_trainer.storage.objects import (
    Credentials,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    PreconditionFailed,
    Stores,
    check_conditions,
)
from finetune_trainer.storage.s3server import EmbeddedS3
from ports import free_port


def test_bytes_and_etag_round_trip(store: ObjectStore, bucket: str) -> None:
    uri = f"s3://{bucket}/a/b.json"
    tag = store.put(uri, b"one")
    assert store.get_tagged(uri) == (b"one", tag)
    assert store.head(uri) == ObjectInfo(uri, 3, tag)
    assert store.put(uri, b"two!") != tag
    assert store.get(uri) == b"two!"


def test_absent_objects(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/absent"
    assert store.head(uri) is None
    for read in (store.get, store.read_stream, lambda u: store.download(u, tmp_path / "x")):
        with pytest.raises(ObjectNotFound, match=uri):
            read(uri)
    assert not list(tmp_path.iterdir())
    store.delete([uri])


def test_conditional_writes(store: ObjectStore, bucket: str) -> None:
    uri = f"s3://{bucket}/head"
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"0", if_match='"d41d8cd98f00b204e9800998ecf8427e"')
    first = store.put(uri, b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"2", if_absent=True)
    second = store.put(uri, b"3", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"4", if_match=first)
    assert store.get_tagged(uri) == (b"3", second)


def test_one_of_eight_concurrent_creators_wins(store: ObjectStore, bucket: str) -> None:
    uri = f"s3://{bucket}/race"
    barrier = threading.Barrier(8)
    won: list[int] = []

    def create(number: int) -> None:
        barrier.wait()
        try:
            store.put(uri, str(number).encode(), if_absent=True)
            won.append(number)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get(uri) == str(won[0]).encode()


def test_a_listing_has_every_page(store: ObjectStore, bucket: str) -> None:
    store.put(f"s3://{bucket}/pages2/other", b"")
    names = [f"s3://{bucket}/pages/{n:04}" for n in range(1005)]
    for name in names:
        store.put(name, b"x")
    found = list(store.list(f"s3://{bucket}/pages/"))
    assert [info.uri for info in found] == names
    assert {info.size for info in found} == {1}
    store.delete(names)
    assert list(store.list(f"s3://{bucket}/pages/")) == []
    assert len(list(store.list(f"s3://{bucket}/pages"))) == 1


@pytest.mark.parametrize("size", [0, 5, 40 << 20])
def test_files_upload_and_download(
    store: ObjectStore, bucket: str, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "up").write_bytes(data)
    uri = f"s3://{bucket}/file"
    info = store.upload(tmp_path / "up", uri)
    assert (info.bytes, info.sha256) == (size, hashlib.sha256(data).hexdigest())
    store.download(uri, tmp_path / "deep" / "down")
    assert objects.file_info(tmp_path / "deep" / "down") == info
    with store.read_stream(uri) as stream:
        assert stream.read() == data
        assert stream.seek(-2 if size else 0, os.SEEK_END) == max(0, size - 2)
        assert stream.read() == data[-2:]
        assert stream.seek(size // 2) == size // 2
        assert stream.read(3) == data[size // 2 : size // 2 + 3]


def test_an_object_replaced_during_a_read_is_an_error(store: ObjectStore, bucket: str) -> None:
    uri = f"s3://{bucket}/data.jsonl"
    tag = store.put(uri, bytes(3 << 20))
    with store.read_stream(uri) as stream:
        stream.read(10)
        new = store.put(uri, bytes(4 << 20))
        stream.seek(2 << 20)
        with pytest.raises(DataError, match=r"data\.jsonl: .*replaced") as caught:
            stream.read(10)
    assert caught.value.reason == "ObjectChanged"
    with pytest.raises(DataError, match=uri):
        store.read_stream(uri, etag=tag)
    with store.read_stream(uri, etag=new) as stream:
        assert len(stream.read()) == 4 << 20


class Cutter:
    """A proxy that closes a connection after ``limit`` bytes of the response, at most ``times``
    times. Each connection carries one request."""

    def __init__(self, endpoint: str, limit: int, times: float = math.inf) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self.upstream, self.limit, self.times, self.cuts = (host, int(port)), limit, times, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            threading.Thread(target=_pass_on, args=(client, server), daemon=True).start()
            left = self.limit if self.cuts < self.times else 1 << 40
            while left > 0 and (data := server.recv(min(left, 1 << 16))):
                client.sendall(data)
                left -= len(data)
            self.cuts += left == 0
            for end in (client, server):  # closing alone does not wake the thread that reads
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _pass_on(client: socket.socket, server: socket.socket) -> None:
    """Pass the request on unchanged, as the signature covers the Host header, in whatever pieces it
    arrives."""
    with suppress(OSError):  # the connection was closed by the cut
        while data := client.recv(1 << 16):
            server.sendall(data)


def test_a_stream_resumes_after_a_broken_connection(s3: EmbeddedS3, bucket: str) -> None:
    data = os.urandom(5 << 20)
    s3.store().put(f"s3://{bucket}/long", data)
    cutter = Cutter(s3.endpoint, 2 << 20)
    keys = Credentials(s3.access_key, s3.secret_key)
    with (
        cutter.listener,
        ObjectStore(cutter.endpoint, credentials=keys).read_stream(f"s3://{bucket}/long") as stream,
    ):
        assert stream.read() == data
    assert cutter.cuts >= 2


def test_a_range_is_requested_again_after_a_broken_connection(s3: EmbeddedS3, bucket: str) -> None:
    data, uri = os.urandom(3 << 20), f"s3://{bucket}/long"
    s3.store().put(uri, data)
    cutter = Cutter(s3.endpoint, 1 << 20, times=2)
    keys = Credentials(s3.access_key, s3.secret_key)
    with cutter.listener:
        assert (
            ObjectStore(cutter.endpoint, credentials=keys).get_range(uri, 5, 2 << 20)
            == (data[5 : 2 << 20])
        )
    assert cutter.cuts == 2


def test_parts_are_joined_although_the_response_was_lost(s3: EmbeddedS3, bucket: str) -> None:
    """The request is repeated, as the SDK repeats it after a broken connection."""
    store, uri, data = s3.store(), f"s3://{bucket}/parts", os.urandom(5 << 20)
    upload = store.begin_parts(uri)
    tags = [store.put_part(uri, upload, 1, data)]
    cutter = Cutter(s3.endpoint, 1, times=1)
    losing = ObjectStore(cutter.endpoint, credentials=Credentials(s3.access_key, s3.secret_key))
    with cutter.listener:
        losing.join_parts(uri, upload, tags, len(data))
    assert cutter.cuts == 1 and store.get(uri) == data

    # SeaweedFS recognizes a joined upload by its object; other servers forget it. After the object
    # is overwritten, SeaweedFS forgets it too.
    store.put(uri, data)
    store.join_parts(uri, upload, tags, len(data))
    with pytest.raises(TrainerError, match="NoSuchUpload"):
        store.join_parts(uri, upload, tags, len(data) + 1)
    store.delete([uri])
    with pytest.raises(TrainerError, match="NoSuchUpload"):
        store.join_parts(uri, upload, tags, len(data))


def test_a_range_is_clipped_to_the_object(s3: EmbeddedS3, bucket: str) -> None:
    store, uri = s3.store(), f"s3://{bucket}/short"
    store.put(uri, b"0123456789")
    assert store.get_range(uri, 8, 20) == b"89"
    assert store.get_range(uri, 10, 20) == b""
    assert store.get_range(uri, 3, 3) == b""


def test_denied_access(s3: EmbeddedS3, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 10))
    uri = f"s3://{bucket}/data/x"
    wrong = Credentials(s3.access_key, "wrong", None, "Secret s3-keys")
    for store in (
        ObjectStore(s3.endpoint, credentials=wrong),
        ObjectStore(s3.endpoint, credentials=Credentials("nobody", "x", None, "Secret s3-keys")),
    ):
        for ask in (
            lambda s: s.get(uri),
            lambda s: s.head(uri),
            lambda s: s.put(uri, b""),
            lambda s: list(s.list(uri)),
            lambda s: s.delete([uri]),
            lambda s: s.upload(tmp_path / "file", uri),
            lambda s: s.download(uri, tmp_path / "out"),
        ):
            with pytest.raises(StorageDenied) as caught:
                ask(store)
            assert caught.value.reason == "AccessDenied"
            for part in (uri, s3.endpoint, "Secret s3-keys", "AWS_SECRET_ACCESS_KEY"):
                assert part in caught.value.message


@pytest.mark.parametrize(
    ("code", "status", "retryable"),
    [
        ("XServerNotInitialized", 503, True),
        ("SlowDown", 200, True),
        ("NoSuchUpload", 404, True),
        ("ExpiredToken", 400, True),
        ("RequestTimeTooSkewed", 403, True),
        ("InvalidAccessKeyId", 403, False),
        ("NotImplemented", 501, False),
        ("MalformedXML", 400, False),
    ],
)
def test_server_errors_are_classified_by_status(
    store: ObjectStore, bucket: str, code: str, status: int, retryable: bool
) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(TrainerError) as caught, store._asking("put", f"s3://{bucket}/x"):
        raise ClientError(answer, "PutObject")
    assert caught.value.retryable == retryable


def test_missing_bucket(s3: EmbeddedS3, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    uri = "s3://no-such-bucket/data/x"
    for ask in (
        lambda: store.get(uri),
        lambda: store.head(uri),
        lambda: store.put(uri, b""),
        lambda: list(store.list(uri)),
        lambda: store.upload(tmp_path / "file", uri),
        lambda: store.download(uri, tmp_path / "out"),
        lambda: store.read_stream(uri),
    ):
        with pytest.raises(StorageDenied, match="'no-such-bucket' does not exist") as caught:
            ask()
        assert caught.value.reason == "BucketNotFound"
        assert s3.endpoint in caught.value.message


def test_an_unreachable_endpoint(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StorageUnavailable, match=endpoint):
        ObjectStore(endpoint, credentials=Credentials("a", "b")).get("s3://bucket/key")


def test_an_invalid_address(store: ObjectStore) -> None:
    with pytest.raises(UserError, match="'bucket/key' is not an address"):
        store.get("bucket/key")


def test_without_keys_access_is_anonymous(s3: EmbeddedS3, bucket: str) -> None:
    with pytest.raises(StorageDenied, match="anonymous access"):
        ObjectStore(s3.endpoint).get(f"s3://{bucket}/key")


def test_stores_by_profile(run_spec_for, s3: EmbeddedS3, bucket: str) -> None:  # type: ignore[no-untyped-def]
    other = {"endpoint": s3.endpoint, "secretRef": {"name": "other"}}
    run_spec = run_spec_for(
        data={"train": [{"source": f"s3://{bucket}/t.jsonl", "storage": other}]},
        storage={"secretRef": {"name": "main"}},
    )
    stores = Stores(run_spec)
    assert stores.default is stores.of(None)
    source = run_spec.spec.data.train[0]
    assert stores.of(source.storage) is not stores.default
    assert stores.of(source.storage) is stores.of(source.storage)
    stores.of(source.storage).put(f"s3://{bucket}/x", b"")

    half = Stores(run_spec, {storage_env(1, "AWS_ACCESS_KEY_ID"): "a"})
    with pytest.raises(StorageDenied, match="Secret other gives no AWS_SECRET_ACCESS_KEY"):
        half.of(source.storage)
    with pytest.raises(StorageDenied, match="Secret main gives no AWS_ACCESS_KEY_ID"):
        _ = half.default


class Deaf(ObjectStore):
    """A store whose server ignores one of the conditions."""

    ignored = ""

    def put(self, uri, data, *, if_match=None, if_absent=False):  # type: ignore[no-untyped-def]
        if self.ignored == "If-Match":
            if_match = None
        return super().put(
            uri, data, if_match=if_match, if_absent=if_absent and self.ignored != "If-None-Match"
        )


@pytest.mark.parametrize("ignored", ["If-Match", "If-None-Match"])
def test_a_store_that_ignores_conditions_is_refused(
    s3: EmbeddedS3, bucket: str, ignored: str
) -> None:
    deaf = Deaf(s3.endpoint, credentials=Credentials(s3.access_key, s3.secret_key))
    deaf.ignored = ignored
    with pytest.raises(UserError, match="ignores") as caught:
        check_conditions(deaf, f"s3://{bucket}/work")
    assert caught.value.reason == "StoreIgnoresConditions"
    check_conditions(s3.store(), f"s3://{bucket}/work")
    assert list(deaf.list(f"s3://{bucket}/")) == []
