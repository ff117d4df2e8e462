"""What main passes on, and what the picture shows, seen from inside."""

import sys
import tempfile
from pathlib import Path

import torch
from helpers import write_mnist
from torchvision.transforms.functional import to_tensor

import vit

out = Path(tempfile.mkdtemp())
write_mnist(out / "MNIST" / "raw")


def train(model, loader, test_loader, *rest):
    """Instead of the training: note what it was told, then Ctrl-C."""
    told.extend([next(model.parameters()).device.type, torch.initial_seed(), *rest])
    told.extend([type(loader.sampler).__name__, loader.batch_size, len(test_loader.dataset)])
    raise KeyboardInterrupt


told, vit.train = [], train
options = "--epochs 3 --lr 0.5 --weight-decay 0.25 --seed 7 --batch-size 9 --device cpu"
sys.argv = ["vit.py", *options.split(), "--data-dir", str(out), "--out-dir", str(out)]
vit.main()
assert told == ["cpu", 7, 3, 0.5, 0.25, vit.augment, "RandomSampler", 9, 60], told
saved = torch.load(out / "vit.pt", weights_only=True)
assert saved["data"] == "MNIST" and saved["weights"]["head.weight"].shape == (10, 64)
assert {"vit.pt", "vit.png", "MNIST"} == {path.name for path in out.iterdir()}
print("main passes on its options, and Ctrl-C keeps the model")

model = vit.VisionTransformer(28, 7, 1, 10, 16, 2, 2).eval()
images = torch.zeros(12, 1, 28, 28)
labels = model(images).argmax(dim=1)
labels[3:] = (labels[3:] + 1) % 10  # three right, nine wrong
maps = torch.zeros(1, 2, 2, 17, 17)
maps[:, -1, :, 0, 1 + 4 * 1 + 2] = 1  # [CLS] looks at the patch in row 1, column 2
model.attention_maps = lambda batch: maps
picture = vit.draw_attention(model, images, labels)
for top, n, words in ((24, 3, "green"), (164, 8, "red")):
    for column in range(8):
        tile = picture.crop((8 + 120 * column, top, 120 + 120 * column, top + 112))
        hot = tile.point(lambda value: 255 * (value > 200)).getchannel("R").getbbox()
        assert hot == ((56, 28, 84, 56) if column < n else (0, 0, 112, 112)), (top, column, hot)
    text = to_tensor(picture.crop((0, top - 20, 968, top))).mean(dim=(1, 2))
    assert ["red", "green"][text[:2].argmax()] == words and text.min() < 1, (words, text)
print("the picture: where it looks, what is right and what is wrong")
