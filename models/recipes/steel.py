"""Steel surface defects: a linear head on the backbone's embedding.

Every fifth photograph of a class (its number is a multiple of 5) is the hold-out: it is measured on
at the end and takes part in nothing else. The strength of regularisation is chosen by
cross-validation inside the training part, by log-loss, so that the scores can be read as
probabilities. The graph gives `logits` and the backbone's `embedding`.
"""

import warnings

import numpy as np
import onnx
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

import backbone
import common
import textures

VERSION = "1.1.0"
HOLDOUT_EVERY = 5
FEW_PER_CLASS = 44
FEW_SEEDS = 10
FOLDS = 5
STRENGTHS = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0]
# A feature that hardly varies is not blown up beyond this deviation (embedding units, about 1).
DEVIATION_FLOOR = 0.1
# The eight ways a square lies on the table; a defect is the same in all of them.
TURNS = [(quarter, mirror) for mirror in (False, True) for quarter in range(4)]
# Below it a device says unknown.
MIN_SCORE = 0.5
GOLDEN_CANDIDATES = 400
GOLDEN_SCORE = 0.8


def number_of(path):
    return int(path.stem.rsplit("_", 1)[1])


def turned(pixels, quarter, mirror):
    pixels = np.rot90(pixels, quarter, axes=(1, 2))
    return pixels[:, :, ::-1] if mirror else pixels


def fit(features, truth, strength, copies=1):
    """(weight [C, D], bias [C]) of multinomial logistic regression on the raw embedding: the
    standardisation is folded in. `copies` versions of each picture count as one picture."""
    centre = features.mean(0)
    scale = np.maximum(features.std(0), DEVIATION_FLOOR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=300).fit(
            (features - centre) / scale, truth, sample_weight=np.full(len(truth), 1 / copies))
    weight = model.coef_ / scale
    return weight, model.intercept_ - weight @ centre


def log_loss(logits, truth):
    return -np.log(common.softmax(logits)[np.arange(len(truth)), truth] + 1e-12).mean()


def choose_strength(features, truth, seed):
    """The regularisation with the least cross-validated log-loss."""
    losses = np.zeros(len(STRENGTHS))
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, truth):
        for index, strength in enumerate(STRENGTHS):
            weight, bias = fit(features[train], truth[train], strength)
            losses[index] += log_loss(features[test] @ weight.T + bias, truth[test])
    return STRENGTHS[int(losses.argmin())]


def train_head(plain, all_turns, truth, rows, seed):
    """Chooses the strength on the rows' plain pictures, then fits on all their turned copies."""
    strength = choose_strength(plain[rows], truth[rows], seed)
    copies = len(all_turns)
    features = np.concatenate([turn[rows] for turn in all_turns])
    return fit(features, np.tile(truth[rows], copies), strength, copies), strength


def goldens(session, labels, side=backbone.SIDE):
    """For each label a drawn picture that is taken for it, not too surely, so that its score shows
    any change of the model: no photograph is shipped."""
    pictures = [textures.draw(77, index)[0] for index in range(GOLDEN_CANDIDATES)]
    gray = [Image.fromarray(p).convert("L").convert("RGB") for p in pictures]
    logits = session.run(np.stack([common.resize(p, side) for p in gray]))["logits"]
    scores = common.softmax(logits.astype(np.float64))
    away = np.abs(scores.max(1) - GOLDEN_SCORE)
    chosen = []
    for label in range(len(labels)):
        rows = np.flatnonzero(scores.argmax(1) == label)
        if len(rows):
            chosen.append((gray[rows[away[rows].argmin()]], labels[label]))
    return chosen


