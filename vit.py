# SPDX-License-Identifier: MIT-0
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision>=0.22", "pillow>=10.1"]
# ///
"""A Vision Transformer (ViT) in PyTorch, trained on MNIST: run it, read it, copy it.

    python vit.py           # 8 epochs: 99.1% test accuracy in about two minutes
    python vit.py --help    # list the options

Cut an image into patches, treat them as words, and a plain transformer (a stack of
blocks) learns to see ("An Image is Worth 16x16 Words," Dosovitskiy et al., 2020,
https://arxiv.org/abs/2010.11929). The path of one image through the model:

    image         (1, 28, 28)  one gray channel, 0 (black) to 1 (white)
    patches       (16, 49)     a 4 x 4 grid of patches, 7 x 7 pixels each
    tokens        (16, 64)     a linear layer turns each patch into a vector, its token
    class token   (17, 64)     one more token, [CLS], stands for the whole image
    positions     (17, 64)     plus a learned vector for the place of each token
    blocks        (17, 64)     4 times: attention passes information between tokens,
                               then an MLP (two linear layers) processes each token
    logits        (10)         a linear layer turns [CLS] into a score (logit) per digit

Letters in shapes: B images, C = 1 channel, H = W = 28 pixels, N = 16 patches, P = 7
pixels per patch side, T = 17 tokens, D = 64 numbers per token, h = 4 attention heads.
Linear layers and LayerNorm act on the last dimension: in a (B, T, D) tensor, they
process each token separately.
"""

import argparse
import math
import os
import socket
import sys
import time
from pathlib import Path
from statistics import fmean

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
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def option(name, default, help):
        parser.add_argument(name, type=type(default), default=default, help=help)

    option("--patch-size", 7, "side of a patch in pixels")
    option("--embed-dim", 64, "embedding dimension: numbers per token")
    option("--depth", 4, "number of blocks")
    option("--n-heads", 4, "attention heads per block")
    option("--mlp-ratio", 2.0, "hidden size of the MLP, as a multiple of embed-dim")
    option("--dropout", 0.0, "share of numbers zeroed in training; curbs memorizing")

    option("--epochs", 8, "passes over the training set")
    option("--batch-size", 128, "images per training step")
    option("--lr", 5e-3, "peak learning rate; lower it for larger models")
    option("--weight-decay", 0.05, "each step multiplies parameters by 1 - lr * this")
    option("--seed", 0, "random seed")

    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    option("--device", device, "cpu, cuda, cuda:1, mps, ...")
    option("--data-dir", Path("data"), "folder for MNIST, downloaded if absent")
    option("--out-dir", Path("out"), "folder for the trained model and its picture")
    return parser.parse_args()


