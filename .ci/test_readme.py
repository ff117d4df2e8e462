"""The README's scripts, each run as a program of its own, its figures and its lists."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY_SIZES, write_mnist
from PIL import Image, ImageDraw

import vit

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEIT = "deit_tiny_patch16_224-a1311bcf.pth"


def recipe(title, language="python"):
    """Return the first block under this heading."""
    section = README.split(f"# {title}\n")[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


def run(folder, code, name="recipe.py", launcher=()):
    """Run code as a program in the folder, beside vit.py and load.py."""
    (folder / "vit.py").write_text((ROOT / "vit.py").read_text())
    (folder / "load.py").write_text(recipe("Use it in your project"))
    (folder / name).write_text(code)
    command = [sys.executable, *launcher, name]
    return subprocess.check_output(command, cwd=folder, text=True)


def test_own_images_and_pretrained_weights(tmp_path):
    # Photos of wide and tall bars, in the modes of real files. Random weights in the
    # format of DeiT's file are a stand-in for the real ones.
    for i in range(60):
        name, box = [("wide", (10, 40, 110, 60)), ("tall", (50, 10, 70, 90))][i % 2]
        photo = Image.effect_noise((120, 100), 40).convert("RGB")
        ImageDraw.Draw(photo).rectangle(box, "white")
        path = tmp_path / "photos" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.convert(["RGB", "L", "P", "RGBA"][i % 4]).save(path)
    photo.save(tmp_path / "new.jpg")
    deit = vit.VisionTransformer(embed_dim=192, n_heads=3)
    torch.save({"model": deit.state_dict()}, tmp_path / DEIT)
    pretrained = recipe("Pretrained weights")
    assert "ImageNet class" in run(tmp_path, pretrained, "pretrained.py")

    # Fewer epochs are enough to see that both scripts run.
    own = recipe("Your own images").replace("epochs, lr = 100", "epochs, lr = 2")
    tuned = re.search(r"(from pretrained import .*?lr = .*?\n)", README, re.DOTALL)[1]
    first, rest = own.index("prepare ="), own.index("photos =")
    for code in (own, own[:first] + tuned.replace("5, 1e-4", "1, 1e-4") + own[rest:]):
        output = run(tmp_path, code)
        assert "60 images of ['tall', 'wide']" in output
        assert re.search(r"(tall|wide) \(\d+%\)\n$", output)
        saved = torch.load(tmp_path / "photos.pt")
        model = vit.VisionTransformer(**saved["sizes"])
        model.load_state_dict(saved["weights"])

    larger = recipe("Another image size") + "print(model(torch.rand(1, 3, 384, 384)))"
    assert "grad_fn" in run(tmp_path, larger)


def test_a_photographed_digit(tmp_path):
    # A dark 7 on light, noisy paper, off the center; the same in ink on transparency.
    sizes = TINY_SIZES | {"embed_dim": 64, "depth": 4, "n_heads": 4}
    model = vit.VisionTransformer(**sizes)
    loader = torch.utils.data.DataLoader(vit.make_synthetic_digits(2000), 20)
    vit.train(model, loader, epochs=5, lr=5e-3)
    (tmp_path / "out").mkdir()
    saved = {"sizes": sizes, "weights": model.state_dict()}
    torch.save(saved, tmp_path / "out/mnist.pt")

    paper = Image.effect_noise((600, 800), 10).point(lambda value: min(255, value + 90))
    for photo in (paper.convert("RGB"), Image.new("RGBA", (600, 800))):
        ImageDraw.Draw(photo).text((300, 300), "7", (20, 20, 20), font_size=300)
        photo.save(tmp_path / "digit.png")
        code = recipe("A photographed digit").replace("digit.jpg", "digit.png")
        code += "assert maps.shape == (1, 4, 4, 17, 17)\n"
        assert run(tmp_path, code).startswith("7 (")


def test_load_reads_any_picture(tmp_path):
    # Left red, right black; black is transparent where a mode can say so.
    exec(recipe("Use it in your project"), namespace := {})  # noqa: S102
    red = Image.new("RGB", (40, 20))
    red.paste("red", (0, 0, 20, 20))
    transparent = red.convert("RGBA")
    transparent.putalpha(red.getchannel("R"))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    red.save(tmp_path / "RGB.png")
    red.quantize().save(tmp_path / "P.png")
    red.convert("CMYK").save(tmp_path / "CMYK.tif")
    red.rotate(180).save(tmp_path / "EXIF.png", exif=turned)
    transparent.save(tmp_path / "RGBA.png")
    for path in tmp_path.iterdir():
        loaded = namespace["load"](path)
        assert (loaded.mode, loaded.size) == ("RGB", (40, 20))
        assert loaded.getpixel((5, 5)) == (255, 0, 0)
        right = 255 if path.stem == "RGBA" else 0
        assert loaded.getpixel((35, 5)) == (right, right, right)

    Image.new("I;16", (40, 20)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: save it with 8 bits"):
        namespace["load"](tmp_path / "deep.png")


# Two processes share the batches; each has a model, and their gradients are averaged.
TWO_PROCESSES = """
import torch, vit
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(
    vit.VisionTransformer(img_size=28, patch_size=7, in_channels=1, embed_dim=12)
)
vit.train(model, [vit.make_synthetic_digits(20 + rank).tensors], epochs=2, lr=0.01)
torch.save(model.module.state_dict(), f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path):
    # The weights of both models stay equal.
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run(tmp_path, TWO_PROCESSES, launcher=launcher)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    torch.testing.assert_close(first, second)


def test_bfloat16_line_fits():
    line = re.search(r"with torch\.autocast\(.*?\): (.*?)\.float\(\)", README)[1]
    assert f"\n            {line}\n" in (ROOT / "vit.py").read_text()


def test_printed_run_and_options(tmp_path, monkeypatch, capsys):
    # The form of the printed run is the program's, and all options in commands exist.
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.setattr("sys.argv", ["vit.py", "--device", "cpu", "--epochs", "1"])
    vit.main()
    out = capsys.readouterr().out
    forms = set(re.sub(r"[\d,.]*\d", "0", out).split("\n"))
    printed = re.sub(r"[\d,.]*\d", "0", recipe("Quick start", "text")).split("\n")
    assert set(printed) - {"..."} == forms

    commands = re.findall(r"(--(?:batch|epochs).*?)[`\n]", README.replace("\\\n", ""))
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr("sys.argv", ["vit.py", *command.split()])
        vit.parse_options()


def test_lists_of_packages_agree():
    header = re.search(r"# dependencies = \[(.*)\]", (ROOT / "vit.py").read_text())[1]
    packages = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"(.*?)"', header) + ["pytest>=8"] == packages
    oldest = README.split("oldest")[1].lower()
    for package in packages[:3]:
        assert package.replace(">=", " ") in oldest
