"""`python vit.py` with bad options, bad data, bad servers and Ctrl-C."""

import functools
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest
from helpers import ROOT, write_mnist

# What an earlier run has left: no run that fails may touch it.
EARLIER_RESULTS = {
    "mnist.pt": b"earlier model",
    "mnist.png": b"earlier picture",
    "synthetic.pt": b"earlier model of synthetic digits",
    "synthetic.png": b"earlier picture of synthetic digits",
}

# The command, told to download the tiny MNIST, and from where.
PROGRAM = """
import vit
vit.MNIST.mirrors = [{mirror!r}]
vit.MNIST.resources = {resources!r}
{setup}
vit.main()
"""
TINY = "--embed-dim 16 --depth 1 --n-heads 1 --epochs 1 --device cpu"
NOBODY = "http://127.0.0.1:9/"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Return a folder with the archives of the tiny MNIST, and torchvision's list."""
    folder = tmp_path_factory.mktemp("mirror")
    resources = write_mnist(folder, archives=True)
    return folder, resources


@pytest.fixture
def mirror(archives):
    """Return the address of a server that has the archives."""
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler,
        directory=archives[0],
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path):
    """Return the folder for results, with those of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in EARLIER_RESULTS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def raw(tmp_path):
    """Return the folder for the files of MNIST, which does not exist yet."""
    return tmp_path / "data" / "MNIST" / "raw"


@pytest.fixture
def run(tmp_path, archives, out):
    """Return a function that runs the command; setup is Python to be run before it."""

    def run(options="", mirror=NOBODY, setup=""):
        program = PROGRAM.format(
            mirror=mirror,
            resources=archives[1],
            setup=setup,
        )
        command = [sys.executable, "-W", "error", "-c", program]
        return subprocess.run(
            command + TINY.split() + options.split(),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "no_proxy": "*"},
            timeout=100,
            check=False,
            capture_output=True,
            text=True,
        )

    return run


def read_files(folder):
    """Return the content of each file in a folder, by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def last_line(text):
    return text.strip().splitlines()[-1]


# --- Options --------------------------------------------------------------------------

BAD_OPTIONS = [
    ("--patch-size 5", "ValueError: patch_size must divide img_size, got 5 and 28"),
    ("--n-heads 5", "ValueError: n_heads must divide embed_dim, got 5 and 16"),
    ("--dropout 1.5", "1.5"),
    ("--epochs 0", "epochs, but got 0"),
    ("--batch-size 0", "batch_size=0"),
    ("--lr -1", "learning rate"),
    ("--lr nan", "learning rate"),
    ("--lr 1e30", "loss of epoch 1 is not finite"),
    ("--weight-decay -1", "weight_decay value: -1"),
    ("--device toaster", "toaster"),
    ("--out-dir out/mnist.pt", "out/mnist.pt"),  # a file
    ("--data-dir out/mnist.pt", "out/mnist.pt"),
    ("--data-dir /proc/data", "/proc/data"),  # nobody can make it
]


@pytest.mark.parametrize("options, words", BAD_OPTIONS)
def test_bad_option_is_refused(options, words, run, out, raw):
    # Catches a bad value that is accepted, or refused only after the results are lost,
    # and a last line that does not say what was wrong.
    write_mnist(raw)
    done = run(options)
    assert done.returncode == 1
    assert words in last_line(done.stderr)
    assert read_files(out) == EARLIER_RESULTS


def test_word_for_a_number_is_refused(run, out):
    # Catches an option without a type: it would be text.
    done = run("--epochs many")
    assert done.returncode == 2
    assert last_line(done.stderr).endswith("invalid int value: 'many'")
    assert read_files(out) == EARLIER_RESULTS


def test_help_names_the_defaults(run):
    # Catches a percent sign in the text of an option, which argparse cannot print.
    done = run("--help")
    assert done.returncode == 0
    assert "side of a patch in pixels (default: 7)" in done.stdout


# --- Files that are damaged -----------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 3, 1000])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_file_is_refused(n_bytes, ending, run, out, raw):
    # Catches synthetic digits in the place of a damaged MNIST, and an error that does
    # not name the folder.
    write_mnist(raw, archives=bool(ending))
    path = raw / f"train-images-idx3-ubyte{ending}"
    content = path.read_bytes()
    path.write_bytes(content[:n_bytes])

    done = run()
    assert done.returncode == 1
    assert "data/MNIST/raw" in last_line(done.stderr)
    assert "incomplete or damaged" in last_line(done.stderr)
    assert read_files(out) == EARLIER_RESULTS


def test_half_a_download_heals(run, raw, archives, mirror):
    # Catches a partial archive that blocks all later runs.
    name = "train-images-idx3-ubyte.gz"
    content = (archives[0] / name).read_bytes()
    raw.mkdir(parents=True)
    (raw / name).write_bytes(content[:1000])

    done = run(mirror=mirror)
    assert done.returncode == 0
    assert last_line(done.stdout).startswith("MNIST test accuracy: ")
    assert (raw / name).read_bytes() == content


def test_full_disk_ends_a_download(run, out, mirror):
    # Catches synthetic digits after a download that has failed halfway. A limit for the
    # size of a file stands for the full disk.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = run(mirror=mirror, setup=f"import resource; {limit}")
    assert done.returncode == 1
    assert "incomplete or damaged" in last_line(done.stderr)
    assert read_files(out) == EARLIER_RESULTS


# --- Servers that do not answer -------------------------------------------------------


def test_synthetic_digits_never_replace_the_model_of_mnist(run, out):
    # Catches results of both under one name.
    done = run(mirror=NOBODY)
    assert done.returncode == 0
    assert last_line(done.stdout).startswith("synthetic digits test accuracy: ")

    results = read_files(out)
    assert results["mnist.pt"] == EARLIER_RESULTS["mnist.pt"]
    assert results["mnist.png"] == EARLIER_RESULTS["mnist.png"]
    assert results["synthetic.pt"] != EARLIER_RESULTS["synthetic.pt"]


def test_silent_server_does_not_hang_the_run(run):
    # Catches a download without a time limit, and a fallback that does not say why.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        done = run(mirror=f"http://127.0.0.1:{port}/")
    assert done.returncode == 0
    assert "timed out\nNo MNIST" in done.stderr
    assert last_line(done.stdout).startswith("synthetic digits test accuracy: ")


# --- Ctrl-C ---------------------------------------------------------------------------

# Ctrl-C, once, at the end of the first epoch. The second line is for programs in the
# background, where the shell has turned it off.
PRESS_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
evaluate = vit.evaluate

def press(model, loader):
    vit.evaluate = evaluate
    signal.raise_signal(signal.SIGINT)

vit.evaluate = press
"""


def test_ctrl_c_ends_the_run(run, out, raw):
    # Catches a Ctrl-C that is ignored, and results of a training that was not finished.
    write_mnist(raw)
    done = run("--epochs 2", setup=PRESS_CTRL_C)
    assert done.returncode != 0
    assert last_line(done.stderr) == "KeyboardInterrupt"
    assert read_files(out) == EARLIER_RESULTS
