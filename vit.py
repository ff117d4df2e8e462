# SPDX-License-Identifier: MIT-0
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///
"""A Vision Transformer (ViT) in PyTorch, trained on MNIST: run it, read it, copy it.

    python vit.py           # 8 epochs: 99.1% test accuracy in about two minutes
    python vit.py --help    # list the options

Cut an image into patches, treat them as words, and a plain transformer (the blocks
below) learns to see ("An Image is Worth 16x16 Words", Dosovitskiy et al., 2020,
https://arxiv.org/abs/2010.11929). The path of one image through the model:

    image         (1, 28, 28)  one gray channel, 0 (black) to 1 (white)
    patches       (16, 49)     a 4 x 4 grid, 7 x 7 pixels each
    tokens        (16, 64)     a linear layer turns each patch into a vector
    class token   (17, 64)     one more token, [CLS], stands for the whole image
    positions     (17, 64)     a learned vector tells each token where it is
    blocks        (17, 64)     4 times: attention passes information between tokens,
                               then an MLP processes each token separately
    logits        (10)         a linear layer turns [CLS] into one logit per digit

Shape notation: B images, C channels, H x W pixels, N patches of P x P pixels,
T = N + 1 tokens (with [CLS]), embedding dimension D, h attention heads.
"""

import argparse
import math
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid


# --- Hyperparameters ------------------------------------------------------------------
def parse_options():
    """Return the command-line options."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    # An option has the type of its default.
    def option(name, default, help):
        parser.add_argument(name, type=type(default), default=default, help=help)

    # The model.
    option("--patch-size", 7, "side of a patch in pixels")
    option("--embed-dim", 64, "embedding dimension: numbers per token")
    option("--depth", 4, "number of blocks")
    option("--n-heads", 4, "attention heads per block")
    option("--mlp-ratio", 2.0, "hidden size of the MLP, as a multiple of embed-dim")
    option("--dropout", 0.0, "dropout probability; helps on long runs")

    # The training.
    option("--epochs", 8, "passes over the training set")
    option("--batch-size", 128, "images per step")
    option("--lr", 5e-3, "peak learning rate; lower it for larger models")
    option("--weight-decay", 0.05, "weight decay of AdamW")
    option("--seed", 0, "random seed")

    # Where it runs, reads and writes.
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    option("--device", device, "cpu, cuda, cuda:1, mps, ...")
    option("--data-dir", Path("data"), "folder for MNIST, downloaded if absent")
    option("--out-dir", Path("out"), "folder for the trained model and a picture")
    return parser.parse_args()


# --- Model ----------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """Cut images into patches and turn each into a token: (B, C, H, W) -> (B, N, D).

    Raises ValueError unless patch_size divides img_size and H = W = img_size.
    """

    def __init__(self, img_size, patch_size, in_channels, embed_dim):
        super().__init__()
        if img_size % patch_size != 0:
            raise ValueError(
                f"patch_size must divide img_size, got {patch_size} and {img_size}"
            )
        self.img_size = img_size

        # A convolution whose stride equals its kernel size applies the same linear
        # layer to each patch.
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        if images.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"img_size is {self.img_size}, got images {tuple(images.shape)}"
            )

        x = self.proj(images)  # (B, D, H/P, W/P)
        x = x.flatten(2)  # (B, D, N)
        return x.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) -> (B, T, D).

    Each token has a query (what it looks for), a key (what it is found by) and a value
    (what it passes on). It receives the average of all values, weighted by how well its
    query matches each key. Several heads do this in parallel, so that a token can look
    for several things at once. Raises ValueError if n_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim, n_heads, qkv_bias, dropout):
        super().__init__()
        if embed_dim % n_heads != 0:
            raise ValueError(
                f"n_heads must divide embed_dim, got {n_heads} and {embed_dim}"
            )
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def queries_keys_values(self, x):
        """Return queries, keys and values: (B, T, D) -> each (B, h, T, D/h)."""
        # One linear layer computes them for all heads: h queries of D/h numbers, then h
        # keys, then h values.
        x = self.qkv(x)  # (B, T, 3D)
        x = x.unflatten(2, (3 * self.n_heads, -1))  # (B, T, 3h, D/h)
        x = x.transpose(1, 2)  # (B, 3h, T, D/h)
        return x.chunk(3, dim=1)  # each (B, h, T, D/h)

    def attention_weights(self, x):
        """Return how much each token attends to each: (B, T, D) -> (B, h, T, T)."""
        q, k, _ = self.queries_keys_values(x)

        # If a query and a key match, their dot product is large. Variance grows with
        # D/h, the number of terms; dividing by sqrt(D/h) undoes that. Otherwise,
        # softmax could pick a single token and leave almost no gradient.
        q = q / math.sqrt(q.shape[3])
        scores = q @ k.transpose(2, 3)
        return scores.softmax(dim=3)  # the weights of each query sum to 1

    def forward(self, x):
        # This is attention_weights(x) @ v, scale included, without storing the weights.
        q, k, v = self.queries_keys_values(x)
        x = F.scaled_dot_product_attention(q, k, v)

        # Join the heads; proj combines what they have found.
        x = x.transpose(1, 2).flatten(2)  # (B, T, D)
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    """Process each token separately: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Attention mixes tokens; the MLP finds new features in each. Its wide first
        # layer looks for many, GELU (a smooth ReLU) silences those absent, and the
        # second layer combines the rest.
        x = self.fc1(x)  # (B, T, hidden_dim)
        x = F.gelu(x)
        x = self.dropout(x)
        x = self.fc2(x)
        return self.dropout(x)


