"""The README's scripts, each run as a program of its own, its links and its lists."""

import os
import re
import sys
from subprocess import STDOUT, check_output

import pytest
import torch
from helpers import ROOT, TINY_SIZES, write_mnist
from PIL import Image, ImageDraw, ImageOps

import vit

README = (ROOT / "README.md").read_text(encoding="utf-8")
VIT = (ROOT / "vit.py").read_text(encoding="utf-8")


def blocks(title, language="python"):
    """Return the code blocks under this heading."""
    section = README.split(f"# {title}\n")[1].split("\n#")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Return a function that runs code as a program, beside vit.py and photos.py."""
    (tmp_path / "vit.py").write_text(VIT)
    (tmp_path / "photos.py").write_text(blocks("Your own images")[0])

    def run(code, launcher=()):
        (tmp_path / "script.py").write_text(code)
        command = [sys.executable, *launcher, "script.py"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return check_output(command, cwd=tmp_path, env=env, text=True, stderr=STDOUT)

    return run


def test_copied_model(tmp_path):
    # The lines that the README links are the model, whole.
    first, last = map(int, re.search(r"#L(\d+)-L(\d+)", README).groups())
    assert README.count(f"(vit.py#L{first}-L{last})") == README.count("vit.py#L") == 2
    imports, use = blocks("Copy the model")
    model = "\n".join(VIT.split("\n")[first - 1 : last])
    assert model.startswith("class PatchEmbed") and "\n# ---" not in model
    exec(f"{imports}\n{model}\n{use}", copied := {})  # noqa: S102
    assert copied["logits"].shape == (2, 10)
    assert copied["features"].shape == (2, 197, 768)


def test_own_images_and_pretrained_weights(run, tmp_path):
    # Random weights are a stand-in for DeiT's. One epoch shows that the scripts run.
    for i in range(20):
        folder = tmp_path / "photos" / ["wide", "tall"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((120, 100), 40).save(folder / f"{i}.jpg")
    (folder / "19.jpg").rename(tmp_path / "new.jpg")
    deit = vit.VisionTransformer(embed_dim=192, n_heads=3)
    name = "deit_tiny_patch16_224-a1311bcf.pth"
    torch.save({"model": deit.state_dict()}, tmp_path / name)

    tune, resize = blocks("Pretrained weights")
    larger = tune.replace("=224", "=384").replace("model.load", f"{resize}model.load")
    for code in blocks("Your own images")[1], tune, larger:
        output = run(re.sub(r"epochs=\d+", "epochs=1", code))
        assert "19 images of ['tall', 'wide']" in output
        assert re.search(r"\n(tall|wide) \(\d+%\)\n$", output)
        saved = torch.load(tmp_path / "photos.pt")
        vit.VisionTransformer(**saved["sizes"]).load_state_dict(saved["weights"])
    assert saved["sizes"]["img_size"] == 384


def test_load_reads_any_picture(tmp_path):
    # Left red, right black; black is transparent where a mode can say so.
    exec(blocks("Your own images")[0], namespace := {})  # noqa: S102
    red = Image.new("RGB", (40, 20))
    red.paste("red", (0, 0, 20, 20))
    red.quantize().save(tmp_path / "P.png")
    red.convert("CMYK").save(tmp_path / "CMYK.tif")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    red.rotate(180).save(tmp_path / "EXIF.png", exif=turned)
    red.putalpha(red.getchannel("R"))
    red.save(tmp_path / "RGBA.png")
    for path in tmp_path.iterdir():
        loaded = namespace["load"](path)
        assert (loaded.mode, loaded.size) == ("RGB", (40, 20))
        assert loaded.getpixel((5, 5)) == (255, 0, 0)
        assert loaded.getpixel((35, 5)) == (255 if path.stem == "RGBA" else 0,) * 3

    Image.new("I;16", (40, 20)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in "deep.png", "broken.png":
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            namespace["load"](tmp_path / name)


def test_digit_and_look_inside(run, tmp_path):
    # A 7 on noisy paper, off the center; on transparency; in chalk on a board.
    sizes = TINY_SIZES | {"embed_dim": 64, "depth": 4, "n_heads": 4}
    model = vit.VisionTransformer(**sizes)
    loader = torch.utils.data.DataLoader(vit.make_synthetic_digits(2000), 20)
    losses = vit.train(model, loader, epochs=5, lr=5e-3)
    (tmp_path / "out").mkdir()
    saved = {"sizes": sizes, "weights": model.state_dict(), "losses": losses}
    torch.save(saved, tmp_path / "out/mnist.pt")

    board = Image.effect_noise((600, 800), 10).point(lambda value: value // 4)
    board, paper = board.convert("RGB"), ImageOps.invert(board).convert("RGB")
    for photo, ink in (paper, 20), (Image.new("RGBA", (600, 800)), 20), (board, 230):
        ImageDraw.Draw(photo).text((300, 300), "7", (ink,) * 3, font_size=300)
        photo.save(tmp_path / "digit.png")
        code = blocks("A photographed digit")[0].replace("digit.jpg", "digit.png")
        assert run(code).startswith("7 (")

    write_mnist(tmp_path / "data/MNIST/raw")
    run(blocks("Look inside")[0])
    assert {"worst.png", "losses.png"} < {path.name for path in tmp_path.iterdir()}


def test_two_processes(run, tmp_path):
    # They share the work, print once and without a warning, and save once.
    write_mnist(tmp_path / "data/MNIST/raw")
    code = blocks("Several GPUs or machines")[0]
    launcher = ["-W", "error", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    output = run(code.replace("epochs=8", "epochs=2"), launcher)
    assert re.fullmatch(r"epoch 1/2: .*\nepoch 2/2: .*\n", output)
    saved = torch.load(tmp_path / "parallel.pt")
    vit.VisionTransformer(**saved["sizes"]).load_state_dict(saved["weights"])


def test_equal_to_timm(run):
    assert float(run(blocks("Trust it")[0])) < 1e-5


def test_edits_fit():
    # The lines that the README says to change are there.
    line = re.search(r"torch\.autocast\(.*?\): (.*?)\.float\(\)", README)[1]
    assert f"            {line}\n" in VIT
    edits = re.findall(r": `(.*?)` to `.*?`(, \w+)?", README)
    assert len(edits) > 4
    for old, times in edits:
        assert VIT.count(old) == {"": 1, ", both": 2, ", all": 3}[times]


def test_printed_run_and_options(tmp_path, monkeypatch, capsys):
    # The form of the printed run is the program's, and all options in commands exist.
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.setattr("sys.argv", ["vit.py", "--device", "cpu", "--epochs", "1"])
    vit.main()
    out = capsys.readouterr().out
    forms = set(re.sub(r"[\d,.]*\d", "0", out).split("\n"))
    printed = re.sub(r"[\d,.]*\d", "0", blocks("Quick start", "text")[0]).split("\n")
    assert set(printed) - {"..."} == forms

    text = README.replace("\\\n", "").replace("--epochs N", "--epochs 1")
    commands = re.findall(r"(?:vit.py|: `)(?= --|--[^w])(.*?)[`\n]", text)
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr("sys.argv", ["vit.py", *command.split()])
        vit.parse_options()


def test_lists_of_packages_agree():
    header = re.search(r"# dependencies = \[(.*)\]", VIT)[1]
    packages = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"(.*?)"', header) + ["pytest>=8"] == packages
    oldest = README.split("oldest")[1].lower()
    for package in packages[:3]:
        assert package.replace(">=", " ") in oldest
