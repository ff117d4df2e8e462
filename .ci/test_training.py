"""The data, the training, and what main makes of both."""

import gc
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_SIZES, write_mnist
from PIL import ImageChops, ImageDraw
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import vit


def make_model(**options):
    """Return the tiny model, the same in each test."""
    torch.manual_seed(0)
    return vit.VisionTransformer(**TINY_SIZES | options)


def make_batches(n_batches=3, size=6):
    """Return batches of random images and labels."""
    torch.manual_seed(1)
    batches = []
    for _ in range(n_batches):
        images = torch.rand(size, 1, 28, 28)
        labels = torch.randint(10, (size,))
        batches.append((images, labels))
    return batches


# --- The optimizer and its schedule ---------------------------------------------------


@pytest.fixture
def steps():
    """Return a list that gets the settings of the optimizer in each step."""
    settings = []

    def note(optimizer, args, kwargs):
        group = optimizer.param_groups[0]
        settings.append({"optimizer": optimizer, **group})

    with register_optimizer_step_pre_hook(note):
        yield settings


def test_learning_rate_rises_and_falls(steps):
    # Catches no warm-up, another peak than lr, and a schedule of another length.
    model = make_model()
    batches = make_batches(10)
    vit.train(model, batches, epochs=4, lr=0.01)
    rates = [step["lr"] for step in steps]
    peak = rates.index(max(rates))
    assert len(rates) == 40
    assert peak == pytest.approx(0.3 * 40, abs=1)
    assert rates[peak] == pytest.approx(0.01)

    # It starts low, ends near 0 and has a single peak.
    rising = rates[: peak + 1]
    falling = rates[peak:]
    assert rising[0] < 0.001
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.00001


def test_betas_are_those_of_adamw(steps):
    # Catches a schedule that moves the betas, as OneCycleLR does by default.
    model = make_model()
    batches = make_batches()
    vit.train(model, batches, epochs=2)
    for step in steps:
        assert step["betas"] == (0.9, 0.999)


def test_weight_decay_is_passed_on(steps):
    # Catches a fixed value, and Adam, which mixes the decay into the gradient.
    model = make_model()
    batches = make_batches()
    vit.train(model, batches, epochs=1, weight_decay=0.25)
    for step in steps:
        assert step["weight_decay"] == 0.25
        assert isinstance(step["optimizer"], torch.optim.AdamW)


def test_all_parameters_are_trained(steps):
    # Catches a group of parameters that is left out, or has settings of its own.
    model = make_model()
    batches = make_batches()
    vit.train(model, batches, epochs=1)
    parameters = list(model.parameters())
    assert len(steps[0]["params"]) == len(parameters)
    assert len(steps[0]["optimizer"].param_groups) == 1


# --- What train reports ---------------------------------------------------------------


def test_printed_loss_is_the_mean_of_the_epoch(capsys):
    # Catches the last loss, the mean since the start, and that of the epoch before.
    model = make_model()
    batches = make_batches()
    losses = vit.train(model, batches, epochs=2, lr=0.01)
    printed = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    first = sum(losses[:3]) / 3
    second = sum(losses[3:]) / 3
    assert printed == [f"{first:.4f}", f"{second:.4f}"]


def test_printed_accuracy_is_of_the_test_loader(capsys):
    # Catches the accuracy on the training batches, and one before the training.
    model = make_model()
    test_batches = [vit.make_synthetic_digits(50).tensors]

    # In the training batch, odd digits have a wrong label.
    images, labels = test_batches[0]
    labels = (labels + labels % 2) % 10
    batches = [(images, labels)]
    before = vit.evaluate(model, test_batches)
    vit.train(model, batches, test_loader=test_batches, epochs=60, lr=0.01)

    accuracy = vit.evaluate(model, test_batches)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("epoch 60/60")
    assert f"test accuracy {accuracy:.2%}," in out.splitlines()[-1]

    # The three numbers are not equal, or the test would show nothing.
    assert accuracy != before
    assert accuracy != vit.evaluate(model, batches)


def test_losses_are_floats():
    # Catches tensors, and a list of epochs instead of steps.
    model = make_model()
    batches = make_batches()
    losses = vit.train(model, batches, epochs=2)
    assert len(losses) == 6
    assert {type(loss) for loss in losses} == {float}


