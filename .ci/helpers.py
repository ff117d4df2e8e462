"""A tiny MNIST of drawn digits, for the checks beside this file."""

import gzip
import hashlib
from pathlib import Path

import vit

ROOT = Path(vit.__file__).parent


def write_mnist(folder, archives=False, sizes=(240, 60)):
    """MNIST's four files, or archives of them; returns torchvision's list of (name, md5)."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = []
    for split, n in zip(("train", "t10k"), sizes, strict=True):
        images, labels = vit.draw_digits(n).tensors
        head = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        pixels = bytes((images * 255).byte().flatten().tolist())
        for kind, data in [
            ("images-idx3-ubyte", b"\0\0\x08\3" + head + pixels),
            ("labels-idx1-ubyte", b"\0\0\x08\1" + head[:4] + bytes(labels.tolist())),
        ]:
            name = f"{split}-{kind}" + ".gz" * archives
            data = gzip.compress(data) if archives else data
            (folder / name).write_bytes(data)
            resources.append((name, hashlib.md5(data).hexdigest()))
    return resources
