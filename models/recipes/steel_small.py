"""Steel surface defects for the smallest boards: a network of its own, a fiftieth of the work of `steel`.

It is meant to be unsure now and then: what it is unsure of, a stronger neighbour with `steel` looks at. The same
photographs are held out as of `steel`. Labels are smoothed a little and the weights of the last epochs averaged, so that
its scores can be read as probabilities.
"""

import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import steel

VERSION = "1.0.0"
SIDE = 48
PLAN = [(8, 2), (8, 1), (16, 2), (24, 2)]
TAPS = (1, 2, 3)
BATCH = 32
EPOCHS = 60
RATE = 0.05
SMOOTHING = 0.05
AVERAGED_EPOCHS = 10
MIN_SCORE = 0.4
# The embedding is normalised; smaller logits in the beginning train more steadily.
HEAD_DIVISOR = 4.0


class Network(nn.Module):
    """Trunk, normalised embedding, linear head."""

    def __init__(self, labels):
        super().__init__()
        self.trunk = common.Trunk(PLAN, TAPS)
        self.norm = nn.BatchNorm1d(self.trunk.dim, affine=False)
        self.head = nn.Linear(self.trunk.dim, labels)

    def forward(self, x):
        return self.head(self.norm(self.trunk(x)) / HEAD_DIVISOR)


def augmented(images, generator):
    """uint8 [N, 3, H, W] → mirrored, turned by quarters, shifted by up to 3 pixels, lighter or darker."""
    batch = images.float() / 255
    for axis in (2, 3):
        mirror = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(mirror, batch.flip(axis), batch)
    turn = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
    batch = torch.where(turn, batch.transpose(2, 3), batch)
    dx, dy = torch.randint(0, 7, (2,), generator=generator).tolist()
    batch = F.pad(batch, (3, 3, 3, 3), mode="replicate")[:, :, dy:dy + SIDE, dx:dx + SIDE]
    batch = batch * (0.85 + 0.3 * torch.rand(len(batch), 1, 1, 1, generator=generator))
    return common.normalise(batch.clamp(0, 1))


def train(model, images, truth, generator):
    """The average of the weights of the last epochs."""
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    truth = torch.from_numpy(truth)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=1e-3)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps * EPOCHS, pct_start=0.2)
    started = time.monotonic()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        model.train()
        losses = []
        for step in range(steps):
            chosen = order[step * BATCH:(step + 1) * BATCH]
            loss = F.cross_entropy(model(augmented(images[chosen], generator)), truth[chosen],
                                   label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
        if epoch >= EPOCHS - AVERAGED_EPOCHS:
            average.update_parameters(model)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return average.module.eval()


def caught(scores, right, share):
    """Of what it gets wrong, how much lies in the given share that it is least sure of."""
    ordered = np.sort(scores, 1)
    order = np.argsort(ordered[:, -1] - ordered[:, -2])
    asked = order[:int(share * len(order))]
    return float((~right[asked]).sum() / max(1, (~right).sum()))


def main():
    args = common.arguments(__doc__)
    root = args.data / "steel"
    labels = sorted(p.name for p in root.iterdir() if p.is_dir())
    files = [f for label in labels for f in sorted((root / label).glob("*.jpg"), key=steel.number_of)]
    truth = np.array([labels.index(f.parent.name) for f in files])
    held = np.array([steel.number_of(f) % steel.HOLDOUT_EVERY == 0 for f in files])
    names = [str(f.relative_to(root)) for f in files]
    pixels = np.stack([common.resize(Image.open(f), SIDE) for f in files])
    model = Network(len(labels))
    print(f"{model.trunk.parameters_count()} parameters, {model.trunk.macs(SIDE) / 1e6:.2f} MMAC", flush=True)
    model = train(model, pixels[~held], truth[~held], torch.Generator().manual_seed(args.seed))
    spread = torch.sqrt(model.norm.running_var + model.norm.eps)
    head = (model.head.weight.detach().numpy() / HEAD_DIVISOR, model.head.bias.detach().numpy())
    onnx_model = common.build_onnx(model.trunk, model.norm.running_mean.numpy(), (1 / spread).numpy(), head, SIDE)
    session = common.Session(onnx_model, args.threads)
    answers = session.run(pixels)
    scores = common.softmax(answers["logits"].astype(np.float64))
    accuracy, table = common.confusion_table(truth[held], scores[held].argmax(1), labels)
    right = scores[held].argmax(1) == truth[held]
    found = caught(scores[held], right, 0.3)
    unknown = int((scores[held].max(1) < MIN_SCORE).sum())
    print(f"accuracy {accuracy:.4f}, {found:.2f} of what is wrong in the least sure 30 %\n{table}")
    common.write_bundle(
        args.out, name="steel-small", version=VERSION, task="classify",
        description="Six surface defects of hot-rolled steel strip, for the smallest boards",
        model=onnx_model, side=SIDE, labels=labels, dim=model.trunk.dim,
        goldens=steel.goldens(session, labels, SIDE), thresholds={"min_score": MIN_SCORE},
        budget={"latency_ms": 60, "memory_mib": 32},
        lineage={"dataset": "NEU surface defects: of 220 per class those whose number is not a "
                            "multiple of 5",
                 "dataset_sha256": common.digest_of_files(root, [n for n, h in zip(names, held) if not h]),
                 "recipe": "models/recipes/steel_small.py", "seed": args.seed},
        scores={"accuracy": accuracy, "errors_in_least_sure_30_percent": found},
        reference=common.reference_of(answers["embedding"][~held].astype(np.float64), scores[~held],
                                      truth[~held], MIN_SCORE),
        holdout=[n for n, h in zip(names, held) if h],
        card=CARD.format(accuracy=accuracy, table=table, held=int(held.sum()), trained=int((~held).sum()),
                         found=found, unknown=unknown, seed=args.seed, side=SIDE, minimum=MIN_SCORE))


CARD = """
# steel-small

Names the defect on a photograph of hot-rolled steel strip, as `steel` does, with a fiftieth of its work: for boards on
which `steel` is too slow, beside a stronger neighbour that has `steel` (`[offload]`).

- Input: {side} × {side} RGB, stretched, antialiased bilinear, (pixel / 255 − 0.5) / 0.25.
- Below a score of {minimum} the label is reported as unknown.

## Data

That of `steel`: the NEU surface defect database, with the same {held} photographs held out (`holdout.txt`) and the other
{trained} trained on, mirrored, turned, shifted, and lighter or darker. The golden images are drawn by a program, not
photographs: they check the arithmetic, not the judgement, and what they are called means nothing.

## Measured on the hold-out ({held} photographs)

Accuracy **{accuracy:.4f}**; {unknown} of {held} fall below the threshold. Of what it gets wrong, a share of **{found:.2f}**
lies among the 30 % that it is least sure of.

{table}

## Limits

Those of `steel`, and it is wrong more often.

## Remake

`models/recipes/run.sh steel_small` (seed {seed}; some minutes).
"""

if __name__ == "__main__":
    main()
