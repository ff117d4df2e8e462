"""The README's Python blocks, on made-up files: each by itself, the last one in two processes."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from helpers import ROOT, write_mnist
from PIL import Image, ImageDraw

import vit

blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
photos, digit, published, many = blocks
os.chdir(tempfile.mkdtemp())
Path("vit.py").write_text((ROOT / "vit.py").read_text())
# every second of 1,919 images: 15 batches of 64 from the first on, 14 from the second on
write_mnist(Path("data/MNIST/raw"), sizes=(1_919, 60))

for i in range(160):  # two classes: wide and high, in the modes that pictures come in
    box, mode = [(10, 40, 110, 60), (50, 10, 70, 90)][i % 2], ["RGB", "L", "CMYK"][i % 3]
    path = Path("photos", "wide" if i % 2 == 0 else "high", f"{i}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.effect_noise((120, 100), 40).convert("RGB")
    ImageDraw.Draw(picture).rectangle(box, "white")
    picture.convert(mode).save(path)
picture.save("new.jpg")
picture.save("photo.jpg")
paper = Image.effect_noise((600, 800), 10).point(lambda value: min(255, value + 90))
ImageDraw.Draw(paper).text((300, 300), "7", 20, font_size=300)
paper.save("digit.jpg")
deit = vit.VisionTransformer(224, 16, 3, 1000, embed_dim=192, depth=12, n_heads=3)
torch.save({"model": deit.state_dict()}, "deit_tiny_patch16_224-a1311bcf.pth")


def run(command, block, name):
    Path(name).write_text(block)
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    return done.stdout


subprocess.run([sys.executable, "vit.py", "--epochs", "8", "--batch-size", "20"], check=True)
out = run([sys.executable], photos, "own.py")
assert out.count("\nepoch ") == 19 and out.splitlines()[-1].startswith("high "), out
print("own images:", out.splitlines()[-1])
out = run([sys.executable], digit + "\nassert tint.shape == (4, 4)\n", "digit.py")
assert out.startswith("a 7, "), out
print("photographed digit:", out.strip())
run([sys.executable], published + "\nassert logits.shape == (1, 1000)\n", "published.py")
print("published weights")
torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
out = run(torchrun, many, "many.py")
assert out.count("epoch ") == out.count("test accuracy") == 8, out
print("two processes:", out.splitlines()[-1])