def test_first_loss_is_of_the_untrained_model():
    # Catches a loss that is computed after the update.
    model = make_model()
    batches = make_batches()
    images, labels = batches[0]
    loss = F.cross_entropy(model(images), labels)
    losses = vit.train(model, batches, epochs=1)
    assert losses[0] == pytest.approx(loss.item())


@pytest.mark.parametrize("logit", [math.nan, -math.inf])
def test_loss_that_is_not_finite_ends_the_training(logit):
    # Catches hours of training after the model is lost. The logit of the true class
    # makes the loss not a number, or infinite.
    model = make_model()
    model.head.bias.data[0] = logit
    batches = [(torch.rand(6, 1, 28, 28), torch.zeros(6).long())]
    with pytest.raises(FloatingPointError, match="epoch 1 .* lower learning rate"):
        vit.train(model, batches, epochs=5)


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    # Catches a wrong step, and a line of its own for each step.
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    model = make_model()
    batches = make_batches(2)
    vit.train(model, batches, epochs=1)
    lines = capsys.readouterr().out.split("\r")
    assert lines[0] == "epoch 1: step 1/2"
    assert lines[1] == "epoch 1: step 2/2"
    assert lines[2].startswith("epoch 1/1: loss ")


def test_speed_is_in_images_per_second(capsys, monkeypatch):
    # Catches batches in the place of images, and the time since the first epoch.
    seconds = iter([0, 2, 10, 13])
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(vit, "time", clock)
    model = make_model()
    batches = make_batches()
    vit.train(model, batches, epochs=2)
    printed = re.findall(r", (\d+) images/s", capsys.readouterr().out)
    assert printed == ["9", "6"]  # 18 images an epoch


def test_no_progress_in_a_file(capsys):
    # Catches a log file full of half lines.
    model = make_model()
    batches = make_batches()
    vit.train(model, batches, epochs=2)
    out = capsys.readouterr().out
    assert "\r" not in out
    assert out.count("\n") == 2


# --- What train does ------------------------------------------------------------------


def test_augmentation_is_for_training_only():
    # Catches a test set with augmentation, and a training set without.
    model = make_model()
    images = torch.zeros(6, 1, 28, 28)
    batches = [(images, torch.arange(6))]
    seen = []

    def note(module, inputs):
        mean = inputs[0].mean().item()
        seen.append((module.training, mean))

    def add_one(images):
        return images + 1

    model.register_forward_pre_hook(note)
    vit.train(model, batches, test_loader=batches, epochs=2, augment=add_one)
    in_training = (True, 1)
    in_testing = (False, 0)
    assert seen == [in_training, in_testing, in_training, in_testing]