class Block(nn.Module):
    """Attention between tokens, then an MLP on each: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, n_heads, mlp_ratio, qkv_bias, dropout):
        super().__init__()
        # LayerNorm brings each token to mean 0 and variance 1, then applies a learned
        # scale and shift, so that the next layer gets inputs of stable size.
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, n_heads, qkv_bias=qkv_bias, dropout=dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), dropout=dropout)

    def forward(self, x):
        # Residual connections: a layer adds to a token but never replaces it. Gradients
        # pass through sums unchanged, so even the first block learns quickly.
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class VisionTransformer(nn.Module):
    """Classify images: (B, in_channels, img_size, img_size) -> logits (B, num_classes).

    With num_classes=0 there is no head: it returns the class token (B, embed_dim).
    The defaults give ViT-B/16, the paper's base model. Parameters are named as in the
    library timm, whose plain ViT checkpoints load unchanged.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_channels=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        n_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        dropout=0.0,
    ):
        super().__init__()

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_channels=in_channels, embed_dim=embed_dim
        )

        # The class token enters the blocks as the same vector for every image. There it
        # gathers what the head needs.
        self.cls_token = nn.Parameter(0.2 * torch.randn(1, 1, embed_dim))

        # Attention, a weighted average, ignores order, so we add a learned position
        # embedding to each token. Its initial standard deviation, 0.2, is about that of
        # embedded MNIST patches, so that neither dominates.
        n_tokens = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, n_tokens, embed_dim))
        self.dropout = nn.Dropout(dropout)

        blocks = [
            Block(embed_dim, n_heads, mlp_ratio, qkv_bias=qkv_bias, dropout=dropout)
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks)

        # Tokens grow from block to block: normalize once more.
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def embed(self, images):
        """Turn images into tokens, [CLS] first: (B, C, H, W) -> (B, T, D)."""
        patches = self.patch_embed(images)  # (B, N, D)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls_token, patches], dim=1)
        return self.dropout(x + self.pos_embed)

    def forward_features(self, images):
        """Return the normalized tokens after all blocks: (B, C, H, W) -> (B, T, D)."""
        x = self.embed(images)
        x = self.blocks(x)
        return self.norm(x)

    def forward(self, images):
        tokens = self.forward_features(images)
        return self.head(tokens[:, 0])  # [CLS] alone

    def attention_maps(self, images):
        """Return attention weights (needs eval mode): images -> (B, depth, h, T, T)."""
        maps = []
        x = self.embed(images)
        for block in self.blocks:
            maps.append(block.attn.attention_weights(block.norm1(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


# --- Data -----------------------------------------------------------------------------
def load_mnist(folder):
    """Return MNIST's training set and test set, downloaded to folder if necessary.

    Each is a TensorDataset of images (1, 28, 28), from 0 to 1, and labels, 0 to 9.
    """
    datasets = []
    for is_training_set in True, False:
        mnist = MNIST(folder, train=is_training_set, download=True)

        # Convert once; torchvision would do it again every epoch.
        images = mnist.data.unsqueeze(1) / 255
        datasets.append(TensorDataset(images, mnist.targets))
    return datasets


def augment(images):
    """Distort each image at random: (B, C, H, W) -> same shape, in float32.

    New variants in each epoch are harder to memorize.
    """
    # A 2 x 3 matrix maps each position (x, y, 1) in the result to its source in the
    # image; x and y run from -1 to 1. The identity changes nothing; noise in the last
    # column shifts; elsewhere it rotates, scales and shears.
    noise = torch.empty(images.shape[0], 2, 3).uniform_(-0.15, 0.15)
    matrix = torch.eye(2, 3) + noise

    # Half precision would be too coarse for positions.
    images = images.float()
    sources = F.affine_grid(matrix.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, sources, align_corners=False)


def make_synthetic_digits(n):
    """Return a TensorDataset of n augmented digits in Pillow's default font."""
    digits = []
    for digit in "0123456789":
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), digit, 255, anchor="mm", font_size=24)
        digits.append(to_tensor(image))

    labels = torch.arange(n) % 10
    images = torch.stack(digits)[labels]
    return TensorDataset(augment(images), labels)


def load_digits(folder):
    """Return the name, training set and test set: MNIST or, offline, synthetic digits.

    Raises RuntimeError if MNIST fails to load for another reason.
    """
    try:
        return "MNIST", *load_mnist(folder)
    except Exception as error:
        # Fall back only if a failed download left no file.
        offline = isinstance(error, (RuntimeError, ConnectionError, TimeoutError))
        if not offline or any(Path(folder, "MNIST/raw").glob("*ubyte*")):
            raise RuntimeError(
                "cannot load MNIST: expected train-images-idx3-ubyte.gz and companions "
                f"in {folder}/MNIST/raw (delete damaged files there), got {error!r}"
            ) from error
        print(f"{error}\nNo MNIST in {folder}: synthetic digits", file=sys.stderr)

    datasets = make_synthetic_digits(10_000), make_synthetic_digits(2_000)
    return "synthetic digits", *datasets


# --- Training -------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, loader):
    """Set eval mode; return the accuracy, 0 to 1, on batches of (images, labels)."""
    device = next(model.parameters()).device
    model.eval()  # dropout off

    correct = []
    for images, labels in loader:
        predictions = model(images.to(device)).argmax(dim=1).to(labels.device)
        # view_as keeps == from broadcasting labels of another shape.
        hits = predictions.view_as(labels) == labels
        correct += hits.flatten().tolist()
    return statistics.fmean(correct)


def train(
    model, loader, epochs, lr, weight_decay=0.05, test_loader=None, transform=None
):
    """Train the model in place, on its device; return the loss of each step.

    loader, test_loader: batches of (images, labels); loader must support len(). Images
    should be normalized, although MNIST does without.
    lr: peak learning rate, such as 5e-3 for a small model, 1e-4 for a pretrained one.
    transform: a function applied to the images of each training batch.

    Each call runs a whole learning-rate schedule and prints a line for each epoch.
    Leaves the model in eval mode. Raises FloatingPointError if a loss is not finite.
    """
    device = next(model.parameters()).device

    # AdamW moves each parameter against the average of its recent gradients (momentum),
    # divided by their typical size, so that all move at a similar pace. Weight decay
    # also shrinks the parameters slightly, to discourage large ones.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, weight_decay=weight_decay, fused=True
    )

    # Warm-up: while AdamW estimates these sizes, the learning rate rises from lr/25 to
    # lr, over the first 30% of steps. Then it falls along a cosine to almost 0, so that
    # the model settles. (OneCycleLR's defaults, except that momentum stays constant.)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs=epochs, steps_per_epoch=len(loader), cycle_momentum=False
    )

    losses = []
    for epoch in range(epochs):
        model.train()  # dropout on; evaluate turns it off
        start = time.perf_counter()
        epoch_losses = []
        n_images = 0

        for images, labels in loader:
            images = images.to(device)
            labels = labels.to(device)
            if transform:
                images = transform(images)

            # Forward: compute the logits and the loss, the mean of -log(p), where p is
            # the model's probability of the true class.
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"loss is {loss.item()} in epoch {epoch + 1}: lower the learning "
                    "rate, or check for non-finite images"
                )

            # Backward: compute the gradients.
            optimizer.zero_grad()
            loss.backward()

            # Update.
            optimizer.step()
            scheduler.step()

            epoch_losses.append(loss.item())
            n_images += images.shape[0]
            if os.isatty(1):  # the output is a terminal
                print(f"epoch {epoch + 1}: step {len(epoch_losses)}", end="\r")

        losses += epoch_losses
        speed = n_images / (time.perf_counter() - start)
        line = f"epoch {epoch + 1}/{epochs}: loss {statistics.fmean(epoch_losses):.4f}"
        if test_loader is not None:
            line += f", test accuracy {evaluate(model, test_loader):.2%}"
        print(f"{line}, {speed:,.0f} images/s", flush=True)

    model.eval()
    return losses


