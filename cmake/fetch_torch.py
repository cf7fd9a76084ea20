#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a LibTorch folder out of the pinned wheels of torch_wheels.txt.

Each wheel is taken from a folder where somebody put it, or else from the package index that pip is
configured with; a broken download is continued where it stopped. Whatever its origin, its sha256
must be the pinned one. Needs Python's standard library, and pip only to ask for its configuration.
"""
import argparse
import base64
import fcntl
import hashlib
import html.parser
import http.client
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

# What of the torch wheel a C++ program uses; the nvidia wheels are taken whole.
KEPT = re.compile(r"(torch/(lib|include|share)/|nvidia/|[^/]+\.dist-info/(licenses/|LICENSE|NOTICE))")
ATTEMPTS = 5


class Wheel:
    def __init__(self, line):
        self.torch, self.role, self.project, self.file, self.sha256 = line.split()


class Failure(Exception):
    """Carries a message for the user."""


def read_table(path):
    lines = path.read_text().splitlines()
    return [Wheel(line) for line in lines if line.strip() and not line.startswith("#")]


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PipConfig:
    """pip's own answer to where packages come from: its environment and files, else its default."""

    def __init__(self):
        self.values = {}
        listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if listed.returncode != 0:
            raise Failure("pip, whose configuration names the package index, does not run:\n  "
                          + listed.stderr.strip())
        # The nearest wins: pip prefers its environment to a command's section to the global one.
        for section in ("global", "download", ":env:"):
            for line in listed.stdout.splitlines():
                name, _, value = line.partition("=")
                if name.startswith(section + "."):
                    self.values[name[len(section) + 1:]] = value.strip().strip("'\"")

    def get(self, name, default=None):
        return self.values.get(name) or default

    def flag(self, name):
        return self.get(name, "").lower() in ("1", "true", "yes", "on")

    def words(self, name):
        return self.get(name, "").replace("\\n", " ").split()

    def indexes(self):
        if self.flag("no-index"):
            return []
        first = self.get("index-url")
        if not first:
            from pip._internal.models.index import PyPI  # the default, kept by pip alone
            first = PyPI.simple_url
        return [first] + self.words("extra-index-url")

    def folders(self):
        links = [link[7:] if link.startswith("file://") else link for link in self.words("find-links")]
        return [pathlib.Path(link) for link in links if os.path.isdir(link)]

    def opener(self):
        context = ssl.create_default_context()
        certificates = self.get("cert")
        if certificates:
            context.load_verify_locations(*([None, certificates] if os.path.isdir(certificates)
                                            else [certificates]))
        if self.get("client-cert"):
            context.load_cert_chain(self.get("client-cert"))
        trusted = set(self.words("trusted-host"))
        hosts = {urllib.parse.urlsplit(index).hostname for index in self.indexes()}
        if hosts and hosts <= trusted:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers = [urllib.request.HTTPSHandler(context=context)]
        if self.get("proxy"):
            handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"),
                                                                      self.get("proxy"))))
        return urllib.request.build_opener(*handlers)

    def timeout(self):
        return float(self.get("default-timeout") or self.get("timeout") or 15)


class Links(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.hrefs = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.hrefs.append(dict(attributes).get("href") or "")


class Index:
    def __init__(self, config):
        self.config, self.opener, self.timeout = config, config.opener(), config.timeout()

    def open(self, url, **headers):
        parts = urllib.parse.urlsplit(url)
        if parts.username:  # credentials in the address, as pip takes them
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return self.opener.open(urllib.request.Request(url, headers=headers), timeout=self.timeout)

    def address(self, wheel):
        """Where the index keeps the wheel's file (PEP 691 JSON, or PEP 503 HTML)."""
        reasons = []
        for index in self.config.indexes():
            page_url = index.rstrip("/") + "/" + wheel.project + "/"
            try:
                accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
                with self.open(page_url, Accept=accept) as answer:
                    page, kind = answer.read().decode(), answer.headers.get_content_type()
            except (OSError, http.client.HTTPException) as error:
                reasons.append(str(getattr(error, "reason", error)))
                continue
            if kind.endswith("json"):
                links = [file["url"] for file in json.loads(page)["files"]]
            else:
                links = Links(page).hrefs
            for link in links:
                path = urllib.parse.unquote(urllib.parse.urlsplit(link).path)
                if path.rpartition("/")[2] == wheel.file:
                    return urllib.parse.urljoin(page_url, link).partition("#")[0]
            reasons.append("it has no such file")
        raise Failure(f"The package index that pip is configured with gave no {wheel.file}: "
                      + ("; ".join(reasons) or "pip is told to use none (no-index)"))

    def download(self, url, part, show):
        """Continues `part` until the file is whole; a server without ranges begins again."""
        for attempt in range(1, ATTEMPTS + 1):
            have = part.stat().st_size if part.exists() else 0
            try:
                with self.open(url, **({"Range": f"bytes={have}-"} if have else {})) as answer:
                    if answer.status != 206:
                        have = 0
                    whole = have + int(answer.headers.get("Content-Length") or 0)
                    with open(part, "ab" if have else "wb") as file:
                        while block := answer.read(1 << 20):
                            file.write(block)
                            have += len(block)
                            show(have, whole)
                if have >= whole:
                    return
                reason = f"the connection ended after {have} of {whole} bytes"
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing left to send: sha256 decides
                    return
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error))
            print(f"  download broken ({reason}), attempt {attempt} of {ATTEMPTS}", file=sys.stderr)
            if attempt < ATTEMPTS:
                time.sleep(min(2 ** attempt, 10))
        raise Failure(f"The download broke off: {reason}. What came is kept in {part}, and the next run "
                      "goes on from there")


