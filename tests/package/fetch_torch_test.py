#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cmake/fetch_torch.py against small wheels and a package index of this process."""
import hashlib
import http.server
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import unittest
import zipfile

FETCH = pathlib.Path(__file__).resolve().parents[2] / "cmake" / "fetch_torch.py"
NAMES = {"torch": "torch-9.9.9-cp311-cp311-linux_x86_64.whl", "runtime": "runtime-1-py3-none-any.whl"}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        project = self.path.strip("/").split("/")[-1]
        if self.path.startswith("/simple/") and project in NAMES:
            name = NAMES[project]
            if server.html:
                body, kind = f'<a href="../../files/{name}#sha256=0">{name}</a>'.encode(), "text/html"
            else:
                body = json.dumps({"files": [{"url": f"/files/{name}"}]}).encode()
                kind = "application/vnd.pypi.simple.v1+json"
            self.reply(200, body, kind)
        elif self.path.startswith("/files/"):
            data, first = server.files[self.path.rpartition("/")[2]], 0
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            if asked and server.knows_ranges:
                first = int(asked.removeprefix("bytes=").rstrip("-"))
            self.reply(206 if first else 200, data[first:], "application/zip")
        else:
            self.send_error(404)

    def reply(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.breaks and kind == "application/zip":
            self.server.breaks -= 1
            body = body[:len(body) // 2]  # and the connection ends here
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class FetchTorch(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.origin, self.wheels, self.to = (self.root / name for name in ("origin", "wheels", "to"))
        self.origin.mkdir()
        self.wheels.mkdir()
        self.contents = os.urandom(300_000)
        self.write("torch", {"torch/lib/libtorch_cpu.so": self.contents, "torch/nn/a.py": b"not C++",
                             "torch/include/torch/headeronly/version.h": b"9.9.9"})
        self.write("runtime", {"nvidia/cu13/lib/libcudart.so.13": b"cudart"})
        self.table = self.root / "table.txt"
        self.table.write_text("# comment\n" + "".join(
            f"9.9.9 cpu {project} {name} {self.sha256(name)}\n" for project, name in NAMES.items()))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.files = {name: (self.origin / name).read_bytes() for name in NAMES.values()}
        server.ranges, server.breaks, server.knows_ranges, server.html = [], 0, True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.server = server
        self.index = f"http://127.0.0.1:{server.server_port}/simple"

    def write(self, project, files):
        with zipfile.ZipFile(self.origin / NAMES[project], "w") as wheel:
            for name, data in files.items():
                wheel.writestr(name, data)

    def sha256(self, name):
        return hashlib.sha256((self.origin / name).read_bytes()).hexdigest()

    def fetch(self, *more, **environment):
        clean = {k: v for k, v in os.environ.items()
                 if not k.startswith("PIP_") and not k.lower().endswith("_proxy") and k != "FOURFOLD_WHEELS"}
        clean.update(PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=self.index, **environment)
        return subprocess.run(
            [sys.executable, FETCH, "--version", "9.9.9", "--to", self.to, "--wheels", self.wheels,
             "--table", self.table, *more], env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)

    def check_unpacked(self, result):
        self.assertEqual(result.returncode, 0, result.stdout)
        self.assertEqual((self.to / "torch/lib/libtorch_cpu.so").read_bytes(), self.contents)
        self.assertEqual((self.to / "nvidia/cu13/lib/libcudart.so.13").read_bytes(), b"cudart")
        self.assertFalse((self.to / "torch/nn").exists())

    def test_takes_wheels_from_a_folder_without_asking_any_network(self):
        self.index = "http://127.0.0.1:9/simple"  # nobody listens there
        self.check_unpacked(self.fetch(FOURFOLD_WHEELS=f"/nowhere:{self.origin}"))
        again = self.fetch()  # nothing is missing: no wheel and no index is needed any more
        self.assertEqual((again.returncode, again.stdout), (0, ""))
        self.assertTrue((self.origin / NAMES["torch"]).exists())

    def test_refuses_a_wheel_of_another_sha256(self):
        for name in NAMES.values():
            (self.wheels / name).write_bytes((self.origin / name).read_bytes() + b"x")
        result = self.fetch()
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(self.sha256(NAMES["torch"]), result.stdout)
        self.assertIn(hashlib.sha256((self.wheels / NAMES["torch"]).read_bytes()).hexdigest(), result.stdout)
        self.assertFalse((self.to / "torch").exists())

    def test_names_wheels_and_folder_without_a_network(self):
        self.index = "http://127.0.0.1:9/simple"
        result = self.fetch()
        self.assertNotEqual(result.returncode, 0)
        for word in [*NAMES.values(), str(self.wheels), "FOURFOLD_WHEELS", "refused"]:
            self.assertIn(word, result.stdout)

    def test_downloads_from_the_index_of_pip(self):
        self.check_unpacked(self.fetch())
        self.assertEqual(self.server.ranges, [None, None])
        self.assertEqual(list(self.wheels.iterdir()), [])  # unpacked, so not kept twice

    def test_reads_an_index_in_html(self):
        self.server.html = True
        self.check_unpacked(self.fetch())

    def test_continues_a_download_that_breaks(self):
        self.server.breaks = 1
        self.check_unpacked(self.fetch())
        half = len(self.server.files[NAMES["torch"]]) // 2
        self.assertEqual(self.server.ranges, [None, f"bytes={half}-", None])

    def test_continues_what_an_earlier_run_left(self):
        data = self.server.files[NAMES["torch"]]
        (self.wheels / (NAMES["torch"] + ".part")).write_bytes(data[:100_000])
        self.check_unpacked(self.fetch())
        self.assertEqual(self.server.ranges, ["bytes=100000-", None])

    def test_begins_again_where_the_server_knows_no_ranges(self):
        self.server.knows_ranges = False
        (self.wheels / (NAMES["torch"] + ".part")).write_bytes(b"?" * 100_000)
        self.check_unpacked(self.fetch())

    def test_throws_wrong_bytes_away(self):
        self.server.files[NAMES["torch"]] = b"damaged on the way"
        result = self.fetch()
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("sha256", result.stdout)
        self.assertEqual(list(self.wheels.iterdir()), [])

    def test_lists_what_is_missing(self):
        (self.wheels / NAMES["torch"]).write_bytes((self.origin / NAMES["torch"]).read_bytes())
        self.assertEqual(self.fetch("--list-missing").stdout.split(), [NAMES["runtime"]])

    def test_names_the_versions_that_are_pinned(self):
        result = self.fetch("--version", "1.0.0")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("torch 1.0.0; there are those of 9.9.9", result.stdout)


if __name__ == "__main__":
    if importlib.util.find_spec("pip") is None:
        print("pip is not installed: nothing to ask for an index")
        sys.exit(77)
    unittest.main()
