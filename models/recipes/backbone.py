"""The general backbone: a small convolutional network whose embedding later heads are trained on.

It learns two things at once, from pictures that have nothing to do with any later use:
CIFAR-10's ten kinds of objects, and some eighty kinds of procedurally drawn textures (textures.py).
Epochs begin with small pictures and end with larger ones, because the network will be used at 96
pixels. `--stage train` trains (a checkpoint after every epoch), `--stage bundle` exports the last
checkpoint, the default does both.
"""

import hashlib
import io
import math
import multiprocessing
import tarfile
import time

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import common
import textures

SIDE = 96
PLAN = [(16, 2), (32, 2), (48, 1), (64, 2), (96, 1), (128, 2), (192, 1)]
TAPS = (0, 2, 4, 6)
VERSION = "1.1.0"
HELD_BACK = 5_000
TEXTURES = 24_000
TEXTURES_HELD_BACK = 2_000
# Epochs, the side in pixels of the pictures in them (objects are enlarged to it, of textures a window
# of that size is taken) and the share of the pictures that an epoch shows: large ones cost more.
SCHEDULE = [(7, 48, 1.0), (2, 96, 0.4)]
EPOCHS = sum(epochs for epochs, _, _ in SCHEDULE)
# The rate climbs, stays, and falls to nothing over the last phase.
WARM_UP_EPOCHS = 1.8
OBJECTS_PER_STEP = 96
TEXTURES_PER_STEP = 32
PEAK_RATE = 0.1
MOMENTUM = 0.9
DECAY = 5e-4
SMOOTHING = 0.05
TEXTURE_WEIGHT = 0.35
# The heads read the embedding divided by this: with hundreds of inputs of deviation 1 they would
# diverge at the rate that suits the convolutions.
HEAD_DIVISOR = 4.0
# A linear head on the finished embedding is measured too, trained on so many pictures.
PROBE_IMAGES = 5_000
PROBE_STRENGTH = 1e-3
# The exported weights are an average over about this many steps.
AVERAGE_STEPS = 400


class Backbone(nn.Module):
    """Trunk, a normalised embedding and the two training heads."""

    def __init__(self):
        super().__init__()
        self.trunk = common.Trunk(PLAN, TAPS)
        self.norm = nn.BatchNorm1d(self.trunk.dim, affine=False)
        self.drop = nn.Dropout(0.1)
        self.object_head = nn.Linear(self.trunk.dim, 10)
        self.texture_head = nn.Linear(self.trunk.dim, len(textures.NAMES))

    def embed(self, x):
        return self.norm(self.trunk(x))

    def objects(self, embedding):
        return self.object_head(self.drop(embedding) / HEAD_DIVISOR)

    def textures(self, embedding):
        return self.texture_head(self.drop(embedding) / HEAD_DIVISOR)


def cifar(path):
    """uint8 [50000, 32, 32, 3] and class numbers, in the archive's order; cached."""
    cache = common.cache_folder() / "cifar10.npz"
    if not cache.exists():
        images, names = [], []
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    data = archive.extractfile(member).read()
                    images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
                    names.append(member.name.split("/")[1])
        labels = sorted(set(names))
        numbers = np.array([labels.index(name) for name in names])
        np.savez(cache, images=np.stack(images), numbers=numbers)
    stored = np.load(cache)
    return stored["images"], stored["numbers"]


def drawn(seed, count, processes):
    """uint8 [count, S, S, 3] textures and class numbers; cached."""
    cache = common.cache_folder() / f"textures-{seed}-{count}.npz"
    if not cache.exists():
        jobs = [(seed, start, min(250, count - start)) for start in range(0, count, 250)]
        with multiprocessing.Pool(processes) as pool:
            parts = pool.map(textures.draw_many, jobs, chunksize=1)
        np.savez(cache, images=np.concatenate([p[0] for p in parts]),
                 numbers=np.concatenate([p[1] for p in parts]))
    stored = np.load(cache)
    return stored["images"], stored["numbers"]


