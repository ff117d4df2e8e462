"""A tiny model and a tiny MNIST of synthetic digits, for the checks in this folder."""

from pathlib import Path

import torch

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


def make_model(**changes):
    """Return the tiny model, with the same random weights in each test."""
    torch.manual_seed(0)
    return vit.VisionTransformer(**TINY_SIZES | changes)


def write_mnist(folder, sizes=(240, 60)):
    """Write the four files of MNIST, with so many images to train and to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in zip(["train", "t10k"], sizes, strict=True):
        images, labels = vit.make_synthetic_digits(n).tensors

        # Each file starts with its type and its sizes, in four bytes each.
        count, side = n.to_bytes(4, "big"), (28).to_bytes(4, "big")
        pixels = (images * 255).byte().flatten().tolist()
        contents = {
            "images-idx3-ubyte": b"\0\0\x08\3" + count + side + side + bytes(pixels),
            "labels-idx1-ubyte": b"\0\0\x08\1" + count + bytes(labels.tolist()),
        }
        for kind, content in contents.items():
            (folder / f"{split}-{kind}").write_bytes(content)
