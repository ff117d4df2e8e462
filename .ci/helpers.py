"""A tiny model and a tiny MNIST of synthetic digits, for the checks in this folder."""

import gzip
import hashlib
from pathlib import Path

import vit

ROOT = Path(vit.__file__).resolve().parent

# No two sizes are equal, so that none can be mistaken for another.
TINY_SIZES = {
    "img_size": 28,
    "patch_size": 7,
    "in_channels": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depth": 3,
    "n_heads": 2,
    "mlp_ratio": 1.5,
}


def write_mnist(folder, archives=False, sizes=(240, 60)):
    """Write the four files of MNIST, or .gz archives of them, with so many images.

    Returns torchvision's list of files: (name, md5).
    """
    folder.mkdir(parents=True, exist_ok=True)
    resources = []
    for split, n in zip(["train", "t10k"], sizes, strict=True):
        images, labels = vit.make_synthetic_digits(n).tensors
        pixels = (images * 255).byte()

        # Each file starts with its type and its sizes, in four bytes each.
        count = n.to_bytes(4, "big")
        side = (28).to_bytes(4, "big")
        contents = {
            "images-idx3-ubyte": b"\0\0\x08\3" + count + side + side + to_bytes(pixels),
            "labels-idx1-ubyte": b"\0\0\x08\1" + count + to_bytes(labels),
        }

        for kind, content in contents.items():
            name = f"{split}-{kind}"
            if archives:
                name += ".gz"
                content = gzip.compress(content)
            (folder / name).write_bytes(content)
            md5 = hashlib.md5(content).hexdigest()
            resources.append((name, md5))
    return resources


def to_bytes(numbers):
    """Return a tensor of numbers from 0 to 255 as bytes."""
    return bytes(numbers.flatten().tolist())
