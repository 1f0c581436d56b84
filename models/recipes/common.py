"""What the recipes share: where data lies, preprocessing, the network, export to ONNX, writing a bundle.

Preprocessing here is the device's: decode, RGB, antialiased bilinear resize (Pillow's, which the
device repeats), pixels / 255, minus mean, over std, NCHW float32.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional as F

RECIPES = Path(__file__).resolve().parent
BUNDLES = RECIPES.parent / "bundles"
REPOSITORY = RECIPES.parents[1]

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
# Keeps the square root of a variance, and its gradient, finite on a flat image.
VARIANCE_FLOOR = 1e-4
# tract reads up to 18 without a warning; nothing newer is needed.
OPSET = 17
# onnx writes a newer file version than some readers know; 8 belongs to opset 17.
IR_VERSION = 8
# As many as the manifest keeps for the self-test.
GOLDEN_EMBEDDING_VALUES = 16


def arguments(description, **extra):
    """The command line that every recipe has: --data, --out, --seed and the given extra options."""
    parser = argparse.ArgumentParser(description=description)
    default = os.environ.get("LACEWING_DATASETS", str(REPOSITORY.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=BUNDLES, help="folder that receives the bundle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    for name, (kind, value, text) in extra.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=value, help=text)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(f"seed {args.seed}, torch {torch.__version__}", flush=True)
    return args


def cache_folder():
    """Where slow intermediate results are kept between runs (never in the repository)."""
    folder = Path(os.environ.get("LACEWING_ML_CACHE", Path.home() / ".cache" / "lacewing-ml"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------- pixels

def resize(image, side):
    """A PIL image as RGB uint8 [side, side, 3], stretched as the device stretches."""
    image = image.convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def to_tensor(pixels):
    """uint8 [N, H, W, 3] → normalised float32 [N, 3, H, W], as numpy."""
    values = pixels.astype(np.float32) / np.float32(255)
    values = (values - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def normalise(batch):
    """Float pixels 0..1 [N, 3, H, W] (torch) → normalised."""
    return (batch - 0.5) / 0.25  # MEAN and STD are the same for the three channels


# ---------------------------------------------------------------- network

class Unit(nn.Module):
    """Convolution 3×3, batch norm, (a shortcut,) ReLU: all that the trunk is made of."""

    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.stride, self.shortcut = stride, shortcut

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y + x if self.shortcut else y)

    def folded(self):
        """Weights and bias of the one convolution that equals convolution + batch norm."""
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.norm.bias - self.norm.running_mean * scale
        return weight.detach().cpu().numpy(), bias.detach().cpu().numpy()


class Trunk(nn.Module):
    """Units in a row; the embedding joins mean and deviation of the channels at chosen depths."""

    def __init__(self, plan, taps):
        """plan: (outputs, stride) per unit; a unit that keeps shape gets a shortcut. taps: unit
        indexes whose output is pooled."""
        super().__init__()
        units, inputs = [], 3
        for outputs, stride in plan:
            units.append(Unit(inputs, outputs, stride, shortcut=stride == 1 and inputs == outputs))
            inputs = outputs
        self.units = nn.ModuleList(units)
        self.taps = tuple(taps)
        self.dim = sum(2 * plan[tap][0] for tap in taps)

    def forward(self, x):
        pooled = []
        for index, unit in enumerate(self.units):
            x = unit(x)
            if index in self.taps:
                mean = x.mean((2, 3))
                variance = F.relu((x * x).mean((2, 3)) - mean * mean)
                # Deepest first: the first values depend on every layer, and goldens pin those.
                pooled = [mean, torch.sqrt(variance + VARIANCE_FLOOR)] + pooled
        return torch.cat(pooled, 1)

    def parameters_count(self):
        """Weights of the folded network."""
        return sum(u.conv.weight.numel() + u.conv.out_channels for u in self.units)

    def macs(self, side):
        """Multiply-accumulates for one image of side × side pixels."""
        total = 0
        for unit in self.units:
            side = (side + unit.stride - 1) // unit.stride
            total += unit.conv.weight.numel() * side * side
        return total


# ---------------------------------------------------------------- ONNX

def build_onnx(trunk, shift, scale, head, side):
    """The trunk as an ONNX model: `image` → `embedding` = (pooled - shift) * scale, and with
    head = (weight [C, D], bias [C]) also → `logits`, one Gemm on the embedding."""
    nodes, weights = [], []

    def constant(name, value):
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))
        return name

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    x, pooled = "image", []
    floor = constant("variance_floor", [VARIANCE_FLOOR])
    for index, unit in enumerate(trunk.units):
        weight, bias = unit.folded()
        name = f"unit{index}"
        y = node("Conv", [x, constant(f"{name}.weight", weight), constant(f"{name}.bias", bias)],
                 f"{name}.conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                 strides=[unit.stride, unit.stride])
        if unit.shortcut:
            y = node("Add", [y, x], f"{name}.sum")
        x = node("Relu", [y], f"{name}.out")
        if index in trunk.taps:
            mean = node("GlobalAveragePool", [x], f"{name}.mean")
            square = node("Mul", [x, x], f"{name}.square")
            square = node("GlobalAveragePool", [square], f"{name}.mean_square")
            variance = node("Sub", [square, node("Mul", [mean, mean], f"{name}.square_mean")],
                            f"{name}.difference")
            variance = node("Add", [node("Relu", [variance], f"{name}.variance"), floor],
                            f"{name}.floored")
            pooled = [mean, node("Sqrt", [variance], f"{name}.deviation")] + pooled
    joined = node("Concat", pooled, "joined", axis=1)
    joined = node("Flatten", [joined], "pooled", axis=1)
    centred = node("Sub", [joined, constant("embedding.shift", shift[None])], "centred")
    node("Mul", [centred, constant("embedding.scale", scale[None])], "embedding")
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, trunk.dim])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])
    graph = helper.make_graph(nodes, "lacewing", [image], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)],
                              producer_name="lacewing")
    model.ir_version = IR_VERSION
    if head is not None:
        return with_head(model, head)
    onnx.checker.check_model(model, full_check=True)
    return model


def with_head(model, head):
    """The model with one Gemm on its embedding, whose output `logits` comes first.
    head: (weight [C, D], bias [C])."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    for name, value in zip(("head.weight", "head.bias"), head):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
    graph.node.append(helper.make_node("Gemm", ["embedding", "head.weight", "head.bias"], ["logits"],
                                       name="logits", transB=1))
    graph.output.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(head[1])]))
    onnx.checker.check_model(model, full_check=True)
    return model


