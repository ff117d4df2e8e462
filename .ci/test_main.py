"""`python vit.py`: its options, its files, what goes wrong, and its picture."""

import io
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY_SIZES, write_mnist
from PIL import Image, ImageChops
from torch.testing import assert_close

import vit

RAW = Path("data/MNIST/raw")
NAMES = ["mnist.png", "mnist.pt", "synthetic.png", "synthetic.pt"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs main offline and returns which results changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vit.MNIST, "mirrors", ["file:///nowhere/"])
    write_mnist(RAW)
    Path("out").mkdir()
    for name in NAMES:
        Path("out", name).write_text("earlier")

    def run(options="", error=None, match=None):
        tiny = "vit.py --embed-dim 16 --depth 1 --n-heads 1 --epochs 1 --device cpu"
        monkeypatch.setattr("sys.argv", f"{tiny} {options}".split())
        if error is None:
            vit.main()
        else:
            with pytest.raises(error, match=match):
                vit.main()
        return [name for name in NAMES if Path("out", name).read_bytes() != b"earlier"]

    return run


@pytest.fixture
def trained(monkeypatch):
    """Return what main has passed to train, which does nothing here."""
    call = {}

    def train(model, loader, **others):
        call.update(others, model=model, loader=loader, seed=torch.initial_seed())
        return [2.0, 1.0]

    monkeypatch.setattr(vit, "train", train)
    return call


def test_default_options(monkeypatch):
    # Catches another default, and another name.
    monkeypatch.setattr("sys.argv", ["vit.py"])
    options = vars(vit.parse_options())
    assert str(options.pop("device")) in ("cpu", "cuda", "mps", "xpu")
    assert " ".join(f"{name}={value}" for name, value in options.items()) == (
        "patch_size=7 embed_dim=64 depth=4 n_heads=4 mlp_ratio=2.0 dropout=0.0 "
        "epochs=8 batch_size=128 lr=0.005 weight_decay=0.05 seed=0 "
        "data_dir=data out_dir=out"
    )


def test_main_passes_on_the_options(run, trained, monkeypatch, capsys):
    # Catches an option that is not used, swapped sets, no shuffling, no augmentation.
    monkeypatch.setattr(vit, "evaluate", lambda model, loader: len(loader.dataset))
    run("--epochs 3 --lr 0.5 --weight-decay 0.25 --seed 7 --batch-size 9")
    loader = trained["loader"]
    assert (trained["epochs"], trained["seed"]) == (3, 7)
    assert (trained["lr"], trained["weight_decay"]) == (0.5, 0.25)
    assert (loader.batch_size, len(loader.dataset)) == (9, 240)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert len(trained["test_loader"].dataset) == 60
    assert trained["transform"] is vit.augment
    assert "test accuracy: 6000.00%" in capsys.readouterr().out


BAD_OPTIONS = [
    ("--patch-size 5", ValueError, "patch_size must divide img_size, got 5 and 28"),
    ("--n-heads 5", ValueError, "n_heads must divide embed_dim, got 5 and 16"),
    ("--epochs 0", ValueError, "epochs, but got 0"),
    ("--batch-size 0", ValueError, "batch_size=0"),
    ("--lr -1", ValueError, "learning rate"),
    ("--lr 1e30", FloatingPointError, "in epoch 1: lower the learning rate"),
    ("--weight-decay -1", ValueError, "weight_decay value: -1"),
    ("--device toaster", RuntimeError, "toaster"),
    ("--out-dir out/mnist.pt", OSError, "out/mnist.pt"),  # a file
    ("--data-dir /proc/data", RuntimeError, "in /proc/data"),  # nobody can make it
]


@pytest.mark.parametrize("options, error, match", BAD_OPTIONS)
def test_bad_option_is_refused(run, options, error, match):
    # Catches a bad value that is accepted, refused late, or not named.
    assert run(options, error, match) == []


@pytest.mark.parametrize("n_bytes", [0, 3, 1000])
@pytest.mark.parametrize("name", ["-idx3-ubyte", "-idx3-ubyte.gz", ".idx3-ubyte"])
def test_damaged_or_renamed_file_is_refused(run, n_bytes, name):
    # Catches synthetic digits in the place of a damaged MNIST.
    content = (RAW / "train-images-idx3-ubyte").read_bytes()
    (RAW / "train-images-idx3-ubyte").unlink()
    (RAW / f"train-images{name}").write_bytes(content[:n_bytes])
    match = "MNIST, got .* expected four files .* in data/MNIST/raw; delete damaged"
    assert run("", RuntimeError, match) == []


