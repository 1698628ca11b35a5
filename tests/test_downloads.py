"""The download scripts against a server on 127.0.0.1: cut connections, bad archives, layouts. No other network."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import re
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "ckpts": ROOT / "download_all_ckpts.sh",
    "glue": ROOT / "data-scripts" / "download_glue.sh",
    "textcls": ROOT / "data-scripts" / "download_textcls.sh",
}
BODY = bytes(range(256)) * 4000  # 1 MB: several blocks


def load_fetch():
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "data-scripts" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fetch = load_fetch()


@dataclasses.dataclass
class Served:
    """A file on the server, and how the server misbehaves."""

    body: bytes
    etag: str = '"one"'
    ranges: bool = True
    """Honours Range."""
    if_range: bool = True
    """Honours If-Range."""
    cuts: list[int] = dataclasses.field(default_factory=list)
    """The first answers end after so many bytes of the body."""
    errors: list[int] = dataclasses.field(default_factory=list)
    """The first answers are these statuses."""
    claim: int | None = None
    """A false Content-Length."""
    shift: int = 0
    """A partial answer that starts so many bytes late."""
    stall: float = 0
    """Seconds of silence before a cut."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range", "")
        self.server.requests.append((self.path, asked))
        served = self.server.files.get(self.path)
        if served is None or served.errors:
            return self.send_error(served.errors.pop(0) if served else 404)
        start = 0
        current = not served.if_range or self.headers.get("If-Range", served.etag) == served.etag
        if asked and served.ranges and current:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + served.shift
            if start >= len(served.body):
                return self.send_error(416)
        body = served.body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(served.body) - 1}/{len(served.body)}")
        if served.etag:
            self.send_header("ETag", served.etag)
        self.send_header("Content-Length", str(served.claim or len(body)))
        self.end_headers()
        if served.cuts:
            self.wfile.write(body[: served.cuts.pop(0)])
            self.wfile.flush()
            self.server.stop.wait(served.stall)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server; `site.files` is what it has, `site.requests` what it was asked, `site.waits` how long we paused."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.waits, server.stop = {}, [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(fetch.time, "sleep", server.waits.append)
    for base in fetch.BASES:
        monkeypatch.setenv(base, server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def run(*arguments):
    return fetch.main([str(argument) for argument in arguments])


def run_script(name, *arguments, cwd, **environment):
    return subprocess.run(
        [SCRIPTS[name], *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def one_message(text):
    """The one line that says what failed; a traceback is a defect."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("FAILED: ")]
    return line


def tar_gz(files, *special):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            bundle.addfile(member, io.BytesIO(body))
        for member in special:
            bundle.addfile(member)
    return buffer.getvalue()


def zipped(files, mode=0):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, body in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            bundle.writestr(info, body)
    return buffer.getvalue()


def special(name, kind, linkname=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, linkname
    return member


# --- one file -------------------------------------------------------------------------------------------------------


def test_full_download(site, tmp_path):
    site.files["/f.bin"] = Served(BODY)
    target = tmp_path / "deep" / "f.bin"
    digest = hashlib.sha256(BODY).hexdigest()
    assert run("url", f"{site.url}/f.bin", target, "--sha256", digest.upper()) == 0
    assert target.read_bytes() == BODY
    assert tree(tmp_path) == ["deep/f.bin"]
    assert run("url", f"{site.url}/f.bin", target, "--sha256", digest) == 0
    assert len(site.requests) == 1


def test_an_empty_file(site, tmp_path):
    site.files["/f.bin"] = Served(b"")
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert tree(tmp_path) == ["f.bin"]


def test_a_cut_connection_is_resumed(site, tmp_path):
    site.files["/f.bin"] = Served(BODY, cuts=[1000, 500_000])
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert [asked for _, asked in site.requests] == ["", "bytes=1000-", "bytes=501000-"]
    assert site.waits == [1, 1]  # new bytes came each time, so patience begins anew


def test_more_cuts_than_attempts_are_fine_while_bytes_come(site, tmp_path):
    site.files["/f.bin"] = Served(BODY, cuts=[1000] * 12)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin", "--attempts", 2) == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY


def test_the_next_run_continues(site, tmp_path, capsys):
    site.files["/f.bin"] = Served(BODY, cuts=[1000], errors=[])
    url, target = f"{site.url}/f.bin", tmp_path / "f.bin"
    assert run("url", url, target, "--attempts", 1) == 1
    assert "got 1,000 of 1,024,000 bytes" in one_message(capsys.readouterr().err)
    assert tree(tmp_path) == ["f.bin.part", "f.bin.part.json"]
    assert run("url", url, target) == 0
    assert target.read_bytes() == BODY
    assert site.requests[-1] == ("/f.bin", "bytes=1000-")


def test_a_killed_run_continues(site, tmp_path):
    site.files["/B4-4-4H768-ELEC-PT.tar.gz"] = Served(
        tar_gz({"top/model.pt": os.urandom(400_000)}), cuts=[300_000], stall=60
    )
    command = [sys.executable, ROOT / "data-scripts" / "fetch.py", "ckpts", "--names", "B4-4-4H768", "--kinds", "PT"]
    part = tmp_path / "pretrained" / "B4-4-4H768-ELEC-PT.download" / "B4-4-4H768-ELEC-PT.tar.gz.part"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size > 200_000) and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        process.kill()
    have = part.stat().st_size
    assert have > 200_000
    site.stop.set()
    assert run("ckpts", tmp_path / "pretrained", "--names", "B4-4-4H768", "--kinds", "PT") == 0
    assert site.requests[-1][1] == f"bytes={have}-"
    assert tree(tmp_path) == ["pretrained/B4-4-4H768-ELEC-PT/model.pt"]


def test_a_complete_part_is_used_without_a_request(site, tmp_path):
    url = f"{site.url}/f.bin"
    (tmp_path / "f.bin.part").write_bytes(BODY)
    (tmp_path / "f.bin.part.json").write_text(f'{{"url": "{url}", "size": {len(BODY)}, "validator": ""}}')
    assert run("url", url, tmp_path / "f.bin") == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert site.requests == []


@pytest.mark.parametrize("facts", [None, "", '{"url": "http://elsewhere/f.bin", "size": 9}', "[]"])
def test_a_part_of_unknown_origin_is_not_continued(site, tmp_path, facts):
    site.files["/f.bin"] = Served(BODY)
    (tmp_path / "f.bin.part").write_bytes(b"something else")
    if facts is not None:
        (tmp_path / "f.bin.part.json").write_text(facts)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert site.requests == [("/f.bin", "")]


def test_a_server_that_ignores_range(site, tmp_path):
    site.files["/f.bin"] = Served(BODY, ranges=False, cuts=[1000])
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert site.requests == [("/f.bin", ""), ("/f.bin", "bytes=1000-")]


def test_a_server_that_ignores_range_and_always_cuts_is_given_up(site, tmp_path, capsys):
    site.files["/f.bin"] = Served(BODY, ranges=False, cuts=[1000] * 99)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin", "--attempts", 3) == 1
    assert "attempt 3 of 3 without progress" in one_message(capsys.readouterr().err)


def test_a_server_that_answers_with_another_range(site, tmp_path):
    site.files["/f.bin"] = Served(BODY, cuts=[1000], shift=7)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert [asked for _, asked in site.requests] == ["", "bytes=1000-", ""]


UNVALIDATED = {"if_range": False, "etag": ""}


@pytest.mark.parametrize(
    ("new", "before", "after"),
    [
        (BODY[::-1], {}, {"etag": '"two"'}),
        (BODY[::-1] + b"longer", UNVALIDATED, UNVALIDATED),
        (b"shorter", UNVALIDATED, UNVALIDATED),
    ],
    ids=["seen by ETag", "seen by size", "part longer than the file"],
)
def test_a_file_that_changes_between_runs(site, tmp_path, new, before, after):
    url, target = f"{site.url}/f.bin", tmp_path / "f.bin"
    site.files["/f.bin"] = Served(BODY, cuts=[1000], **before)
    assert run("url", url, target, "--attempts", 1) == 1
    site.files["/f.bin"] = Served(new, **after)
    assert run("url", url, target) == 0
    assert target.read_bytes() == new


def test_size_mismatch(site, tmp_path, capsys):
    site.files["/f.bin"] = Served(b"x" * 1000, claim=2000)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 1
    message = one_message(capsys.readouterr().err)
    assert f"{site.url}/f.bin" in message
    assert not (tmp_path / "f.bin").exists()


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_final(site, tmp_path, capsys, status):
    site.files["/f.bin"] = Served(BODY, errors=[status])
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 1
    message = one_message(capsys.readouterr().err)
    assert f"{site.url}/f.bin could not be downloaded: the server answered {status}" in message
    assert len(site.requests) == 1
    assert tree(tmp_path) == []


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.files["/f.bin"] = Served(BODY, errors=[503, 429, 500])
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin") == 0
    assert site.waits == [1, 2, 4]


def test_a_silent_server_is_given_up(site, tmp_path, capsys):
    site.files["/f.bin"] = Served(BODY, cuts=[10], stall=60)
    assert run("url", f"{site.url}/f.bin", tmp_path / "f.bin", "--attempts", 1, "--timeout", 0.1) == 1
    assert "timed out" in one_message(capsys.readouterr().err)


def test_no_server(site, tmp_path, capsys):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/f.bin"
        assert run("url", url, tmp_path / "f.bin", "--attempts", 2) == 1
    assert "no connection" in one_message(capsys.readouterr().err)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "f.bin", "http://host", "http://host/..", "http://h:x/f", "http://h/a b"]
)
def test_an_address_that_is_none(site, tmp_path, capsys, url):
    assert run("url", url, tmp_path / "f.bin") == 1
    one_message(capsys.readouterr().err)
    assert site.waits == []


def test_wrong_sha256(site, tmp_path, capsys):
    site.files["/f.bin"] = Served(BODY)
    wanted = hashlib.sha256(b"other").hexdigest()
    arguments = ("url", f"{site.url}/f.bin", tmp_path / "f.bin", "--sha256", wanted)
    assert run(*arguments) == 1
    assert wanted in one_message(capsys.readouterr().err)
    assert tree(tmp_path) == ["f.bin.bad"]
    site.files["/f.bin"] = Served(b"other")
    assert run(*arguments) == 0
    assert (tmp_path / "f.bin").read_bytes() == b"other"


# --- archives -------------------------------------------------------------------------------------------------------

GOOD = {"top/a.txt": b"a", "top/sub/b.txt": b"b" * 5000}


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.zip"])
@pytest.mark.parametrize("strip", [True, False])
def test_unpacking(site, tmp_path, name, strip):
    site.files[f"/{name}"] = Served(zipped(GOOD) if name.endswith("zip") else tar_gz(GOOD))
    options = ["--strip-top"] if strip else []
    assert run("url", f"{site.url}/{name}", tmp_path / "out", "--extract", *options) == 0
    assert tree(tmp_path) == (["out/a.txt", "out/sub/b.txt"] if strip else ["out/top/a.txt", "out/top/sub/b.txt"])


def test_strip_top_leaves_a_flat_archive_flat(site, tmp_path):
    site.files["/x.zip"] = Served(zipped({"a.txt": b"", "top/b.txt": b""}))
    assert run("url", f"{site.url}/x.zip", tmp_path / "out", "--extract", "--strip-top") == 0
    assert tree(tmp_path) == ["out/a.txt", "out/top/b.txt"]


def flipped(body, at):
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]


SOUND_TAR = tar_gz({"top/a.bin": os.urandom(50_000)})
SOUND_ZIP = zipped({"top/a.bin": os.urandom(50_000)})
DAMAGED = {
    "tar cut": ("x.tar.gz", SOUND_TAR[:30_000]),
    "tar cut in its last bytes": ("x.tar.gz", SOUND_TAR[:-4]),
    "tar flipped": ("x.tar.gz", flipped(SOUND_TAR, 30_000)),
    "tar flipped checksum": ("x.tar.gz", flipped(SOUND_TAR, len(SOUND_TAR) - 6)),
    "tar empty": ("x.tar.gz", gzip.compress(b"")),
    "tar without members": ("x.tar.gz", gzip.compress(bytes(10240))),
    "not a tar": ("x.tar.gz", gzip.compress(b"no tar" * 1000)),
    "zip cut": ("x.zip", SOUND_ZIP[:30_000]),
    "zip flipped": ("x.zip", flipped(SOUND_ZIP, 30_000)),
    "a web page": ("x.zip", b"<!DOCTYPE html><title>Please log in</title>"),
    "empty": ("x.zip", b""),
}


@pytest.mark.parametrize(("name", "body"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_moved_aside_and_downloaded_anew(site, tmp_path, capsys, name, body):
    site.files[f"/{name}"] = Served(body)
    arguments = ("url", f"{site.url}/{name}", tmp_path / "out", "--extract")
    assert run(*arguments) == 1
    message = one_message(capsys.readouterr().err)
    assert f"{site.url}/{name}" in message
    assert "moved aside" in message
    assert tree(tmp_path) == [f"out.download/{name}.bad"]
    site.files[f"/{name}"] = Served(SOUND_ZIP if name == "x.zip" else SOUND_TAR)
    assert run(*arguments) == 0
    assert tree(tmp_path) == ["out/top/a.bin"]


LINK = stat.S_IFLNK | 0o777
HOSTILE = {
    "tar up": tar_gz({"ok": b"", "../evil": b"x"}),
    "tar up inside": tar_gz({"ok": b"", "a/../../evil": b"x"}),
    "tar absolute": tar_gz({"ok": b"", "{tmp}/evil": b"x"}),
    "tar drive": tar_gz({"ok": b"", "C:\\evil": b"x"}),
    "tar symlink out": tar_gz({"ok": b""}, special("evil", tarfile.SYMTYPE, "../..")),
    "tar symlink absolute": tar_gz({"ok": b""}, special("evil", tarfile.SYMTYPE, "/etc")),
    "tar symlink inside": tar_gz({"ok": b""}, special("evil", tarfile.SYMTYPE, "ok")),
    "tar hard link out": tar_gz({"ok": b""}, special("evil", tarfile.LNKTYPE, "../../bystander")),
    "tar fifo": tar_gz({"ok": b""}, special("evil", tarfile.FIFOTYPE)),
    "tar device": tar_gz({"ok": b""}, special("evil", tarfile.CHRTYPE)),
    "zip up": zipped({"ok": b"", "../evil": b"x"}),
    "zip up backslash": zipped({"ok": b"", "..\\evil": b"x"}),
    "zip absolute": zipped({"ok": b"", "/evil": b"x"}),
    "zip drive": zipped({"ok": b"", "C:/evil": b"x"}),
    "zip symlink": zipped({"evil": b"../.."}, mode=LINK),
    "zip device": zipped({"evil": b""}, mode=stat.S_IFCHR | 0o600),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused(site, tmp_path, capsys, name):
    body = HOSTILE[name]
    if name == "tar absolute":
        body = tar_gz({"ok": b"", f"{tmp_path}/evil": b"x"})
    file = "x.zip" if name.startswith("zip") else "x.tar.gz"
    site.files[f"/{file}"] = Served(body)
    (tmp_path / "bystander").write_text("mine")
    assert run("url", f"{site.url}/{file}", tmp_path / "in" / "out", "--extract", "--strip-top") == 1
    assert "is refused" in one_message(capsys.readouterr().err)
    assert tree(tmp_path) == ["bystander", f"in/out.download/{file}.bad"]
    assert not Path("/evil").exists()


def test_a_hard_link_inside_is_kept(site, tmp_path):
    site.files["/x.tgz"] = Served(tar_gz({"top/a": b"1"}, special("top/b", tarfile.LNKTYPE, "top/a")))
    assert run("url", f"{site.url}/x.tgz", tmp_path / "out", "--extract", "--strip-top") == 0
    assert (tmp_path / "out" / "b").read_bytes() == b"1"


def test_an_encrypted_zip_is_refused(site, tmp_path, capsys):
    body = bytearray(zipped({"a": b"x"}))
    body[body.index(b"PK\x01\x02") + 8] |= 1
    site.files["/x.zip"] = Served(bytes(body))
    assert run("url", f"{site.url}/x.zip", tmp_path / "out", "--extract") == 1
    assert "encrypted" in one_message(capsys.readouterr().err)


# --- folders --------------------------------------------------------------------------------------------------------


def serve_ckpts(site):
    for name in fetch.CKPTS:
        site.files[f"/{name}.tar.gz"] = Served(tar_gz({f"{name}/model.ckpt.pt": name.encode()}))


def test_all_checkpoints_then_nothing_more(site, tmp_path):
    serve_ckpts(site)
    first = run_script("ckpts", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert tree(tmp_path) == sorted(f"pretrained/{name}/model.ckpt.pt" for name in fetch.CKPTS)
    assert len(site.requests) == 15
    second = run_script("ckpts", cwd=tmp_path)
    assert second.returncode == 0
    assert second.stderr.count("already there") == 15
    assert len(site.requests) == 15


def test_checkpoint_filters(site, tmp_path):
    serve_ckpts(site)
    filters = ("--names", "b6-6-6h768", "B8-8-8H1024", "--kinds", "PT", "full-tf")
    assert run_script("ckpts", "my ckpts", *filters, cwd=tmp_path).returncode == 0
    assert [path.name for path in sorted((tmp_path / "my ckpts").iterdir())] == [
        "B6-6-6H768-ELEC-FULL-TF",
        "B6-6-6H768-ELEC-PT",
        "B8-8-8H1024-ELEC-FULL-TF",
        "B8-8-8H1024-ELEC-PT",
    ]


def test_one_failure_does_not_stop_the_others(site, tmp_path):
    serve_ckpts(site)
    del site.files["/B4-4-4H768-ELEC-PT.tar.gz"]
    site.files["/B6-6-6H768-ELEC-PT.tar.gz"] = Served(b"not an archive")
    done = run_script("ckpts", "--kinds", "PT", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "2 of 5 failed: B4-4-4H768-ELEC-PT B6-6-6H768-ELEC-PT"
    assert "Traceback" not in done.stderr
    assert len(tree(tmp_path / "pretrained")) == 3 + 1  # and the archive that was moved aside
    serve_ckpts(site)
    assert run_script("ckpts", "--kinds", "PT", cwd=tmp_path).returncode == 0
    assert len(tree(tmp_path / "pretrained")) == 5


@pytest.mark.parametrize("option", ["--list", "--dry-run"])
def test_dry_run(tmp_path, option):
    done = run_script("ckpts", option, cwd=tmp_path, FUNNEL_CKPT_URL="")
    base = "http://storage.googleapis.com/funnel-transformer/funnel_ckpts_all"
    assert done.stdout.splitlines() == [
        f"{base}/{name}-ELEC-{kind}.tar.gz -> pretrained/{name}-ELEC-{kind}"
        for name in ("B4-4-4H768", "B6-3x2-3x2H768", "B6-6-6H768", "B8-8-8H1024", "B10-10-10H1024")
        for kind in ("PT", "TF", "FULL-TF")
    ]
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_nobody_reads_to_its_end(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "data-scripts" / "fetch.py", "ckpts", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_addresses_of_the_data_sets(tmp_path, monkeypatch):
    for base in fetch.BASES:
        monkeypatch.delenv(base, raising=False)
    lines = [
        line for name in ("glue", "textcls") for line in run_script(name, "--list", cwd=tmp_path).stdout.split("\n")
    ]
    addresses = dict(reversed(line.split(" -> ")) for line in lines if line)
    glue, fast = "https://dl.fbaipublicfiles.com/glue/data", "https://s3.amazonaws.com/fast-ai-nlp"
    assert addresses == {
        "data/glue/CoLA": f"{glue}/CoLA.zip",
        "data/glue/SST-2": f"{glue}/SST-2.zip",
        "data/glue/MRPC": f"{glue}/mrpc_dev_ids.tsv",  # the last of its three
        "data/glue/QQP": f"{glue}/QQP-clean.zip",
        "data/glue/STS-B": f"{glue}/STS-B.zip",
        "data/glue/MNLI": f"{glue}/MNLI.zip",
        "data/glue/QNLI": f"{glue}/QNLIv2.zip",
        "data/glue/RTE": f"{glue}/RTE.zip",
        "data/glue/WNLI": f"{glue}/WNLI.zip",
        "data/glue/AX": f"{glue}/AX.tsv",
        "data/textcls/IMDB": "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        "data/textcls/AG": f"{fast}/ag_news_csv.tgz",
        "data/textcls/DBpedia": f"{fast}/dbpedia_csv.tgz",
        "data/textcls/Yelp-2": f"{fast}/yelp_review_polarity_csv.tgz",
        "data/textcls/Yelp-5": f"{fast}/yelp_review_full_csv.tgz",
        "data/textcls/Amazon-2": f"{fast}/amazon_review_polarity_csv.tgz",
        "data/textcls/Amazon-5": f"{fast}/amazon_review_full_csv.tgz",
    }
    senteval = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase"
    assert {f"{senteval}_{split}.txt -> data/glue/MRPC" for split in ("train", "test")} < set(lines)


MRPC_TRAIN = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t10\t11\tHe said "no .\tHe said no .\r\n'
    "0\t20\t21\tCaf\u00e9\u2028open .\tCaf\u00e9 shut .\r\n"
    "1\t30\t31\tc \td\r\n"
)
MRPC_TEST = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t40\t41\te\tf\n0\t50\t51\tg\th\n"


def serve_mrpc(site, train=MRPC_TRAIN, test=MRPC_TEST, dev_ids="20\t21\n"):
    for path, text in zip(fetch.MRPC_FILES, (train, test, dev_ids), strict=True):
        site.files[f"/{path}"] = Served(text.encode())


def test_mrpc(site, tmp_path):
    serve_mrpc(site)
    assert run_script("glue", "mrpc", cwd=tmp_path).returncode == 0
    folder = tmp_path / "data" / "glue" / "MRPC"
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    wanted = {
        "train.tsv": header + '1\t10\t11\tHe said "no .\tHe said no .\n1\t30\t31\tc \td\n',
        "dev.tsv": header + "0\t20\t21\tCaf\u00e9\u2028open .\tCaf\u00e9 shut .\n",
        "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t40\t41\te\tf\n1\t50\t51\tg\th\n",
    }
    assert {name: (folder / name).read_bytes().decode() for name in wanted} == wanted
    sources = {"msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"}
    assert {path.name for path in folder.iterdir()} == sources | set(wanted)
    assert len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"train": MRPC_TRAIN + "1\t2\t3\tonly four\n"}, "msr_paraphrase_train.txt, line 5: expected 5 columns, got 4"),
        ({"dev_ids": "20\t21\n98\t99\n"}, "lists 2 pairs, of which 1 are not in"),
        ({"dev_ids": ""}, "lists 0 pairs"),
        ({"test": "<html>"}, "msr_paraphrase_test.txt, line 1"),
    ],
)
def test_mrpc_that_cannot_be_converted(site, tmp_path, capsys, broken, message):
    serve_mrpc(site, **broken)
    assert run("glue", "MRPC", "--dest", tmp_path) == 1
    assert message in one_message(capsys.readouterr().err)
    assert not (tmp_path / "MRPC").exists()
    serve_mrpc(site)
    assert run("glue", "MRPC", "--dest", tmp_path) == 0


def test_glue_layout(site, tmp_path):
    """Whatever the folder in the archive is called, and whatever macOS put beside it."""
    tops = {"QQP": "QQP-clean/", "QNLI": "QNLIv2/", "RTE": ""}
    for task, row in fetch.GLUE.items():
        top = tops.get(task, f"{task}/")
        names = [f"{top}{name}" for name in (*row.expect, "original/raw.txt")]
        litter = ["__MACOSX/._x", f"{top}.DS_Store", f"{top}Icon\r"]
        site.files[f"/{row.files[0]}"] = Served(zipped(dict.fromkeys(names + litter, b"")))
    site.files["/glue/data/AX.tsv"] = Served(b"index\tsentence1\tsentence2\n")
    serve_mrpc(site)
    done = run_script("glue", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = {path.name: {file.name for file in path.iterdir()} for path in (tmp_path / "data" / "glue").iterdir()}
    assert set(folders) == {"CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI", "AX"}
    for task in ("CoLA", "QQP", "QNLI", "RTE"):
        assert folders[task] == {"train.tsv", "dev.tsv", "test.tsv", "original"}
    assert {"dev_matched.tsv", "test_mismatched.tsv"} < folders["MNLI"]
    assert folders["AX"] == {"AX.tsv"}


def test_textcls_layout(site, tmp_path):
    files = {f"ag_news_csv/{name}": b"" for name in ("train.csv", "test.csv", "classes.txt")}
    site.files["/ag_news_csv.tgz"] = Served(tar_gz(files))
    imdb = {"aclImdb/train/pos/0_9.txt": b"good", "aclImdb/test/neg/0_2.txt": b"bad", "aclImdb/README": b""}
    site.files["/aclImdb_v1.tar.gz"] = Served(tar_gz(imdb))
    assert run_script("textcls", "AG", "imdb", "--dest", "sets", cwd=tmp_path).returncode == 0
    assert tree(tmp_path / "sets" / "AG") == ["classes.txt", "test.csv", "train.csv"]
    assert tree(tmp_path / "sets" / "IMDB") == ["README", "test/neg/0_2.txt", "train/pos/0_9.txt"]


def test_an_archive_without_what_is_needed(site, tmp_path, capsys):
    site.files["/glue/data/RTE.zip"] = Served(zipped({"RTE/train.tsv": b""}))
    assert run("glue", "RTE", "--dest", tmp_path) == 1
    assert "RTE.zip does not hold dev.tsv, test.tsv" in one_message(capsys.readouterr().err)
    assert tree(tmp_path) == ["RTE.download/RTE.zip.bad"]


def test_what_a_killed_run_left_is_not_mixed_in(site, tmp_path):
    site.files["/glue/data/RTE.zip"] = Served(zipped({f"RTE/{name}": b"" for name in fetch.GLUE_SPLITS}))
    (tmp_path / "RTE.unpack" / "RTE").mkdir(parents=True)
    (tmp_path / "RTE.unpack" / "RTE" / "half").write_text("old")
    (tmp_path / "RTE").mkdir()  # empty: no more than a wish
    assert run("glue", "RTE", "--dest", tmp_path) == 0
    assert tree(tmp_path) == ["RTE/dev.tsv", "RTE/test.tsv", "RTE/train.tsv"]


def test_a_folder_of_the_users_is_left_alone(site, tmp_path, capsys):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text("mine")
    (tmp_path / "AX").write_text("a file")
    assert run("glue", "RTE", "AX", "--dest", tmp_path) == 1
    text = capsys.readouterr().err
    assert "does not hold dev.tsv, test.tsv" in text
    assert "is to be a folder" in text
    assert tree(tmp_path) == ["AX", "RTE/train.tsv"]
    assert site.requests == []


def test_two_runs_at_once(site, tmp_path, capsys):
    with fetch.only_one(tmp_path / "RTE"):
        assert run("glue", "RTE", "--dest", tmp_path) == 1
    assert "another run" in one_message(capsys.readouterr().err)
    assert site.requests == []


def test_a_place_that_cannot_be_written(site, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("glue", "RTE", "--dest", tmp_path / "file") == 1
    assert "RTE could not be written" in one_message(capsys.readouterr().err)


# --- the scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path):
    script = SCRIPTS[name]
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    done = run_script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script.name}")
    assert "FUNNEL_" in done.stdout


@pytest.mark.parametrize(("name", "wrong"), [("ckpts", ["--kinds", "JAX"]), ("glue", ["SQuAD"]), ("textcls", ["--x"])])
def test_a_wrong_word_is_a_usage_error(name, wrong, tmp_path):
    done = run_script(name, *wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert wrong[-1] in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--strip-top"], ["--extract", "--sha256", "00"], ["--attempts", "0"]])
def test_options_that_do_not_go_together(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("url", "http://127.0.0.1/x.zip", tmp_path / "out", *wrong)
    assert "usage:" in capsys.readouterr().err