class NotMoved:
    """A tensor on another device than the model: it has to be moved first."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor.to(device)


def test_batches_are_moved_to_the_device():
    # Catches images or labels that stay on the CPU while the model is on a GPU.
    images, labels = make_batches()[0]
    batches = [(NotMoved(images), NotMoved(labels))]
    losses = vit.train(make_model(), batches, test_loader=batches, epochs=1)
    assert len(losses) == 1


def count_operations():
    """Return how many operations the tensors remember, to compute their gradients."""
    remembered = set()
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            remembered.add(thing.grad_fn)

    # Each operation remembers those before it.
    latest = remembered
    while latest:
        earlier = set()
        for operation in latest - {None}:
            earlier.update(entry[0] for entry in operation.next_functions)
        latest = earlier - remembered
        remembered = remembered | earlier
    return len(remembered)


def test_memory_does_not_grow_with_the_steps():
    # Catches losses that are kept with the operations of their step.
    counts = []

    def note(images):
        counts.append(count_operations())
        return images

    model = make_model()
    batches = make_batches(10)
    vit.train(model, batches, epochs=1, augment=note)
    assert counts[9] <= counts[1]


# --- evaluate -------------------------------------------------------------------------


def test_evaluate_counts_images_not_batches():
    # Catches the mean over batches, which is wrong if the last one is smaller.
    model = make_model().eval()
    images = torch.rand(7, 1, 28, 28)
    labels = model(images).argmax(dim=1)
    labels[0] += 1
    labels[1] -= 1
    large = (images[:6], labels[:6])
    small = (images[6:], labels[6:])
    batches = [large, small]
    assert vit.evaluate(model, batches) == pytest.approx(5 / 7)


def test_evaluate_keeps_no_graph():
    # Catches a missing no_grad, which costs memory.
    model = make_model()
    outputs = []

    def note(module, inputs, output):
        outputs.append(output)

    model.register_forward_hook(note)
    vit.evaluate(model, make_batches())
    assert not outputs[0].requires_grad


def test_evaluate_turns_dropout_off():
    # Catches a missing model.eval().
    model = make_model(dropout=0.5).train()
    modes = []

    def note(module, inputs):
        modes.append(module.training)

    model.dropout.register_forward_pre_hook(note)
    vit.evaluate(model, make_batches())
    assert modes == [False, False, False]


# --- The data -------------------------------------------------------------------------


def test_load_mnist_reads_the_files(tmp_path):
    # Catches values up to 255, a missing channel, and images in another order.
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    train_set = vit.load_mnist(tmp_path)[0]
    images, labels = train_set.tensors

    # The files again, by hand: the data starts after 16 and 8 bytes.
    image_file = (raw / "train-images-idx3-ubyte").read_bytes()
    label_file = (raw / "train-labels-idx1-ubyte").read_bytes()
    pixels = torch.tensor(list(image_file[16:]))
    assert_close(images, pixels.view(240, 1, 28, 28) / 255)
    assert labels.tolist() == list(label_file[8:])


def test_load_mnist_returns_the_training_set_first(tmp_path):
    # Catches sets that are swapped, and the same set twice.
    write_mnist(tmp_path / "MNIST" / "raw")
    train_set, test_set = vit.load_mnist(tmp_path)
    assert len(train_set) == 240
    assert len(test_set) == 60


# --- augment --------------------------------------------------------------------------

# A soft oval in 500 images shows what was done to it.

# The place of each pixel: 40 columns and 40 rows, from the middle of the image.
X = torch.arange(40).expand(40, 40) - 19.5
Y = X.T


def draw_oval(x, y):
    """Return 500 equal images of a horizontal oval around this place."""
    from_x = (X - x) / 4
    from_y = (Y - y) / 2
    image = torch.exp(-(from_x**2 + from_y**2) / 2)
    return image.expand(500, 1, 40, 40)


def total(images):
    """Return the sum over the pixels of each image."""
    return images.sum(dim=(2, 3), keepdim=True)


def measure(images):
    """Return the mass, the center x and y, and the angle in degrees of each image."""
    mass = total(images)
    weights = images / mass  # sum to 1

    # The center is the mean place.
    x = total(weights * X)
    y = total(weights * Y)

    # The variances and the covariance of the places tell the angle of the long axis.
    from_x = X - x
    from_y = Y - y
    var_x = total(weights * from_x**2)
    var_y = total(weights * from_y**2)
    covariance = total(weights * from_x * from_y)
    angle = torch.atan2(2 * covariance, var_x - var_y).rad2deg() / 2

    return {
        "mass": mass.flatten(),
        "x": x.flatten(),
        "y": y.flatten(),
        "angle": angle.flatten(),
    }


def assert_range(values, low, high, abs):
    """Check that the values reach from low to high, and no further."""
    values = values.tolist()
    assert min(values) == pytest.approx(low, abs=abs)
    assert max(values) == pytest.approx(high, abs=abs)


def test_augment_rotates_by_10_degrees():
    # Catches radians for degrees, one direction only, and a shear, not a rotation.
    torch.manual_seed(0)
    images = draw_oval(0, 0)
    moved = measure(vit.augment(images))
    assert_range(moved["angle"], -10, 10, abs=0.5)


def test_augment_scales_by_10_percent():
    # Catches another range, and one direction only. What is 1.1 times as large has 1.21
    # times the mass.
    torch.manual_seed(0)
    images = draw_oval(0, 0)
    before = measure(images)["mass"]
    after = measure(vit.augment(images))["mass"]
    scale = (after / before).sqrt()
    assert_range(scale, 1 / 1.1, 1 / 0.9, abs=0.01)


def test_augment_shifts_by_2_pixels():
    # Catches a shift in another unit or direction. Rotation and scale come on top: the
    # furthest center can be at (2 + 2 * sin(10 degrees)) / 0.9 = 2.6.
    torch.manual_seed(0)
    images = draw_oval(0, 0)
    moved = measure(vit.augment(images))
    assert_range(moved["x"], -2.2, 2.2, abs=0.4)
    assert_range(moved["y"], -2.2, 2.2, abs=0.4)


def test_augment_draws_all_numbers_independently():
    # Catches a random number that is used twice: large digits would always lean left.
    torch.manual_seed(0)
    images = draw_oval(0, 0)
    moved = measure(vit.augment(images))
    values = torch.stack(list(moved.values()))
    correlations = torch.corrcoef(values)
    assert_close(correlations, torch.eye(4), atol=0.2, rtol=0)


def test_augment_draws_new_numbers_for_each_image():
    # Catches one draw for the whole batch.
    images = draw_oval(0, 0)
    moved = vit.augment(images)
    different = moved.unique(dim=0)
    assert len(different) == 500


def test_augment_never_mirrors():
    # Catches a flip: a mirrored 2 is no digit. Here, the oval would leave its corner.
    images = draw_oval(10, 10)
    moved = measure(vit.augment(images))
    assert moved["x"].min() > 5
    assert moved["y"].min() > 5


def test_augment_fills_with_zeros():
    # Catches borders that are repeated or reflected: then all would stay white.
    images = torch.ones(500, 1, 40, 40)
    moved = vit.augment(images)
    assert moved.min() == 0


def test_augment_follows_the_seed():
    # Catches random numbers from elsewhere.
    images = draw_oval(0, 0)
    torch.manual_seed(3)
    first = vit.augment(images)
    torch.manual_seed(3)
    second = vit.augment(images)
    assert torch.equal(first, second)


# --- main -----------------------------------------------------------------------------

MODEL_OPTIONS = "--patch-size 14 --embed-dim 24 --depth 3 --n-heads 2"
MORE_MODEL_OPTIONS = "--mlp-ratio 1.5 --dropout 0.25"
TRAINING_OPTIONS = "--epochs 3 --lr 0.5 --weight-decay 0.25 --seed 7 --batch-size 9"


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Return a function that runs main on the tiny MNIST and returns what train got."""
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data" / "MNIST" / "raw")

    call = {}

    # Instead of the training.
    def note(model, loader, **others):
        call["model"] = model
        call["loader"] = loader
        call["seed"] = torch.initial_seed()
        call.update(others)
        return [2.0, 1.0]

    def run(options):
        words = options.split()
        monkeypatch.setattr("sys.argv", ["vit.py", *words])
        vit.main()
        return call

    monkeypatch.setattr(vit, "train", note)
    return run


