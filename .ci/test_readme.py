"""The README's Python blocks, each run as a program of its own, on synthetic files."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, write_mnist
from PIL import Image, ImageDraw

import vit

README = (ROOT / "README.md").read_text(encoding="utf-8")


def recipe(title):
    """Return the Python block under this heading of the README."""
    section = README.split(f"### {title}\n")[1].split("\n#")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def run(folder, code, *launcher):
    """Run code as a program in the folder, beside a copy of vit.py; return its output."""
    (folder / "vit.py").write_text((ROOT / "vit.py").read_text())
    (folder / "recipe.py").write_text(code)
    command = [sys.executable, *launcher, "recipe.py"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def draw_photos(folder):
    """Draw two classes, wide and tall bars, in the color modes of real photos."""
    for i in range(160):
        name, box = [("wide", (10, 40, 110, 60)), ("tall", (50, 10, 70, 90))][i % 2]
        photo = Image.effect_noise((120, 100), 40).convert("RGB")
        ImageDraw.Draw(photo).rectangle(box, "white")
        path = folder / "photos" / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.convert(["RGB", "L", "CMYK"][i % 3]).save(path)
    photo.save(folder / "new.jpg")
    photo.save(folder / "photo.jpg")


def test_your_own_images(tmp_path):
    # The last photo drawn is a tall bar.
    draw_photos(tmp_path)
    output = run(tmp_path, recipe("Your own images"))
    assert output.count("epoch ") == 20
    assert "predicted tall" in output

    # What was saved loads as the next recipe does it.
    saved = torch.load(tmp_path / "photos.pt")
    model = vit.VisionTransformer(**saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert saved["classes"] == ["tall", "wide"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an out/mnist.pt that knows synthetic digits."""
    folder = tmp_path_factory.mktemp("trained")
    write_mnist(folder / "data" / "MNIST" / "raw", sizes=(2_000, 60))
    command = [
        sys.executable,
        str(ROOT / "vit.py"),
        "--epochs",
        "8",
        "--batch-size",
        "20",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def test_a_photographed_digit(trained):
    # A dark 7 on light, noisy paper, off the center.
    photo = Image.effect_noise((600, 800), 10)
    photo = photo.point(lambda value: min(255, value + 90))
    ImageDraw.Draw(photo).text((300, 300), "7", 20, font_size=300)
    photo.save(trained / "digit.jpg")

    code = recipe("A photographed digit") + "assert maps.shape == (1, 4, 4, 17, 17)\n"
    assert "predicted 7" in run(trained, code)


def test_published_weights_and_another_image_size(tmp_path):
    # Random weights in the format of DeiT's file stand for the published ones.
    draw_photos(tmp_path)
    deit = vit.VisionTransformer(embed_dim=192, depth=12, n_heads=3)
    torch.save(
        {"model": deit.state_dict()}, tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    )

    # One epoch of ten photos is enough to see that it runs.
    published = recipe("Published weights").replace("epochs=5", "epochs=1")
    for path in sorted((tmp_path / "photos").glob("*/*.jpg"))[10:]:
        if path.name not in ("0.jpg", "1.jpg"):
            path.unlink()
    code = published + recipe("Another image size")
    code += "assert logits.shape == (1, 1000)\n"
    code += "assert model(torch.zeros(1, 3, 384, 384)).shape == (1, 2)\n"
    assert "epoch 1/1" in run(tmp_path, code)


def test_export_line(tmp_path):
    # The line of the README, for batches of another size than that of the example.
    line = re.search(r"`(torch\.export\.export\(.*?\)\))`", README)[1]
    code = f"""
import torch, vit
model = vit.VisionTransformer(img_size=32, embed_dim=32, depth=1, n_heads=2).eval()
images = torch.rand(2, 3, 32, 32)
exported = {line}.module()
more = torch.rand(5, 3, 32, 32)
torch.testing.assert_close(exported(more), model(more))
"""
    run(tmp_path, code)


def test_bfloat16_line(tmp_path):
    # With autocast around the forward pass alone, training learns.
    line = re.search(r"to `(with torch\.autocast.*?)`", README)[1]
    source = (ROOT / "vit.py").read_text()
    assert source.count("logits = model(images)\n") == 1
    changed = source.replace("logits = model(images)\n", line + "\n")
    code = f"""
{changed.split("if __name__")[0]}
torch.manual_seed(0)
batches = [make_synthetic_digits(64).tensors]
model = VisionTransformer(
    img_size=28, patch_size=7, in_channels=1, num_classes=10, embed_dim=64, n_heads=4
)
losses = train(model, batches, epochs=60, lr=1e-3)
assert losses[-1] < losses[0] / 4, losses
"""
    run(tmp_path, code)


def test_two_processes(tmp_path):
    # 1,919 images: an odd number, so that the shards have to be cut to equal length.
    write_mnist(tmp_path / "data" / "MNIST" / "raw", sizes=(1_919, 60))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    output = run(tmp_path, recipe("Several GPUs or processes"), *launcher)
    assert output.count("epoch ") == output.count("test accuracy") == 8

    saved = torch.load(tmp_path / "many.pt")
    model = vit.VisionTransformer(**saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert sum(p.numel() for p in model.parameters()) == 139_018