def planes(images):
    """uint8 [N, H, W, 3] → torch uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def jitter(batch, strength, gray, generator):
    """Random light, contrast and colour; some pictures become gray."""
    def uniform(channels):
        shape = (len(batch), channels, 1, 1)
        return (torch.rand(shape, generator=generator) * 2 - 1) * strength
    mean = batch.mean((1, 2, 3), keepdim=True)
    batch = (batch - mean) * (1 + 1.2 * uniform(1)) + mean + 0.5 * uniform(1)
    batch = batch * (1 + 0.3 * uniform(3))
    gray = torch.rand((len(batch), 1, 1, 1), generator=generator) < gray
    return torch.where(gray, batch.mean(1, keepdim=True), batch).clamp(0, 1)


def object_batch(images, side, generator):
    """Augmented: shift by up to 4 of 32 pixels, mirror, jitter, a hole, then the wanted size."""
    n = len(images)
    batch = F.pad(images.float() / 255, (4, 4, 4, 4), mode="reflect")
    dx, dy = torch.randint(0, 9, (2, n), generator=generator)
    rows = torch.arange(32)[None] + dy[:, None]
    columns = torch.arange(32)[None] + dx[:, None]
    mirror = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    batch = batch.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    batch = jitter(batch.permute(0, 3, 1, 2), 0.3, 0.15, generator)
    cx, cy = torch.randint(0, 32, (2, n), generator=generator)
    hole = (((torch.arange(32)[None] - cx[:, None]).abs() < 5)[:, None, None, :]
            & ((torch.arange(32)[None] - cy[:, None]).abs() < 5)[:, None, :, None])
    batch = batch.masked_fill(hole, 0.5)
    if side != 32:
        batch = F.interpolate(batch, size=(side, side), mode="bilinear", align_corners=False)
    return common.normalise(batch)


def texture_batch(images, side, generator):
    """Augmented: a window somewhere, mirrored, turned by quarters, jitter."""
    x, y = torch.randint(0, textures.SIDE - side + 1, (2,), generator=generator).tolist()
    batch = images[:, :, y:y + side, x:x + side].float() / 255
    turn, mirror = torch.randint(0, 4, (2,), generator=generator).tolist()
    batch = torch.rot90(batch, turn, (2, 3))
    batch = batch.flip(3) if mirror % 2 else batch
    return common.normalise(jitter(batch, 0.3, 0.2, generator))


def accuracy(model, images, numbers, head, side):
    """Share of right answers, at side × side pixels."""
    right = 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(images), 250):
            batch = images[start:start + 250].float() / 255
            if batch.shape[-1] != side:
                batch = F.interpolate(batch, size=(side, side), mode="bilinear", antialias=True)
            scores = head(model.embed(common.normalise(batch)))
            right += (scores.argmax(1) == numbers[start:start + 250]).sum().item()
    return right / len(images)


def probe(model, train_part, test_part, threads):
    """Accuracy of a linear head on the embeddings of PROBE_IMAGES objects, at the size of use, as the
    exported model computes them."""
    session = common.Session(exported(model), threads)

    def embed(part, count):
        chosen = np.linspace(0, len(part[0]) - 1, count).astype(int)  # stored class by class
        images = part[0][chosen].numpy().transpose(0, 2, 3, 1)
        pixels = np.stack([common.resize(Image.fromarray(image), SIDE) for image in images])
        return session.run(pixels)["embedding"], part[1][chosen].numpy()

    features, numbers = embed(train_part, PROBE_IMAGES)
    head = LogisticRegression(C=PROBE_STRENGTH, max_iter=200).fit(features, numbers)
    return float(head.score(*embed(test_part, HELD_BACK)))


def split(args):
    """CIFAR-10 and textures as tensors: training and held-back parts."""
    images, numbers = cifar(args.data / "cifar10-train.tar.gz")
    order = np.random.default_rng(0).permutation(len(images))  # the same for every seed
    held, kept = np.sort(order[:HELD_BACK]), np.sort(order[HELD_BACK:])
    patterns, kinds = drawn(args.seed, TEXTURES + TEXTURES_HELD_BACK, args.threads)
    pack = lambda x, y: (planes(x), torch.from_numpy(y))
    return (pack(images[kept], numbers[kept]), pack(images[held], numbers[held]),
            pack(patterns[:TEXTURES], kinds[:TEXTURES]),
            pack(patterns[TEXTURES:], kinds[TEXTURES:]))


def phases():
    """(side, share of the pictures) of every epoch."""
    return [(side, share) for epochs, side, share in SCHEDULE for _ in range(epochs)]


def rate(epochs):
    """The learning rate after so many epochs, with fractions."""
    climb = min(1.0, epochs / WARM_UP_EPOCHS)
    last = SCHEDULE[-1][0]
    return PEAK_RATE * (1 - math.cos(math.pi * climb)) / 2 * min(1.0, (EPOCHS - epochs) / last) + 1e-4


def train(args, checkpoint):
    objects, objects_held, patterns, patterns_held = split(args)
    generator = torch.Generator().manual_seed(args.seed)
    model, done = load(checkpoint) if args.resume else (Backbone(), 0)
    model.to(memory_format=torch.channels_last)
    mean_of = lambda old, new, step: old + (new - old) / min(step + 1, AVERAGE_STEPS)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=mean_of, use_buffers=True)
    print(f"{model.trunk.parameters_count()} parameters, {model.trunk.macs(SIDE) / 1e6:.1f} MMAC at "
          f"{SIDE} px, embedding of {model.trunk.dim}", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD([{"params": decayed, "weight_decay": DECAY}, {"params": plain}],
                                lr=PEAK_RATE, momentum=MOMENTUM, nesterov=True)
    for epoch, (side, share) in enumerate(phases()):
        if epoch < done:
            continue
        steps = int(len(objects[0]) * share) // OBJECTS_PER_STEP
        started, losses = time.monotonic(), []
        order = torch.randperm(len(objects[0]), generator=generator)
        pattern_order = torch.randperm(TEXTURES, generator=generator)
        model.train()
        for step in range(steps):
            chosen = order[step * OBJECTS_PER_STEP:(step + 1) * OBJECTS_PER_STEP]
            first = step * TEXTURES_PER_STEP % (TEXTURES - TEXTURES_PER_STEP)
            others = pattern_order[first:first + TEXTURES_PER_STEP]
            # One batch, so that batch norm sees both worlds together as it will in use.
            batch = torch.cat([object_batch(objects[0][chosen], side, generator),
                               texture_batch(patterns[0][others], side, generator)])
            embedding = model.embed(batch.to(memory_format=torch.channels_last))
            count = len(chosen)
            loss = F.cross_entropy(model.objects(embedding[:count]), objects[1][chosen],
                                   label_smoothing=SMOOTHING)
            loss = loss + TEXTURE_WEIGHT * F.cross_entropy(
                model.textures(embedding[count:]), patterns[1][others], label_smoothing=SMOOTHING)
            for group in optimiser.param_groups:
                group["lr"] = rate(epoch + step / steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update_parameters(model)
            losses.append(loss.item())
            if step % 100 == 0:
                print(f"  step {step}/{steps} loss {losses[-1]:.3f}", flush=True)
        best = average.module
        scores = {"objects": accuracy(best, *objects_held, best.objects, side),
                  "textures": accuracy(best, *patterns_held, best.textures, textures.SIDE)}
        torch.save({"model": best.state_dict(), "epoch": epoch + 1}, checkpoint)
        print(f"epoch {epoch + 1}/{EPOCHS} {side} px loss {np.mean(losses):.3f} {scores} "
              f"{time.monotonic() - started:.0f} s", flush=True)


def load(checkpoint):
    """The trained network, and the epoch it is from."""
    stored = torch.load(checkpoint, weights_only=True)
    model = Backbone()
    model.load_state_dict(stored["model"])
    return model.eval(), stored["epoch"]


def exported(model):
    """ONNX of the network, its embedding as the only output."""
    scale = 1 / torch.sqrt(model.norm.running_var + model.norm.eps)
    return common.build_onnx(model.trunk, model.norm.running_mean.numpy(), scale.numpy(), None, SIDE)


def bundle(args, checkpoint):
    model, epoch = load(checkpoint)
    objects, objects_held, _, patterns_held = split(args)
    training_side = phases()[epoch - 1][0]
    at_training = accuracy(model, *objects_held, model.objects, training_side)
    in_use = probe(model, objects, objects_held, args.threads)
    of_textures = accuracy(model, *patterns_held, model.textures, SIDE)
    parameters, macs = model.trunk.parameters_count(), model.trunk.macs(SIDE) / 1e6
    goldens = [(Image.fromarray(textures.draw(args.seed + 1, index)[0]), None) for index in (5, 30, 44, 71)]
    archive = (args.data / "cifar10-train.tar.gz").read_bytes()
    common.write_bundle(
        args.out, name="backbone", version=VERSION, task="embed",
        description="General image embedding for small heads: objects and textures, 96 px",
        model=exported(model), side=SIDE, labels=None, dim=model.trunk.dim, goldens=goldens,
        thresholds=None, budget={"latency_ms": 250, "memory_mib": 64},
        lineage={"dataset": "CIFAR-10 training images less 5,000 held back; drawn textures",
                 "dataset_sha256": hashlib.sha256(archive).hexdigest(),
                 "recipe": "models/recipes/backbone.py", "seed": args.seed},
        scores={"cifar10_accuracy": at_training, "cifar10_linear_5000_accuracy": in_use,
                "texture_accuracy": of_textures},
        card=CARD.format(dim=model.trunk.dim, parameters=parameters, macs=macs, probe=PROBE_IMAGES, epoch=epoch, epochs=EPOCHS,
                         at_training=at_training, in_use=in_use, of_textures=of_textures,
                         kinds=len(textures.NAMES), training_side=training_side,
                         drawn=TEXTURES, drawn_held=TEXTURES_HELD_BACK, seed=args.seed))


CARD = """
# backbone

