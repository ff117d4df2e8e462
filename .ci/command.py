"""`python vit.py` with bad options, bad data, bad servers and Ctrl-C, each in a folder of its own."""

import functools
import http.server
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from helpers import ROOT, write_mnist

work = Path(tempfile.mkdtemp())
RESOURCES = write_mnist(work / "mirror", archives=True)
TINY = "--embed-dim 16 --depth 1 --n-heads 1 --epochs 1 --device cpu"
NOBODY = "http://127.0.0.1:9/"


def start(options, mirror, **others):
    """The command, told to download the tiny MNIST from this mirror only."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vit; sys.argv[0] = 'vit.py'; "
    code += f"vit.MNIST.mirrors, vit.MNIST.resources = [{mirror!r}], {RESOURCES!r}; vit.main()"
    command = [sys.executable, "-W", "error", "-c", code, *TINY.split(), *options.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **others)


def run(options, mirror=NOBODY, **others):
    process = start(options, mirror, **others)
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def folder(name):
    """A new folder with an earlier run's vit.pt in it."""
    (work / name / "out").mkdir(parents=True)
    (work / name / "out" / "vit.pt").write_text("old")
    return work / name


def snapshot(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refused(name, options, words, status=1, prepare=None, **others):
    """The run ends with this status, its last line says what was wrong, no file was changed."""
    here = folder(name)
    if prepare:
        prepare(here)
    before = snapshot(here)
    code, out, error = run(options, cwd=here, **others)
    last = error.strip().splitlines()[-1]
    assert code == status, (name, code, out, error)
    assert words in last, (name, last)
    assert "drawn digits" not in out or prepare is None, (name, out)
    assert snapshot(here) == before, name
    print(f"{name}: {last}")


refused("patch size", "--patch-size 5", "patch_size 5 does not divide img_size 28", 2)
refused("no patch size", "--patch-size 0", "patch_size 0 does not divide img_size 28", 2)
refused("heads", "--n-heads 5", "n_heads 5 does not divide embed_dim 16", 2)
refused("dropout", "--dropout 1.5", "1.5", 2)
refused("a word for a number", "--epochs many", "invalid int value: 'many'", 2)
refused("no epochs", "--epochs 0", "0")
refused("batch size", "--batch-size 0", "batch_size=0")
refused("negative lr", "--lr -1", "learning rate: -1")
refused("nan lr", "--lr nan", "learning rate: nan")
refused("high lr", "--lr 1e30", "the loss of epoch 1 is not finite")
refused("weight decay", "--weight-decay -1", "weight_decay value: -1")
refused("device", "--device toaster", "toaster")
refused("out-dir is a file", "--out-dir out/vit.pt", "out/vit.pt")
refused("data-dir is a file", "--data-dir out/vit.pt", "out/vit.pt", prepare=lambda here: None)
refused("data-dir cannot be made", "--data-dir /proc/no", "/proc/no", prepare=lambda here: None)


def break_file(here, archives, name, cut):
    write_mnist(here / "data" / "MNIST" / "raw", archives)
    path = here / "data" / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:cut])


for cut in (0, 3, 1000):
    for archives, name in ((True, "train-images-idx3-ubyte.gz"), (False, "t10k-images-idx3-ubyte")):
        broken = functools.partial(break_file, archives=archives, name=name, cut=cut)
        refused(f"{name} of {cut} bytes", "", "damaged or incomplete", prepare=broken)

handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=work / "mirror")
handler.func.log_message = lambda *_: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
mirror = f"http://127.0.0.1:{server.server_port}/"

full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
here = folder("full disk")
code, out, error = run("", mirror, cwd=here, preexec_fn=full)
assert code == 1 and "File too large" in error.strip().splitlines()[-1], error
assert "drawn digits" not in out and (here / "out" / "vit.pt").read_text() == "old"
print("full disk:", error.strip().splitlines()[-1])

here = folder("half a download")
raw = here / "data" / "MNIST" / "raw"
raw.mkdir(parents=True)
name = RESOURCES[0][0]
(raw / name).write_bytes((work / "mirror" / name).read_bytes()[:5000])
code, out, error = run("", mirror, cwd=here)
assert code == 0 and "MNIST: 240 images to train on, 60 to test on" in out, (out, error)
assert (raw / name).read_bytes() == (work / "mirror" / name).read_bytes()
print("half a download: healed")

with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes calls and never answers
    port = silent.getsockname()[1]
    code, out, error = run("", f"http://127.0.0.1:{port}/", cwd=folder("silent server"))
assert code == 0 and out.strip().splitlines()[-1].startswith("drawn digits test accuracy"), error
assert "drawn digits" in error
print("silent server: drawn digits")

here = folder("Ctrl-C")
write_mnist(here / "data" / "MNIST" / "raw", sizes=(20_000, 60))
process = start("--epochs 1000", NOBODY, cwd=here)
lines = [process.stdout.readline() for _ in range(4)]
assert lines[3].startswith("epoch 2/1000"), lines
process.send_signal(signal.SIGINT)
out, error = process.communicate(timeout=100)
assert process.returncode == 0 and "stopped early" in out, (out, error)
assert out.strip().splitlines()[-1].startswith("MNIST test accuracy"), out
assert (here / "out" / "vit.pt").stat().st_size > 1000 and (here / "out" / "vit.png").exists()
print("Ctrl-C: keeps what was learned")
