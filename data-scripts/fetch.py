#!/usr/bin/env python3
"""Download checkpoints and data sets. One long file, so that it can be copied and run alone: standard library only.

The way of one item (a folder that is wanted), each arrow done once:

    URL -> NAME.download/FILE.zip.part -> NAME.download/FILE.zip -> NAME.unpack/ -> NAME/

The last arrow is one rename, so a folder that is there is complete, and a killed run leaves nothing half-done: the
next one continues the .part, and empties NAME.unpack before it uses it. When NAME/ is there, the other two go.
The three download scripts are doorsteps to this file. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import urlsplit

BLOCK = 1 << 18
JUNK = {"__MACOSX", ".DS_Store", "Icon\r"}  # what macOS adds to archives; "._*" is junk too


class FetchError(Exception):
    """For the person at the keyboard: one paragraph, what failed and what to do. Printed without a traceback."""


class BadData(FetchError):
    """The bytes arrived but cannot be used; the files are moved aside, so that the next run downloads them anew."""


class Transient(Exception):
    """This attempt failed, the next one may not."""


@dataclass(frozen=True)
class Net:
    """How patient to be with the network."""

    attempts: int = 5
    """Attempts in a row without a new byte before giving up."""
    timeout: float = 30.0
    """Seconds without an answer until an attempt counts as failed."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubles each time."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def beside(path: Path, suffix: str) -> Path:
    """`glue/CoLA` -> `glue/CoLA.unpack`."""
    return path.with_name(path.name + suffix)


# --- one file -------------------------------------------------------------------------------------------------------