A small general image network. It answers with an embedding of {dim} numbers: mean and deviation
of the channels at four depths, each brought to about mean 0 and deviation 1. Train a linear head on
it, compare pictures by it, watch it for drift.

- Input: 96 × 96 RGB, stretched, antialiased bilinear, (pixel / 255 − 0.5) / 0.25.
- {parameters:,} parameters, {macs:.1f} million multiply-accumulates, 3 × 3 convolutions and ReLU only;
  batch norm is folded in.

## Data

- CIFAR-10 (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009): 45,000 of
  the 50,000 training images; 5,000 chosen at random were held back and never trained on. Published
  for research; cite it.
- {drawn:,} pictures of {kinds} kinds of textures drawn by `models/recipes/textures.py`; another {drawn_held:,}
  were held back.

No picture of steel, and none of any user, was seen.

## Measured, on what was held back

| what | accuracy |
|---|---|
| CIFAR-10, 10 classes, enlarged to {training_side} px as in training | {at_training:.4f} |
| CIFAR-10, enlarged to 96 px as in use, linear head trained on {probe:,} embeddings | {in_use:.4f} |
| drawn textures, {kinds} classes, 96 px | {of_textures:.4f} |

The classifiers behind these figures are not part of the model. What a linear head on the embedding
reaches on photographs of steel is in `models/bundles/steel/CARD.md`.

## Limits

Small pictures of ten kinds of objects and drawn textures are all that it knows: expect useful
features for surfaces and simple shapes, not fine distinctions between natural things. It sees 96
pixels: defects smaller than about one hundredth of the frame's side are lost, crop first.

## Remake

`models/recipes/run.sh backbone` (seed {seed}; under half an hour on two free cores). This bundle is the
checkpoint after epoch {epoch} of {epochs}. The result differs in rounding from machine to machine.
"""


def main():
    args = common.arguments(
        __doc__, stage=(str, "all", "train, bundle or all"),
        resume=(int, 0, "1: go on after the last checkpoint"))
    checkpoint = common.cache_folder() / f"backbone-{args.seed}.pt"
    if args.stage in ("train", "all"):
        train(args, checkpoint)
    if args.stage in ("bundle", "all"):
        bundle(args, checkpoint)


if __name__ == "__main__":
    main()