def progress(name):
    if not sys.stderr.isatty():
        return lambda have, whole: None

    def show(have, whole):
        print(f"\r  {name[:40]}  {have >> 20} of {whole >> 20} MiB", end="", file=sys.stderr)
        if have == whole:
            print(file=sys.stderr)
    return show


def checked(path, wheel):
    found = sha256_of(path)
    if found != wheel.sha256:
        raise Failure(f"{path} has sha256\n  {found}, but the pinned one is\n  {wheel.sha256}\n"
                      "Remove that file, or put the right one there")
    return path


def obtain(wheel, folders, to, index):
    for folder in folders:
        if (folder / wheel.file).is_file():
            return checked(folder / wheel.file, wheel), False
    print(f"downloading {wheel.file}", file=sys.stderr)
    to.mkdir(parents=True, exist_ok=True)
    part = to / (wheel.file + ".part")
    index.download(index.address(wheel), part, progress(wheel.file))
    try:
        checked(part, wheel)
    except Failure:
        part.unlink()  # going on from wrong bytes would never end
        raise
    return part.rename(to / wheel.file), True


def unpack(path, to):
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(to, [name for name in wheel.namelist() if KEPT.match(name)])


def help_offline(missing, folder):
    files = "\n".join(f"  {wheel.file}\n    sha256 {wheel.sha256}" for wheel in missing)
    return (f"Without a network, put these wheels into {folder}\n"
            f"(or into a folder that FOURFOLD_WHEELS names) and run this again:\n{files}\n"
            "A LibTorch 2.11 to 2.15 that you have is used when CMAKE_PREFIX_PATH or Torch_DIR names it.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", required=True, help="of torch, one of the table's")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="folder to unpack into")
    parser.add_argument("--wheels", type=pathlib.Path, required=True, help="folder of the wheels")
    parser.add_argument("--cuda", action="store_true", help="also what libtorch_cuda.so needs")
    parser.add_argument("--list-missing", action="store_true", help="only name what must be downloaded")
    parser.add_argument("--table", type=pathlib.Path,
                        default=pathlib.Path(__file__).with_name("torch_wheels.txt"))
    options = parser.parse_args()

    table = read_table(options.table)
    wanted = [wheel for wheel in table if wheel.torch == options.version
              and (wheel.role == "cpu" or options.cuda)]
    if not wanted:
        known = ", ".join(sorted({wheel.torch for wheel in table}))
        raise Failure(f"No wheels are pinned for torch {options.version}; there are those of {known}")
    if os.uname().machine != "x86_64":
        raise Failure(f"The pinned wheels are for x86_64, this machine is {os.uname().machine}: let "
                      "CMAKE_PREFIX_PATH or Torch_DIR name a LibTorch 2.11 to 2.15")
    done = options.to / "unpacked"  # one empty file a wheel: what is complete
    absent = [wheel for wheel in wanted if not (done / wheel.file).exists()]
    folders = [pathlib.Path(folder) for folder in os.environ.get("FOURFOLD_WHEELS", "").split(":") if folder]
    folders.append(options.wheels)
    here = [wheel for wheel in absent if any((folder / wheel.file).is_file() for folder in folders)]
    missing = [wheel for wheel in absent if wheel not in here]
    if options.list_missing:
        print("\n".join(wheel.file for wheel in missing))
        return
    if not absent:
        return
    done.mkdir(parents=True, exist_ok=True)
    with open(options.to / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # demo and test may start at once; the second one waits
        try:
            index = None
            if missing:
                config = PipConfig()
                folders += config.folders()
                index = Index(config)
            for wheel in absent:
                if (done / wheel.file).exists():
                    continue
                path, ours = obtain(wheel, folders, options.wheels, index)
                unpack(path, options.to)
                (done / wheel.file).touch()
                if ours:
                    path.unlink()
        except Failure as failure:
            left = [wheel for wheel in missing if not (done / wheel.file).exists()]
            raise Failure(f"{failure}.\n" + (help_offline(left, options.wheels.resolve()) if left else ""))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"fetch_torch: {failure}")
    except OSError as error:
        sys.exit(f"fetch_torch: {error}")