# --- Model ----------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """Turn each patch of the images into a token: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size, in_channels, embed_dim):
        super().__init__()
        # A convolution slides a window over the image and applies a linear layer to the
        # pixels inside. With a stride (step) of the window's size, it equals
        # nn.Linear(49, 64) on each of the 16 patches.
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        x = self.proj(images)  # (B, D, H/P, W/P): a grid of tokens
        x = x.flatten(2)  # (B, D, N): a row of tokens
        return x.transpose(1, 2)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention between tokens: (B, T, D) -> (B, T, D).

    In each head, linear layers turn each token into three vectors of D/h = 16 numbers:
    a query (what it looks for), a key (what queries are compared with), and a value
    (what it passes on). A query may ask where a cut stroke continues; a neighbor's key
    may answer "here," and the neighbor's value may give the direction. The better a key
    matches, the more its value counts. Training alone decides what the vectors say.
    From all tokens j, a token with query q computes:

        score_j  = (q / 4) . key_j                      dot product; 4 = sqrt(16)
        weight_j = exp(score_j) / sum_i exp(score_i)    softmax: positive, sum 1
        result   = sum_j weight_j value_j               weighted average of values

    Four heads, each with its own linear layers, look for four things at once. Their
    results, side by side, are 64 numbers again. The linear layer proj mixes them, so
    that each number can combine what several heads found.
    """

    def __init__(self, embed_dim, n_heads, qkv_bias):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def queries_keys_values(self, x):
        """Return queries, keys, and values: (B, T, D) -> each (B, h, T, D/h)."""
        # One linear layer acts as twelve: each token gets 192 = 3 x 4 x 16 numbers, a
        # query, a key, and a value of 16 numbers for each of four heads.
        x = self.qkv(x)  # (B, T, 3D): (B, 17, 192)
        x = x.unflatten(2, (3, self.n_heads, -1))  # (B, T, 3, h, D/h)
        q, k, v = x.unbind(2)  # each (B, T, h, D/h): (B, 17, 4, 16)

        # The product @ multiplies matrices in the last two dimensions. So we swap
        # tokens and heads: each head then has a (17, 16) matrix.
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attention_weights(self, x):
        """Return the attention weights, for drawing: (B, T, D) -> (B, h, T, T)."""
        q, k, _ = self.queries_keys_values(x)

        # Large scores leave almost no gradient: scores of 8 and 0 give weights of
        # 0.9997 and 0.0003, and small changes in the scores change almost nothing. A
        # score is a sum of 16 products. If these are independent with variance 1, the
        # score has variance 16 (variances add). Dividing by sqrt(16) = 4 restores 1.
        q = q / math.sqrt(q.shape[3])
        scores = q @ k.transpose(2, 3)  # (B, h, T, T): queries by keys
        return scores.softmax(dim=3)  # over the keys

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)

        # Equals attention_weights(x) @ v but stores no weights.
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, T, D/h)
        x = x.transpose(1, 2)  # (B, T, h, D/h)
        x = x.flatten(2)  # (B, T, D): the heads side by side
        return self.proj(x)


class MLP(nn.Module):
    """A multilayer perceptron, applied to each token: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Attention averages what tokens hold; the MLP finds new features in each token.
        # Its wide first layer tests for many features, such as a corner. GELU (a smooth
        # ReLU) brings negative results (feature absent) close to 0. The second layer
        # combines the rest. Without GELU, two linear layers would act as one.
        x = self.fc1(x)
        x = F.gelu(x)
        x = self.dropout(x)
        return self.fc2(x)