def download(url: str, path: Path, net: Net, sha256: str = "") -> None:
    """Fetch `url` into `path`, through `path.part`, which an earlier run may have begun."""
    part, facts = beside(path, ".part"), beside(path, ".part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, furthest = 0, size_of(part)
    while True:
        try:
            transfer(url, part, facts, net.timeout)
            break
        except Transient as error:
            failures = 1 if size_of(part) > furthest else failures + 1
            furthest = max(furthest, size_of(part))
            if failures >= net.attempts:
                raise FetchError(
                    f"{url} could not be downloaded: {error} (attempt {failures} of {net.attempts} without progress). "
                    f"Check the connection and the address, then run the same command again; it continues where it "
                    f"stopped."
                ) from error
            wait = net.backoff * 2 ** (failures - 1)
            say(f"{path.name}: {error}; trying again in {wait:g} s")
            time.sleep(wait)
    found = digest(part) if sha256 else ""
    if found != sha256.lower():
        facts.unlink(missing_ok=True)
        raise BadData(
            f"{url} has sha256 {found}, expected {sha256.lower()}. The file is now {set_aside(part, path).name}; "
            f"run the same command again to download it anew, and if the sum differs again, do not trust the address."
        )
    part.replace(path)
    facts.unlink(missing_ok=True)


def transfer(url: str, part: Path, facts: Path, timeout: float) -> None:
    """One request for all of the file, or for what `part` lacks. Returns when `part` is complete."""
    known = read_facts(facts)
    have = size_of(part) if known.get("url") == url else 0
    if have and have == known.get("size"):
        return
    headers = {"User-Agent": "funneltfm-fetch", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.get("validator"):
            headers["If-Range"] = known["validator"]  # a file that has changed comes whole, with status 200
    with ask(urllib.request.Request(url, headers=headers), timeout, part) as response:
        start, size = extent(response)
        resumed = response.status == 206
        if resumed and (start != have or (have and size != known.get("size"))):
            part.unlink(missing_ok=True)
            raise Transient("the server answered with another part of the file, or the file has changed there")
        if have and not resumed:
            say(f"{part.stem}: the server sends the file from its beginning")
        with part.open("ab" if have and resumed else "wb") as out:  # emptied first: new facts never describe old bytes
            facts.write_text(json.dumps({"url": url, "size": size, "validator": validator(response)}), encoding="utf-8")
            with contextlib.closing(Progress(part.stem, start, size)) as progress:
                for block in blocks(response):
                    out.write(block)
                    progress.add(len(block))
    if size is not None and size_of(part) != size:
        raise Transient(f"got {size_of(part):,} of {size:,} bytes")


def ask(request: urllib.request.Request, timeout: float, part: Path) -> http.client.HTTPResponse:
    """Send the request; turn what can go wrong into Transient (worth another attempt) or FetchError (not)."""
    url = request.full_url
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # our part is longer than the file: it belongs to another version
            part.unlink(missing_ok=True)
            raise Transient("the file has become shorter on the server") from error
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Transient(f"the server answered {error.code} {error.reason}") from error
        raise FetchError(
            f"{url} could not be downloaded: the server answered {error.code} {error.reason}. The address may have "
            f"moved; --help names the environment variable that gives another one."
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(
                f"{url} could not be downloaded: its certificate cannot be verified ({error.reason.verify_message}). "
                f"Install or update the system's certificates (package ca-certificates)."
            ) from error
        raise Transient(f"no connection ({error.reason})") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise FetchError(f"{url!r} is not an address that can be asked for: {error}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise Transient(f"no answer ({str(error) or type(error).__name__})") from error
    if response.status not in (200, 206):
        response.close()
        raise FetchError(f"{url} could not be downloaded: unexpected answer {response.status} {response.reason}.")
    return response


def blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body; errors of the network (and only those: writing is the caller's) become Transient."""
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise Transient(f"the connection broke ({str(error) or type(error).__name__})") from error
        if not block:
            return
        yield block


def extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts in the file (-1: not said), and the size of the whole file (None: not said)."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not found:
            return -1, None
        first, last, total = found.groups()
        return int(first), int(last) + 1 if total == "*" else int(total)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def validator(response: http.client.HTTPResponse) -> str:
    """What If-Range may be given (RFC 9110, 13.1.5): a strong ETag, else the date, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def read_facts(facts: Path) -> dict:
    try:
        known = json.loads(facts.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not begun, or killed while writing: begin anew
        return {}
    return known if isinstance(known, dict) else {}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path, name: Path | None = None) -> Path:
    return path.replace(beside(name or path, ".bad"))


class Progress:
    """A line on stderr: rewritten in place on a terminal, once in half a minute in a log."""

    def __init__(self, name: str, done: int, size: int | None):
        self.name, self.first, self.done, self.size = name, done, done, size
        self.live = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.shown > (0.2 if self.live else 30):
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        rate = (self.done - self.first) / max(self.shown - self.began, 1e-3)
        of = f" of {self.size / 1e6:.1f} MB, {100 * self.done / self.size:.0f} %" if self.size else " MB"
        text = f"{self.name}: {self.done / 1e6:.1f}{of}, {rate / 1e6:.1f} MB/s"
        print(f"\r{text:<78}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.show()
        if self.live:
            say("")


# --- archives: only plain files and folders, only inside the folder -----------------------------------------------


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar.gz (told apart by content) into the empty `folder`; raise BadData if it cannot be used."""
    with archive.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        extract = unpack_zip
    elif head.startswith(b"\x1f\x8b"):
        extract = unpack_tar_gz
    else:
        raise BadData(f"{archive.name} is neither a zip nor a tar.gz archive (it begins with {head[:16]!r})")
    try:
        extract(archive, folder)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise BadData(f"{archive.name} is damaged ({error})") from error
    except NotImplementedError as error:  # zip with a compression method that Python does not know
        raise BadData(f"{archive.name} cannot be unpacked ({error})") from error
    if not any(folder.iterdir()):
        raise BadData(f"{archive.name} holds no files")


def unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        for info in bundle.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0: written on a system without file kinds
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise BadData(f"{archive.name} is refused: {info.filename!r} is a link or a device")
            if info.flag_bits & 1:
                raise BadData(f"{archive.name} is refused: {info.filename!r} is encrypted")
            if wanted(info.filename, archive):
                bundle.extract(info, folder)


def unpack_tar_gz(archive: Path, folder: Path) -> None:
    def members(bundle: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in bundle:
            # Symbolic links are refused even when they stay inside: filter="data" of older Pythons can be led out
            # through chains of them (CVE-2025-4517). Hard links to a safe name are only a second name.
            if not (member.isreg() or member.isdir() or (member.islnk() and wanted(member.linkname, archive))):
                raise BadData(f"{archive.name} is refused: {member.name!r} is a link or a device")
            if wanted(member.name, archive):
                yield member

    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as bundle:
            bundle.extractall(folder, members=members(bundle), filter="data")
        while stream.read(BLOCK):  # tarfile takes a broken header for the end; reading on checks length and CRC
            pass


def wanted(name: str, archive: Path) -> bool:
    """Refuse a name that leads out of the folder; tell whether it is more than macOS' litter."""
    path = PureWindowsPath(name)  # knows both separators, and drives
    if path.anchor or ".." in path.parts:
        raise BadData(f"{archive.name} is refused: {name!r} leads out of the folder")
    return not any(part in JUNK or part.startswith("._") for part in PurePosixPath(name).parts)


# --- builders: the files that were downloaded -> the folder to keep, made inside `work` -----------------------------


def archive_as_is(files: list[Path], work: Path) -> Path:
    unpack(files[0], work)
    return work


def archive_without_top(files: list[Path], work: Path) -> Path:
    """The one folder everything lies in (CoLA/, QQP-clean/, ag_news_csv/ ...), else all."""
    unpack(files[0], work)
    inside = list(work.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else work


def plain_files(files: list[Path], work: Path) -> Path:
    for file in files:
        shutil.copyfile(file, work / file.name)
    return work


MRPC_COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def mrpc(files: list[Path], work: Path) -> Path:
    """SentEval's two files and GLUE's list of dev pairs -> GLUE's train.tsv, dev.tsv, test.tsv; the sources stay."""
    train_txt, test_txt, dev_ids = files
    for file, name in zip(files, (train_txt.name, test_txt.name, "dev_ids.tsv"), strict=True):  # GLUE's name for it
        shutil.copyfile(file, work / name)
    dev_pairs = {tuple(row) for row in tsv(dev_ids, 2) if row[0].isdigit()}
    rows = list(tsv(train_txt, len(MRPC_COLUMNS)))[1:]
    missing = len(dev_pairs - {(row[1], row[2]) for row in rows})
    if missing or not dev_pairs:
        raise BadData(f"{dev_ids.name} lists {len(dev_pairs)} pairs, of which {missing} are not in {train_txt.name}")
    write_tsv(work / "train.tsv", [MRPC_COLUMNS, *(row for row in rows if (row[1], row[2]) not in dev_pairs)])
    write_tsv(work / "dev.tsv", [MRPC_COLUMNS, *(row for row in rows if (row[1], row[2]) in dev_pairs)])
    test = list(tsv(test_txt, len(MRPC_COLUMNS)))[1:]
    numbered = ((str(index), *row[1:]) for index, row in enumerate(test))
    write_tsv(work / "test.tsv", [("index", *MRPC_COLUMNS[1:]), *numbered])
    return work


def tsv(path: Path, columns: int) -> Iterator[list[str]]:
    """Rows as they stand: quotes are text in these files, and only a newline ends a row."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\r\n").split("\t")
                if len(row) != columns:
                    raise BadData(f"{path.name}, line {number}: expected {columns} columns, got {len(row)}")
                yield row
        except UnicodeDecodeError as error:
            raise BadData(f"{path.name} is not UTF-8 text ({error})") from error


def write_tsv(path: Path, rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(row) + "\n" for row in rows)


# --- items ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A folder that is wanted."""

    dest: Path
    urls: tuple[str, ...]
    build: Callable[[list[Path], Path], Path]
    expect: tuple[str, ...] = ()
    """Names that the folder must hold to be of use."""


def obtain(item: Item, net: Net) -> None:
    """Have `item.dest`, complete. A folder of that name which was there before is never changed."""
    dest = item.dest
    stage, work = beside(dest, ".download"), beside(dest, ".unpack")
    if is_there(item):
        clear(stage, work)
        say(f"{dest}: already there")
        return
    files = [stage / file_name(url) for url in item.urls]
    stage.mkdir(parents=True, exist_ok=True)
    with only_one(dest):
        try:
            for url, file in zip(item.urls, files, strict=True):
                if not file.exists():
                    download(url, file, net)
            clear(work)
            work.mkdir()
            built = item.build(files, work)
            missing = [name for name in item.expect if not (built / name).exists()]
            if missing:
                raise BadData(f"{files[0].name} does not hold {', '.join(missing)}")
            built.rename(dest)
            clear(stage)
        except BadData as error:
            for file in files:
                set_aside(file)
            raise BadData(
                f"{dest} could not be made from {item.urls[0]}: {error}. What was downloaded is moved aside, to "
                f"{stage}/*.bad; run the same command again to download anew."
            ) from error
        finally:
            clear(work)
            with contextlib.suppress(OSError):
                stage.rmdir()  # empty: nothing came
    say(f"{dest}: ready")


def clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def is_there(item: Item) -> bool:
    if not item.dest.exists():
        return False
    if not item.dest.is_dir():
        raise FetchError(f"{item.dest} is to be a folder, but a file of that name is there. Move it away.")
    held = {path.name for path in item.dest.iterdir()}
    missing = [name for name in item.expect if name not in held]
    if held and missing:
        raise FetchError(
            f"{item.dest} is there, not made by this script, and does not hold {', '.join(missing)}. Move it away, "
            f"then run the same command again."
        )
    return bool(held)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One run at a time works on `path`; the lock goes with the process, however that ends."""
    lock = beside(path, ".lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = os.fstat(handle).st_nlink == 0  # removed by the run that held it
        except BlockingIOError:
            busy = True
        except OSError:  # a file system without locks (some NFS and Lustre mounts)
            busy = False
        if busy:
            raise FetchError(f"{path} is being made by another run at this moment. Wait for it, then run this again.")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def file_name(url: str) -> str:
    name = PurePosixPath(urlsplit(url).path).name
    if urlsplit(url).scheme not in ("http", "https") or name in ("", ".."):
        raise FetchError(f"expected the http:// or https:// address of a file, got {url!r}.")
    return name


# --- what there is --------------------------------------------------------------------------------------------------

BASES = {
    "FUNNEL_CKPT_URL": "http://storage.googleapis.com/funnel-transformer/funnel_ckpts_all",
    "FUNNEL_GLUE_URL": "https://dl.fbaipublicfiles.com",
    "FUNNEL_TEXTCLS_URL": "https://s3.amazonaws.com/fast-ai-nlp",
    "FUNNEL_IMDB_URL": "http://ai.stanford.edu/~amaas/data/sentiment",
}


@dataclass(frozen=True)
class Row:
    """A line of a table: files below a base address (a key of BASES), and how they become a folder."""

    base: str
    files: tuple[str, ...]
    expect: tuple[str, ...] = ()
    build: Callable[[list[Path], Path], Path] = archive_without_top

    def item(self, dest: Path) -> Item:
        base = (os.environ.get(self.base) or BASES[self.base]).rstrip("/")
        return Item(dest, tuple(f"{base}/{file}" for file in self.files), self.build, self.expect)


GLUE_SPLITS = ("train.tsv", "dev.tsv", "test.tsv")
MNLI_SPLITS = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "test_matched.tsv", "test_mismatched.tsv")


def glue(file: str, *expect: str) -> Row:
    return Row("FUNNEL_GLUE_URL", (f"glue/data/{file}",), expect or GLUE_SPLITS)


def textcls(file: str) -> Row:
    return Row("FUNNEL_TEXTCLS_URL", (file,), ("train.csv", "test.csv"))


CKPT_NAMES = ("B4-4-4H768", "B6-3x2-3x2H768", "B6-6-6H768", "B8-8-8H1024", "B10-10-10H1024")
CKPT_KINDS = ("PT", "TF", "FULL-TF")
CKPTS = {
    f"{name}-ELEC-{kind}": Row("FUNNEL_CKPT_URL", (f"{name}-ELEC-{kind}.tar.gz",))
    for name in CKPT_NAMES
    for kind in CKPT_KINDS
}
MRPC_FILES = (
    "senteval/senteval_data/msr_paraphrase_train.txt",
    "senteval/senteval_data/msr_paraphrase_test.txt",
    "glue/data/mrpc_dev_ids.tsv",
)
GLUE = {
    "CoLA": glue("CoLA.zip"),
    "SST-2": glue("SST-2.zip"),
    "MRPC": Row("FUNNEL_GLUE_URL", MRPC_FILES, GLUE_SPLITS, mrpc),
    "QQP": glue("QQP-clean.zip"),
    "STS-B": glue("STS-B.zip"),
    "MNLI": glue("MNLI.zip", *MNLI_SPLITS),
    "QNLI": glue("QNLIv2.zip"),
    "RTE": glue("RTE.zip"),
    "WNLI": glue("WNLI.zip"),
    "AX": Row("FUNNEL_GLUE_URL", ("glue/data/AX.tsv",), ("AX.tsv",), plain_files),
}
TEXTCLS = {
    "IMDB": Row("FUNNEL_IMDB_URL", ("aclImdb_v1.tar.gz",), ("train", "test")),
    "AG": textcls("ag_news_csv.tgz"),
    "DBpedia": textcls("dbpedia_csv.tgz"),
    "Yelp-2": textcls("yelp_review_polarity_csv.tgz"),
    "Yelp-5": textcls("yelp_review_full_csv.tgz"),
    "Amazon-2": textcls("amazon_review_polarity_csv.tgz"),
    "Amazon-5": textcls("amazon_review_full_csv.tgz"),
}


TABLES = {"ckpts": CKPTS, "glue": GLUE, "textcls": TEXTCLS}

# --- the command ----------------------------------------------------------------------------------------------------


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    by_lower = {name.lower(): name for name in names}

    def pick(text: str) -> str:
        if text.lower() not in by_lower:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(by_lower.values())}, got {text!r}")
        return by_lower[text.lower()]

    return pick


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fetch.py", description="Download checkpoints, data sets, or any one file.")
    verbs = top.add_subparsers(dest="verb", required=True)

    def verb(name: str, prog: str, about: str) -> argparse.ArgumentParser:
        bases = dict.fromkeys(row.base for row in TABLES.get(name, {}).values())
        servers = [f"  {base}  now {os.environ.get(base) or BASES[base]}" for base in bases]
        one = verbs.add_parser(
            name,
            prog=prog,
            help=about,
            description=f"{about}\nWhat is there already is left alone; a download that was cut continues.",
            epilog="\n".join(["another server, by environment variable:", *servers]) if servers else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("--list", "--dry-run", action="store_true", help="print URL -> destination, and do nothing")
        one.add_argument(
            "--attempts", type=positive, default=Net.attempts, help="in a row without a new byte (%(default)s)"
        )
        one.add_argument(
            "--timeout", type=positive, default=Net.timeout, help="seconds without an answer (%(default)s)"
        )
        return one

    ckpts = verb("ckpts", "download_all_ckpts.sh", "Download the published checkpoints, a folder for each.")
    ckpts.add_argument(
        "dest", nargs="?", type=Path, default="pretrained", metavar="DIR", help="where to (./%(default)s)"
    )
    for option, values in (("--names", CKPT_NAMES), ("--kinds", CKPT_KINDS)):
        ckpts.add_argument(
            option, nargs="+", type=one_of(values), default=values, metavar="X", help=f"of {' '.join(values)} (all)"
        )
    for name, about in (("glue", "GLUE, a folder for each task."), ("textcls", "text classification sets.")):
        sets = verb(name, f"download_{name}.sh", f"Download {about}")
        sets.add_argument(
            "sets", nargs="*", type=one_of(TABLES[name]), metavar="NAME", help=f"of {' '.join(TABLES[name])} (all)"
        )
        sets.add_argument("--dest", type=Path, default=f"data/{name}", metavar="DIR", help="where to (./%(default)s)")
    url = verb("url", "fetch.py url", "Download one file, or one archive and unpack it.")
    url.add_argument("url", metavar="URL")
    url.add_argument("dest", type=Path, metavar="DEST", help="the file to write; with --extract the folder to make")
    url.add_argument("--extract", action="store_true", help="unpack a .zip, .tar.gz or .tgz into the folder DEST")
    url.add_argument("--strip-top", action="store_true", help="with --extract: without the one folder all lies in")
    url.add_argument("--sha256", default="", metavar="HEX", help="of the file, checked; not with --extract")
    return top


def items(options: argparse.Namespace) -> list[Item]:
    """What the command line asks for, in the order of the tables."""
    if options.verb == "url":
        dest = Path(os.path.abspath(options.dest))  # a name also for "." and ".."
        return [Item(dest, (options.url,), archive_without_top if options.strip_top else archive_as_is)]
    if options.verb == "ckpts":
        chosen = [f"{name}-ELEC-{kind}" for name in options.names for kind in options.kinds]
    else:
        chosen = options.sets
    return [row.item(options.dest / name) for name, row in TABLES[options.verb].items() if name in chosen or not chosen]


def obtain_file(url: str, dest: Path, sha256: str, net: Net) -> None:
    if dest.is_dir():
        raise FetchError(f"{dest} is a folder. Give the name of the file to write, or --extract.")
    file_name(url)  # refuses what is no address
    dest.parent.mkdir(parents=True, exist_ok=True)
    with only_one(dest):
        if dest.exists() and sha256 and digest(dest) != sha256.lower():
            say(f"{dest}: has another sha256, moved to {set_aside(dest)}")
        if dest.exists():
            say(f"{dest}: already there")
            return
        download(url, dest, net, sha256)
    say(f"{dest}: ready")


def run(options: argparse.Namespace) -> int:
    todo = items(options)
    if options.list:
        for item in todo:
            for url in item.urls:
                print(f"{url} -> {item.dest}", flush=True)
        return 0
    net = Net(int(options.attempts), options.timeout)
    failed = []
    for item in todo:
        try:
            if options.verb == "url" and not options.extract:
                obtain_file(item.urls[0], item.dest, options.sha256, net)
            else:
                obtain(item, net)
        except FetchError as error:
            say(f"FAILED: {error}")
            failed.append(item.dest.name)
        except OSError as error:  # the network's are Transient by now: disk full, no permission
            say(
                f"FAILED: {item.dest} could not be written: {error}. Make room or choose another folder, and run again."
            )
            failed.append(item.dest.name)
    if failed and len(todo) > 1:
        say(f"{len(failed)} of {len(todo)} failed: {' '.join(failed)}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    if not hasattr(tarfile, "data_filter") or sys.version_info < (3, 11):
        say(f"Python 3.11.4 or newer is needed, this is {sys.version.split()[0]}. Set PYTHON=/path/to/a/newer/python3.")
        return 1
    command = parser()
    options = command.parse_args(arguments)
    if options.verb == "url" and (options.sha256 if options.extract else options.strip_top):
        command.error("--strip-top goes with --extract, --sha256 without it")
    try:
        return run(options)
    except KeyboardInterrupt:
        say("\nInterrupted. Run the same command again to continue.")
        return 130
    except BrokenPipeError:  # `--list | head`: the reader has gone; Python must not flush into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