# --- Picture --------------------------------------------------------------------------
@torch.no_grad()
def draw_results(model, images, labels, losses):
    """Return a picture of 16 digits, the attention of [CLS], and the losses.

    Expects eval mode, and images from 0 to 1, on the CPU.
    """
    # The first eight digits, and the eight with the highest loss.
    logits = model(images)
    worst = F.cross_entropy(logits, labels, reduction="none").topk(8).indices
    chosen = torch.cat([torch.arange(8), worst])

    # How much [CLS], token 0, attends to each patch in the last block.
    maps = model.attention_maps(images[chosen])  # (16, depth, h, T, T)
    attention = maps[:, -1, :, 0, 1:].mean(dim=1)  # (16, N)
    n_rows = math.isqrt(attention.shape[1])
    attention = attention.unflatten(1, (1, n_rows, n_rows))

    # The more attention, the more orange; the root makes weak attention visible. White
    # lines separate the patches.
    digits = F.interpolate(images[chosen], 112)
    opacity = F.interpolate(attention.sqrt(), 112)
    orange = torch.tensor([1, 0.5, 0]).view(3, 1, 1)
    digits = digits.lerp(orange, opacity)
    digits[:, :, :: 112 // n_rows] = 1
    digits[..., :: 112 // n_rows] = 1

    # Two rows, with text above each digit.
    grid = make_grid(digits, padding=20, pad_value=1)
    picture = to_pil_image(F.pad(grid, (0, 0, 0, 196), value=1))
    canvas = ImageDraw.Draw(picture)
    for i, index in enumerate(chosen):
        place = 20 + 132 * (i % 8), 6 + 132 * (i // 8)
        canvas.text(place, f"{labels[index]} read as {logits[index].argmax()}", "black")

    # The loss curve.
    x = torch.linspace(20, 1056, len(losses))
    y = 460 - 150 * torch.tensor(losses) / max(losses)
    canvas.line(list(zip(x, y)), "steelblue")
    canvas.rectangle((20, 310, 1056, 460), outline="gray")
    canvas.text((20, 286), "orange: attention of [CLS] in the last block", "black")
    canvas.text((20, 464), f"loss, {len(losses)} steps, max {max(losses):.2f}", "black")
    return picture


# --- Command --------------------------------------------------------------------------
def main():
    options = parse_options()
    torch.manual_seed(options.seed)
    socket.setdefaulttimeout(20)  # seconds to wait for a server
    options.out_dir.mkdir(parents=True, exist_ok=True)

    # Model.
    sizes = {
        "img_size": 28,
        "patch_size": options.patch_size,
        "in_channels": 1,
        "num_classes": 10,
        "embed_dim": options.embed_dim,
        "depth": options.depth,
        "n_heads": options.n_heads,
        "mlp_ratio": options.mlp_ratio,
        "dropout": options.dropout,
    }
    model = VisionTransformer(**sizes).to(options.device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters on {options.device}")

    # Data.
    data, train_set, test_set = load_digits(options.data_dir)
    loader = DataLoader(train_set, batch_size=options.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=1000)
    print(f"{data}: {len(train_set):,} training images, {len(test_set):,} test images")

    # Training. Test accuracy is never used for tuning.
    losses = train(
        model,
        loader,
        epochs=options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        test_loader=test_loader,
        transform=augment,
    )
    accuracy = evaluate(model, test_loader)

    # Results. Each is written under a temporary name, so a failure leaves an earlier
    # one intact. Saved from the CPU, weights load anywhere.
    name = "mnist" if data == "MNIST" else "synthetic"
    part = options.out_dir / f"{name}.part"
    model_path = options.out_dir / f"{name}.pt"
    picture_path = options.out_dir / f"{name}.png"
    print(f"writing {model_path} and {picture_path}")
    torch.save({"sizes": sizes, "weights": model.cpu().state_dict()}, part)
    part.replace(model_path)

    images, labels = test_set[:1000]
    draw_results(model, images, labels, losses).save(part, "PNG")
    part.replace(picture_path)
    print(f"{data} test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