class Block(nn.Module):
    """Attention between tokens, then an MLP on each token: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, n_heads, mlp_ratio, qkv_bias, dropout):
        super().__init__()
        # LayerNorm brings the D numbers of each token to mean 0 and variance 1, then
        # applies a learned scale and shift, at first 1 and 0. Without it, each layer's
        # input would grow from block to block, since each block adds to the tokens.
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, n_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Residual connections: a layer f adds to the tokens and never replaces them.
        # For a single number, the derivative of x + f(x) is 1 + f'(x). Without the 1,
        # the product of all layers' derivatives could be almost 0, and the first of
        # many blocks would hardly learn.
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class VisionTransformer(nn.Module):
    """Classify images: (B, in_channels, img_size, img_size) -> logits (B, num_classes).

    The defaults give ViT-B/16, the paper's base model. Pretrained plain ViTs of the
    timm library load unchanged. With num_classes=0, the model returns [CLS] (B, D).
    Raises ValueError if sizes do not divide, AssertionError if images do not fit.
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

        if img_size % patch_size or embed_dim % n_heads:
            raise ValueError(
                f"patch_size must divide img_size, got {patch_size} and {img_size}; "
                f"n_heads must divide embed_dim, got {n_heads} and {embed_dim}"
            )
        self.img_size = img_size
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)

        # Every image gets the same learned class token. In the blocks, it gathers from
        # the patches what the last linear layer needs.
        self.cls_token = nn.Parameter(0.2 * torch.randn(1, 1, embed_dim))

        # Averages ignore order: to tell attention where each token is, we add a learned
        # position embedding. Training can use some of the D numbers for content, others
        # for place.
        n_tokens = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, n_tokens, embed_dim))
        self.dropout = nn.Dropout(dropout)

        blocks = [
            Block(embed_dim, n_heads, mlp_ratio, qkv_bias, dropout)
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks)

        # The tokens grow from block to block: normalize once more.
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def embed(self, images):
        """Turn images into tokens, [CLS] first: (B, C, H, W) -> (B, T, D)."""
        fits = images.shape[2:] == (self.img_size, self.img_size)
        torch._assert(fits, f"img_size is {self.img_size}, got images {images.shape}")

        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls_token, patches], dim=1)
        return self.dropout(x + self.pos_embed)

    def forward_features(self, images):
        """Return the normalized tokens after all blocks: (B, C, H, W) -> (B, T, D)."""
        x = self.embed(images)
        x = self.blocks(x)
        return self.norm(x)

    def forward(self, images):
        x = self.forward_features(images)
        return self.head(x[:, 0])  # [CLS] alone

    @torch.no_grad()
    def attention_maps(self, images):
        """Return all attention weights: (B, C, H, W) -> (B, depth, h, T, T)."""
        maps = []
        x = self.embed(images)
        for block in self.blocks:
            maps.append(block.attn.attention_weights(block.norm1(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


# --- Data -----------------------------------------------------------------------------
def load_mnist(folder):
    """Return MNIST's training and test sets, downloaded to folder if necessary.

    Each is a TensorDataset of (1, 28, 28) images from 0 to 1 and labels from 0 to 9.
    """
    datasets = []
    for is_training_set in True, False:
        mnist = MNIST(folder, train=is_training_set, download=True)
        images = mnist.data.unsqueeze(1) / 255
        datasets.append(TensorDataset(images, mnist.targets))
    return datasets


def augment(images):
    """Distort each image at random: (B, C, H, W) -> same shape, in float32.

    Images that change every epoch are hard to memorize.
    """
    # Pixel (x, y) of the result is read from the image at (x', y'), where
    #
    #     x' = x + a x + b y + c     y' = y + d x + e y + f
    #
    # and a to f are noise. From edge to edge, x and y run from -1 to 1, so 1 is 14
    # pixels: c and f, at most 0.15, shift the image by up to 2 pixels; a and e scale
    # it; b and d shear it (rotate it, if b = -d).
    noise = torch.empty(images.shape[0], 2, 3).uniform_(-0.15, 0.15)
    matrix = torch.eye(2, 3) + noise  # rows (1 + a, b, c) and (d, 1 + e, f)

    # affine_grid computes where to read; grid_sample reads there, blending neighboring
    # pixels (black outside the image).
    images = images.float()
    places = F.affine_grid(matrix.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


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
    """Return name, training set, and test set: MNIST or, offline, synthetic digits."""
    try:
        return "MNIST", *load_mnist(folder)
    except Exception as error:
        # Fall back only if a download failed and no MNIST file exists.
        offline = isinstance(error, (RuntimeError, ConnectionError, TimeoutError))
        if not offline or any(Path(folder, "MNIST/raw").glob("*ubyte*")):
            raise RuntimeError(
                f"cannot load MNIST, got {error!r}: expected four files (train-images-"
                f"idx3-ubyte.gz, ...) in {folder}/MNIST/raw; delete damaged ones"
            ) from error
        print(f"{error}\nNo MNIST in {folder}: using synthetic digits", file=sys.stderr)

    datasets = make_synthetic_digits(10_000), make_synthetic_digits(2_000)
    return "synthetic digits", *datasets


# --- Training -------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, loader):
    """Set eval mode (dropout off) and return the accuracy on the loader, 0 to 1."""
    device = next(model.parameters()).device
    model.eval()

    hits = []
    for images, labels in loader:
        predictions = model(images.to(device)).argmax(dim=1)
        labels = labels.to(device).view_as(predictions)  # labels may be (B, 1)
        hits += (predictions == labels).tolist()
    return fmean(hits)


def train(
    model, loader, epochs, lr, weight_decay=0.05, test_loader=None, transform=None
):
    """Train the model in place, on its device; return the loss of each step.

    loader, test_loader: batches of (images, labels); loader must support len().
    lr: peak learning rate, such as 5e-3 for a small model, 1e-4 for a pretrained one.
    transform: applied to the images of each training batch.

    Each call runs a whole learning-rate schedule and leaves the model in eval mode.
    Raises FloatingPointError if a loss is not finite.
    """
    device = next(model.parameters()).device

    # AdamW keeps running averages m of a parameter's gradients (momentum) and v of
    # their squares. It moves the parameter by -lr * m / sqrt(v), that is, by -lr if its
    # gradients are all 0.001 or all 10: one lr suits all parameters. Weight decay (the
    # W) also shrinks them: with small ones, similar images get similar logits.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, weight_decay=weight_decay, fused=True
    )

    # Averages of the first few gradients are unreliable, so the learning rate warms up
    # from lr/25 to lr over the first 30% of steps. Then it falls along a cosine to
    # almost 0: steps no longer jump across the minimum. (OneCycleLR's defaults.)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs=epochs, steps_per_epoch=len(loader), cycle_momentum=False
    )

    losses = []
    for epoch in range(epochs):
        model.train()  # dropout on
        start = time.perf_counter()
        n_before = len(losses)

        for images, labels in loader:
            images = images.to(device)
            labels = labels.to(device)
            if transform:
                images = transform(images)

            # Forward: compute the logits and the loss. cross_entropy turns logits into
            # probabilities (softmax) and averages -log(p of the correct class).
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"loss is {losses[-1]} in epoch {epoch + 1}: lower the learning "
                    "rate, or check the images for NaN and infinity"
                )

            # Backward: clear old gradients, compute new ones.
            optimizer.zero_grad()
            loss.backward()

            # Update.
            optimizer.step()
            scheduler.step()
            if os.isatty(1):  # stdout is a terminal
                print(f"{len(losses) / scheduler.total_steps:.0%}", end="\r")

        line = f"epoch {epoch + 1}/{epochs}: loss {fmean(losses[n_before:]):.4f}"
        if test_loader is not None:
            line += f", test accuracy {evaluate(model, test_loader):.2%}"
        print(f"{line}, {time.perf_counter() - start:.1f} s", flush=True)

    model.eval()
    return losses


# --- Picture --------------------------------------------------------------------------
def draw_attention(images, maps):
    """Return a picture of images, tinted orange where [CLS] looks in the last block.

    images: (B, 1 or 3, H, W), 0 to 1; maps: attention_maps of the same images. The maps
    show weights, not reasons: by the last block, a token also holds what other patches
    passed on, so an orange patch may not itself matter.
    """
    # The weights of [CLS] (query 0) for each patch, averaged over heads, as a grid.
    weights = maps[:, -1, :, 0, 1:].mean(dim=1)  # (B, N)
    side = math.isqrt(weights.shape[1])
    weights = weights.unflatten(1, (1, side, side))

    # The square root makes small weights visible.
    opacity = F.interpolate(weights.sqrt(), images.shape[2:])  # (B, 1, H, W)
    orange = images.new_tensor([1, 0.5, 0]).view(3, 1, 1)
    tinted = (1 - opacity) * images + opacity * orange
    return to_pil_image(make_grid(tinted, pad_value=1))


# --- Command --------------------------------------------------------------------------
def main():
    options = parse_options()
    torch.manual_seed(options.seed)
    socket.setdefaulttimeout(20)  # seconds to wait for a server
    out_dir = options.out_dir.expanduser()
    out_dir.mkdir(parents=True, exist_ok=True)

    sizes = {"img_size": 28, "in_channels": 1, "num_classes": 10}
    for size in "patch_size", "embed_dim", "depth", "n_heads", "mlp_ratio", "dropout":
        sizes[size] = getattr(options, size)
    model = VisionTransformer(**sizes).to(options.device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters on {options.device}")

    data, train_set, test_set = load_digits(options.data_dir.expanduser())
    loader = DataLoader(train_set, batch_size=options.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=1000)
    print(f"{data}: {len(train_set):,} training images, {len(test_set):,} test images")

    # We print test accuracy but select nothing with it, not even an epoch: the best of
    # many tries looks better on these images than on new ones.
    losses = train(
        model,
        loader,
        epochs=options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        test_loader=test_loader,
        transform=augment,
    )

    # Weights on the CPU load anywhere. They get a temporary name first: if saving
    # fails, an earlier model survives.
    model.cpu()
    name = "mnist" if data == "MNIST" else "synthetic"
    part = out_dir / f"{name}.part"
    torch.save({"sizes": sizes, "weights": model.state_dict(), "losses": losses}, part)
    part.replace(out_dir / f"{name}.pt")

    images, _ = test_set[:16]
    maps = model.attention_maps(images)
    picture = draw_attention(F.interpolate(images, scale_factor=4), maps)
    picture.save(out_dir / f"{name}.png")

    accuracy = evaluate(model, test_loader)
    print(f"wrote {name}.pt and {name}.png to {out_dir}")
    print(f"{data} test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