def main():
    args = common.arguments(__doc__)
    root = args.data / "steel"
    labels = sorted(p.name for p in root.iterdir() if p.is_dir())
    files = [f for label in labels for f in sorted((root / label).glob("*.jpg"), key=number_of)]
    truth = np.array([labels.index(f.parent.name) for f in files])
    held = np.array([number_of(f) % HOLDOUT_EVERY == 0 for f in files])
    names = [str(f.relative_to(root)) for f in files]
    model = onnx.load(args.out / "backbone" / "model.onnx")
    session = common.Session(model, args.threads)
    pixels = np.stack([common.resize(Image.open(f), backbone.SIDE) for f in files])
    embed = lambda images: session.run(images)["embedding"].astype(np.float64)
    plain = embed(pixels)
    # Turned copies are made of the training part only.
    everything = np.flatnonzero(~held)
    spread = [np.zeros_like(plain) for _ in TURNS]
    for target, turn in zip(spread, TURNS):
        target[everything] = plain[everything] if turn == (0, False) else embed(
            turned(pixels[everything], *turn))
    judge = lambda head: (plain[held] @ head[0].T + head[1])

    few = []
    for seed in range(FEW_SEEDS):
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.choice(np.flatnonzero(~held & (truth == c)), FEW_PER_CLASS,
                                          replace=False) for c in range(len(labels))])
        head, strength = train_head(plain, spread, truth, rows, seed)
        few.append(float((judge(head).argmax(1) == truth[held]).mean()))
        print(f"{FEW_PER_CLASS} per class, seed {seed}: {few[-1]:.4f} (C {strength})", flush=True)
    head, strength = train_head(plain, spread, truth, everything, args.seed)

    onnx_model = common.with_head(model, head)
    final = common.Session(onnx_model)
    logits = final.run(pixels[held])["logits"].astype(np.float64)
    accuracy, table = common.confusion_table(truth[held], logits.argmax(1), labels)
    loss = log_loss(logits, truth[held])
    known = common.softmax(logits).max(1) >= MIN_SCORE
    print(f"all: {accuracy:.4f}, log-loss {loss:.4f} (C {strength})\n{table}")
    print(f"{FEW_PER_CLASS} per class: mean {np.mean(few):.4f} least {min(few):.4f}")
    common.write_bundle(
        args.out, name="steel", version=VERSION, task="classify",
        description="Six surface defects of hot-rolled steel strip",
        model=onnx_model, side=backbone.SIDE, labels=labels, dim=plain.shape[1],
        goldens=goldens(final, labels), thresholds={"min_score": MIN_SCORE},
        budget={"latency_ms": 250, "memory_mib": 64},
        lineage={"parent": f"backbone@{backbone.VERSION}",
                 "dataset": "NEU surface defects: of 220 per class those whose number is not a "
                            "multiple of 5",
                 "dataset_sha256": common.digest_of_files(root, [n for n, h in zip(names, held) if not h]),
                 "recipe": "models/recipes/steel.py", "seed": args.seed},
        scores={"accuracy": accuracy, "log_loss": loss,
                "accuracy_44_per_class_mean": np.mean(few), "accuracy_44_per_class_least": min(few)},
        reference=common.reference_of(
            plain[~held], common.softmax(plain[~held] @ head[0].T + head[1]), truth[~held], MIN_SCORE),
        holdout=[n for n, h in zip(names, held) if h],
        card=CARD.format(accuracy=accuracy, table=table, loss=loss, mean=np.mean(few), least=min(few),
                         most=max(few), held=int(held.sum()), strength=strength, seed=args.seed,
                         trained=len(everything), unknown=int((~known).sum()),
                         few=FEW_PER_CLASS, seeds=FEW_SEEDS))


CARD = """
# steel

Names the defect on a photograph of hot-rolled steel strip: crazing, inclusion, patches,
pitted_surface, rolled-in_scale or scratches. A linear head on the `backbone` bundle's embedding,
which is the second output.

- Input: 96 × 96 RGB, stretched, antialiased bilinear, (pixel / 255 − 0.5) / 0.25.
- Below a score of 0.5 the label is reported as unknown.

## Data

NEU surface defect database: K. Song and Y. Yan, *A noise robust method based on completed local
binary patterns for hot-rolled steel strip surface defects*, Applied Surface Science 285 (2013).
Published for research; cite it. 220 photographs of 200 × 200 pixels for each of six classes. Those
whose number is a multiple of 5 ({held}, `holdout.txt`) were never trained on and took part in no
choice; the other {trained} were trained on, each also mirrored and turned by quarters. The golden
images are drawn by a program, not photographs: they check the arithmetic, not the judgement, and
what they are called means nothing.

## Measured on the hold-out ({held} photographs)

Accuracy **{accuracy:.4f}**, log-loss {loss:.4f}; {unknown} of {held} fall below the threshold.

{table}

With only {few} photographs per class to train on ({seeds} random choices, regularisation chosen
inside each): mean **{mean:.4f}**, least {least:.4f}, most {most:.4f}.

## Limits

One mill, one camera, one defect per picture, no clean steel: it cannot say "no defect", and a
picture of something else gets one of the six names unless its score is low. Light and focus other
than the data set's were not measured.

## Remake

`models/recipes/run.sh steel` (seed {seed}, C = {strength}; some minutes). It stands on the backbone in
`models/bundles/backbone`.
"""

if __name__ == "__main__":
    main()