def test_main_passes_on_the_options(run_main):
    # Catches an option that is not used, or in the place of another.
    call = run_main(f"{TRAINING_OPTIONS} --device cpu")
    assert call["epochs"] == 3
    assert call["lr"] == 0.5
    assert call["weight_decay"] == 0.25
    assert call["seed"] == 7
    assert call["loader"].batch_size == 9
    assert call["model"].cls_token.device.type == "cpu"


def test_main_trains_on_the_training_set(run_main):
    # Catches a training on the test set.
    call = run_main("--device cpu")
    assert len(call["loader"].dataset) == 240
    assert len(call["test_loader"].dataset) == 60


def test_main_shuffles_the_training_set(run_main):
    # Catches batches that are the same in every epoch.
    sampler = run_main("--device cpu")["loader"].sampler
    assert isinstance(sampler, torch.utils.data.RandomSampler)


def test_main_trains_with_augmentation(run_main):
    # Catches a forgotten augment.
    assert run_main("--device cpu")["augment"] is vit.augment


def test_default_model_has_139_018_parameters(run_main, capsys):
    # Catches another default size. The README names this number.
    run_main("--device cpu")
    assert capsys.readouterr().out.startswith("139,018 parameters on cpu\n")


def test_checkpoint_holds_the_sizes(run_main):
    # Catches an option of the model that is not used, or in the place of another.
    run_main(f"{MODEL_OPTIONS} {MORE_MODEL_OPTIONS} --device cpu")
    sizes = torch.load("out/mnist.pt", weights_only=True)["sizes"]
    assert sizes == TINY_SIZES | {"patch_size": 14, "dropout": 0.25}