class Session:
    """An exported model in ONNX Runtime, one image at a time as on the device."""

    def __init__(self, model, threads=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                                    providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def run(self, pixels):
        """uint8 [N, side, side, 3] → dict of output name → [N, …]."""
        rows = [self.session.run(None, {"image": to_tensor(p[None])}) for p in pixels]
        return {name: np.concatenate([row[i] for row in rows]) for i, name in enumerate(self.names)}


def softmax(logits):
    """Probabilities of rows of logits."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# ---------------------------------------------------------------- bundle

def toml(value):
    """A value in TOML's notation (strings, numbers, flat lists)."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (float, np.floating)):
        return repr(round(float(value), 6))
    return str(value)


def digest_of_files(root, names):
    """SHA-256 over the sorted lines "name sha256" of the files, to recognise a data set."""
    lines = [f"{n} {hashlib.sha256((root / n).read_bytes()).hexdigest()}\n" for n in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_bundle(out, *, name, version, task, description, model, side, labels, dim, goldens,
                 thresholds, budget, lineage, scores, card, holdout=None, reference=None):
    """Writes models/bundles/<name>, replacing what was there.

    goldens: (PIL image, expected label or None); what the model answers is recorded, and a golden
    whose top label is not the expected one is an error. card: the text of CARD.md."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "golden").mkdir(parents=True)
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    session = Session(model)
    sections = [
        ("", {"schema": 1, "name": name, "version": version, "task": task,
              "description": description}),
        ("model", {"file": "model.onnx", "sha256": hashlib.sha256(data).hexdigest(),
                   "bytes": len(data)}),
        ("input", {"name": "image", "shape": [1, 3, side, side], "layout": "nchw", "color": "rgb",
                   "resize": "stretch", "filter": "bilinear", "mean": MEAN, "std": STD}),
    ]
    output = {"embedding": "embedding", "embedding_dim": dim}
    if labels:
        output = {"scores": "logits", "activation": "softmax", **output, "labels": labels}
    sections.append(("output", output))
    if thresholds:
        sections.append(("thresholds", thresholds))
    sections.append(("budget", budget))
    for number, (image, expected) in enumerate(goldens, 1):
        path = f"golden/{number}.png"
        image.save(folder / path, optimize=True)
        answer = session.run(resize(Image.open(folder / path), side)[None])
        case = {"image": path}
        if labels:
            probabilities = softmax(answer["logits"].astype(np.float64))[0]
            label = labels[int(probabilities.argmax())]
            if expected is not None and label != expected:
                raise SystemExit(f"{name}: golden {number} is {expected}, answered {label}")
            case |= {"label": label, "scores": list(probabilities)}
        case |= {"embedding": list(answer["embedding"][0, :GOLDEN_EMBEDDING_VALUES]),
                 "tolerance": 0.01, "embedding_tolerance": 0.05}
        sections.append(("[golden]", case))
    if holdout is not None:
        (folder / "holdout.txt").write_text("".join(f"{line}\n" for line in holdout))
        lineage = {**lineage, "holdout": "holdout.txt"}
    if reference is not None:
        sections.append(("reference", reference))
    sections += [("lineage", lineage), ("lineage.scores", scores)]
    text = []
    for section, values in sections:
        if section:
            text.append(f"\n[{section}]\n")
        text += [f"{key} = {toml(value)}\n" for key, value in values.items()]
    (folder / "manifest.toml").write_text("".join(text))
    (folder / "CARD.md").write_text(card.strip() + "\n")
    print(f"wrote {folder} ({len(data)} bytes)", flush=True)


def reference_of(embeddings, probabilities, truth, min_score):
    """The manifest's section on what training saw: embeddings [N, D], probabilities [N, C], classes [N]."""
    mean, deviation = embeddings.mean(0), np.maximum(embeddings.std(0), 1e-3)
    distance = np.sqrt((((embeddings - mean) / deviation) ** 2).mean(1))
    top = probabilities.max(1)
    count = len(top)
    return {"samples": count, "mean": list(mean), "deviation": list(deviation),
            "distance": list(np.quantile(distance, [0.5, 0.95, 0.99], method="inverted_cdf")),
            "scores": list(np.bincount(np.minimum((top * 10).astype(int), 9), minlength=10) / count),
            "labels": list(np.bincount(truth, minlength=probabilities.shape[1]) / count),
            "unknown": float((top < min_score).mean())}


def confusion_table(truth, predicted, labels):
    """Accuracy and a Markdown table: rows are the truth, columns the answers."""
    count = len(labels)
    matrix = np.zeros((count, count), int)
    for t, p in zip(truth, predicted):
        matrix[t, p] += 1
    lines = ["| truth \\ answer | " + " | ".join(labels) + " |", "|---" * (count + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(map(str, row)) + " |" for label, row in zip(labels, matrix)]
    return float(np.trace(matrix) / max(1, matrix.sum())), "\n".join(lines)