def test_silent_server_does_not_hang_the_run(run, monkeypatch, capsys):
    # Catches a missing time limit, a silent fallback, and results under MNIST's name.
    RAW.rename("elsewhere")
    socket.setdefaulttimeout(1)
    seconds = []
    monkeypatch.setattr(socket, "setdefaulttimeout", seconds.append)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(vit.MNIST, "mirrors", [address])
        assert run() == ["synthetic.png", "synthetic.pt"]
    assert seconds == [20]
    out, error = capsys.readouterr()
    assert "timed out\nNo MNIST in data: using synthetic digits" in error
    assert "\nsynthetic digits test accuracy: " in out


def test_checkpoint_rebuilds_the_model(run, trained):
    # Catches a size or losses that are not saved, and weights of another model.
    sizes = "--patch-size 14 --embed-dim 24 --depth 3 --n-heads 2 --mlp-ratio 1.5"
    assert run(f"{sizes} --dropout 0.25") == ["mnist.png", "mnist.pt"]
    checkpoint = torch.load("out/mnist.pt", weights_only=True)
    assert checkpoint["sizes"] == TINY_SIZES | {"patch_size": 14, "dropout": 0.25}
    assert_close(checkpoint["weights"], trained["model"].state_dict())
    assert checkpoint["losses"] == [2.0, 1.0]
    assert sorted(os.listdir("out")) == NAMES


def test_checkpoint_is_moved_to_the_cpu_first(run, trained):
    # Catches weights saved on a GPU, whose stand-in, "meta", fails to move and to save.
    assert run("--device meta", NotImplementedError, "Cannot copy out of meta") == []


def test_full_disk_spares_an_earlier_model(run, trained, monkeypatch):
    # Catches a model that is written over an earlier one.
    def save(checkpoint, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", save)
    assert run("", OSError, "disk full") == []


def test_path_that_cannot_be_printed(run, trained, monkeypatch):
    # Catches a print between the training and the saving: if it fails, all is lost.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    run("--out-dir out/\u043c\u043e\u0434\u0435\u043b\u044c", UnicodeEncodeError)
    assert len(list(Path("out").glob("*/mnist.p[nt]*"))) == 2


def test_tilde_is_the_home_folder(run, trained, monkeypatch):
    # Catches a folder named ~: a shell does not expand the one in --data-dir=~/data.
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    write_mnist(Path("home/data/MNIST/raw"), sizes=(30, 20))
    run("--data-dir=~/data --out-dir=~/new/out")
    assert len(trained["test_loader"].dataset) == 20
    assert sorted(os.listdir("home/new/out")) == ["mnist.png", "mnist.pt"]


def test_the_same_seed_gives_the_same_run(run):
    # Catches a seed that is not used, or used too late.
    models = []
    for seed in (3, 3, 4):
        run(f"--seed {seed}")
        models.append(Path("out/mnist.pt").read_bytes())
    assert models[0] == models[1] != models[2]


@pytest.mark.parametrize("n_rows, channels", [(2, 1), (4, 3), (7, 1)])
def test_picture_tints_where_cls_looks(n_rows, channels):
    # Catches another block, a single head, keys for queries, rows for columns, a patch
    # too many ([CLS]), weights without their root, and images of a fixed size or color.
    n_tokens = 1 + n_rows**2
    maps = torch.ones(1, 3, 2, n_tokens, n_tokens)
    maps[:, -1, :, 0, 1:] = 0
    maps[:, -1, 0, 0, 2] = 1  # the second patch; in one of two heads, so root 0.71
    picture = vit.draw_attention(torch.zeros(1, channels, 28, 28), maps)
    side = 28 // n_rows
    assert picture.getbbox() == (side, 0, 2 * side, side)
    assert picture.getpixel((side, 0)) == (180, 90, 0)
    picture = vit.draw_attention(torch.full((1, channels, 28, 28), 0.5), maps)
    assert picture.getpixel((0, 0)) == (127, 127, 127)


def test_main_draws_the_first_sixteen_digits(run, trained):
    # Catches other digits, and maps of other images.
    run()
    images = vit.load_mnist("data")[1].tensors[0][:16]
    maps = trained["model"].attention_maps(images)
    expected = vit.draw_attention(torch.nn.functional.interpolate(images, 112), maps)
    assert not ImageChops.difference(Image.open("out/mnist.png"), expected).getbbox()