def test_checkpoint_holds_the_weights_of_the_trained_model(run_main):
    # Catches the weights of another model, and a checkpoint with more than it needs.
    model = run_main("--device cpu")["model"]
    checkpoint = torch.load("out/mnist.pt", weights_only=True)
    assert checkpoint.keys() == {"sizes", "weights"}
    assert_close(checkpoint["weights"], model.state_dict())


def test_main_writes_two_files(run_main, tmp_path):
    # Catches other names, and files that are left behind.
    run_main("--device cpu --out-dir results/first")
    names = [path.name for path in tmp_path.glob("results/first/*")]
    assert sorted(names) == ["mnist.png", "mnist.pt"]


# --- The picture ----------------------------------------------------------------------

LOSSES = [2.0, 1.0]


def make_maps(model, key):
    """Return maps: in the last block and head only, [CLS] attends to this token."""
    n_tokens = model.pos_embed.shape[1]
    maps = torch.zeros(1, 3, 2, n_tokens, n_tokens)
    maps[0, -1, -1, 0, key] = 1
    return maps


def draw_tint(model, image, patch, shift=0):
    """Return the picture of one image without tint, and the box of the tinted patch.

    shift: the label minus the prediction.
    """
    images = image[None]
    predictions = model(images).argmax(dim=1)
    labels = (predictions + shift) % 10

    # Two pictures: in one, [CLS] attends to itself; in the other, to the patch.
    pictures = []
    for key in (0, 1 + patch):
        maps = make_maps(model, key)
        model.attention_maps = lambda images, maps=maps: maps
        picture = vit.draw_results(model, images, labels, LOSSES)
        pictures.append(picture)

    # They differ in the tint alone.
    plain, tinted = pictures
    return plain, ImageChops.difference(plain, tinted).getbbox()


@pytest.mark.parametrize("patch_size", [4, 7, 14])
def test_picture_tints_where_cls_looks(patch_size):
    # Catches another block, a single head, keys for queries, rows for columns, and a
    # patch too many: [CLS].
    model = make_model(patch_size=patch_size).eval()

    # The image is black but for the second patch of the first row.
    image = torch.zeros(1, 28, 28)
    image[:, :patch_size, patch_size : 2 * patch_size] = 1
    plain, box = draw_tint(model, image, patch=1)

    # What is tinted was white before, and has the size of a patch, less its frame: 28
    # pixels are drawn 96 wide.
    gray = plain.crop(box).convert("L")
    darkest, _ = gray.getextrema()
    assert darkest > 100
    width = box[2] - box[0]
    assert width == pytest.approx(96 * patch_size / 28, abs=5)


def test_picture_has_misclassified_digits_below():
    # Catches rows that are swapped.
    model = make_model().eval()
    image = torch.zeros(1, 28, 28)
    _, above = draw_tint(model, image, patch=0)
    _, below = draw_tint(model, image, patch=0, shift=1)
    assert above[0] == below[0]  # left
    assert above[1] < below[1]  # top


def test_picture_says_label_and_prediction(monkeypatch):
    # Catches label and prediction, or the two titles, in the place of each other.
    texts = []

    def note(canvas, place, text, color):
        texts.append(text)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    model = make_model().eval()
    images = torch.zeros(3, 1, 28, 28)
    answer = int(model(images)[0].argmax())
    other = (answer + 1) % 10
    labels = torch.tensor([answer, other, answer])
    vit.draw_results(model, images, labels, LOSSES)
    assert texts[:5] == [
        "2 of 3 classified correctly",
        f"{answer} read as {answer}",
        f"{answer} read as {answer}",
        "1 of 3 misclassified",
        f"{other} read as {answer}",
    ]


@pytest.mark.parametrize("patch_size", [4, 7, 14, 28])
def test_picture_of_a_model_without_errors(patch_size):
    # Catches an empty row that ends in an error, and a fixed number of patches.
    model = make_model(patch_size=patch_size).eval()
    images = torch.rand(3, 1, 28, 28)
    labels = model(images).argmax(dim=1)
    picture = vit.draw_results(model, images, labels, LOSSES)
    assert picture.size == (840, 500)
