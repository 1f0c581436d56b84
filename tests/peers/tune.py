"""PyTorch as the peer of the fine-tune trainer.

Without options: writes learn/tests/golden/tune.json and tune.bin, small random cases of every operator with
PyTorch's outputs and gradients. With --bench: trains the backbone with a 10-class head as the example
tune_bench does, and writes the losses and the time per epoch.

Needs torch, onnx and numpy (models/recipes/requirements.txt).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "learn" / "tests" / "golden"


# ---------------------------------------------------------------- golden gradients

class Case:
    """One small graph in ONNX, and the same in PyTorch."""

    def __init__(self, name, shape, nodes, run, ints=None, **weights):
        """nodes: (operator, inputs, attributes) in a row; a node's output is called after its place, the
        last one's y. run: (x, weights) -> y in PyTorch. Weights in capitals are not trained."""
        self.name, self.run = name, run
        self.x = torch.randn(shape)
        self.weights = weights
        made = []
        for number, (kind, inputs, attributes) in enumerate(nodes):
            output = "y" if number == len(nodes) - 1 else f"t{number}"
            made.append(helper.make_node(kind, inputs, [output], **attributes))
        tensors = [numpy_helper.from_array(v.numpy(), k) for k, v in weights.items()]
        tensors += [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in (ints or {}).items()]
        graph = helper.make_graph(
            made, name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape[1:]])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        self.model.ir_version = 8

    def record(self, out):
        """What PyTorch says, through out(bytes) -> [offset, length]."""
        x = self.x.clone().requires_grad_()
        weights = {k: v.clone().requires_grad_(k.islower()) for k, v in self.weights.items()}
        y = self.run(x, weights)
        seed = torch.randn_like(y)
        (y * seed).sum().backward()
        floats = lambda t: out(t.detach().contiguous().numpy().astype("<f4").tobytes())
        return {"name": self.name, "onnx": out(self.model.SerializeToString()), "x": floats(x),
                "seed": floats(seed), "y": floats(y), "dx": floats(x.grad),
                "weights": {k: floats(v.grad) for k, v in weights.items() if k.islower()}}


def cases():
    r = torch.randn
    point = lambda name, kind, f, **a: Case(name, (3, 5, 4, 3), [(kind, ["x"], a)], lambda x, w: f(x))
    for name, cin, cout, k, stride, pad, groups, side in [
        ("conv3", 5, 7, 3, 1, 1, 1, 6), ("conv3_stride", 8, 16, 3, 2, 1, 1, 7),
        ("conv3_even", 3, 20, 3, 2, 1, 1, 8), ("conv1", 9, 33, 1, 1, 0, 1, 5),
        ("conv1_stride", 6, 4, 1, 2, 0, 1, 6), ("conv5_stride3", 3, 5, 5, 3, 2, 1, 11),
        ("conv_groups", 8, 12, 3, 1, 1, 4, 5), ("conv_groups_stride", 6, 6, 3, 2, 1, 2, 6),
        ("depthwise", 10, 10, 3, 1, 1, 10, 6), ("depthwise_stride", 17, 17, 3, 2, 1, 17, 7),
        ("depthwise5", 4, 4, 5, 2, 2, 4, 8), ("conv_wide", 4, 40, 3, 1, 1, 1, 4),
    ]:
        yield Case(name, (9 if name == "conv3" else 2, cin, side, side),
                   [("Conv", ["x", "w", "b"], {"strides": [stride] * 2, "pads": [pad] * 4, "group": groups})],
                   lambda x, w, s=stride, p=pad, g=groups: F.conv2d(x, w["w"], w["b"], s, p, groups=g),
                   w=r(cout, cin // groups, k, k), b=r(cout))
    yield Case("conv_same", (2, 3, 6, 7),
               [("Conv", ["x", "w"], {"strides": [2, 2], "auto_pad": "SAME_UPPER"})],
               lambda x, w: F.conv2d(F.pad(x, (1, 1, 0, 1)), w["w"], None, 2), w=r(4, 3, 3, 3))
    yield Case("gemm", (11, 13), [("Gemm", ["x", "w", "b"], {"transB": 1})],
               lambda x, w: F.linear(x, w["w"], w["b"]), w=r(10, 13), b=r(10))
    yield Case("gemm_plain", (3, 6), [("Gemm", ["x", "w", "b"], {})],
               lambda x, w: x @ w["w"] + w["b"], w=r(6, 18), b=r(18))
    yield Case("matmul_add", (4, 7), [("MatMul", ["x", "w"], {}), ("Add", ["t0", "b"], {})],
               lambda x, w: x @ w["w"] + w["b"], w=r(7, 5), b=r(5))
    yield point("relu", "Relu", F.relu)
    yield point("leaky", "LeakyRelu", lambda x: F.leaky_relu(x, 0.1), alpha=0.1)
    yield point("sigmoid", "Sigmoid", torch.sigmoid)
    yield point("hard_sigmoid", "HardSigmoid", F.hardsigmoid, alpha=1 / 6, beta=0.5)
    yield point("hard_swish", "HardSwish", lambda x: F.hardswish(x))
    yield Case("relu6", (2, 3, 4, 4), [("Mul", ["x", "SIX"], {}), ("Clip", ["t0", "LOW", "HIGH"], {})],
               lambda x, w: F.relu6(x * 6), SIX=torch.tensor(6.0), LOW=torch.tensor(0.0),
               HIGH=torch.tensor(6.0))
    yield Case("sqrt", (2, 3, 3, 3), [("Mul", ["x", "x"], {}), ("Add", ["t0", "C"], {}), ("Sqrt", ["t1"], {})],
               lambda x, w: torch.sqrt(x * x + w["C"]), C=torch.tensor([0.5]))
    yield Case("norm", (3, 6, 4, 4),
               [("BatchNormalization", ["x", "scale", "bias", "MEAN", "VAR"], {"epsilon": 1e-3})],
               lambda x, w: F.batch_norm(x, w["MEAN"], w["VAR"], w["scale"], w["bias"], False, 0, 1e-3),
               scale=r(6), bias=r(6), MEAN=r(6), VAR=torch.rand(6) + 0.5)
    for kind, f in [("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div)]:
        # With itself after a mean: [N, C, H, W] with [N, C, 1, 1], both sides; and with constants.
        yield Case(f"{kind.lower()}_mean", (2, 4, 3, 3),
                   [("Mul", ["x", "x"], {}), ("Add", ["t0", "ONE"], {}), ("GlobalAveragePool", ["t1"], {}),
                    (kind, ["x", "t2"], {})],
                   lambda x, w, f=f: f(x, (x * x + 1).mean((2, 3), keepdim=True)), ONE=torch.tensor([1.0]))
        yield Case(f"{kind.lower()}_mean_first", (2, 4, 3, 3),
                   [("Mul", ["x", "x"], {}), ("Add", ["t0", "ONE"], {}), ("GlobalAveragePool", ["t1"], {}),
                    (kind, ["t2", "t1"], {})],
                   lambda x, w, f=f: f((x * x + 1).mean((2, 3), keepdim=True), x * x + 1),
                   ONE=torch.tensor([1.0]))
        yield Case(f"{kind.lower()}_constant", (2, 4, 3, 3), [(kind, ["x", "C"], {})],
                   lambda x, w, f=f: f(x, w["C"]), C=torch.rand(1, 4, 1, 1) + 0.5)
    for kind, name, k, s, p, inside in [("MaxPool", "max", 3, 2, 1, 0), ("MaxPool", "max2", 2, 2, 0, 0),
                                        ("AveragePool", "average", 3, 2, 1, 0),
                                        ("AveragePool", "average_all", 3, 1, 1, 1)]:
        attributes = {"kernel_shape": [k, k], "strides": [s, s], "pads": [p] * 4}
        if kind == "MaxPool":
            run = lambda x, w, k=k, s=s, p=p: F.max_pool2d(x, k, s, p)
        else:
            attributes["count_include_pad"] = inside
            run = lambda x, w, k=k, s=s, p=p, i=inside: F.avg_pool2d(x, k, s, p, count_include_pad=bool(i))
        yield Case(name, (2, 3, 7, 6), [(kind, ["x"], attributes)], run)
    yield Case("global", (10, 5, 3, 4), [("GlobalAveragePool", ["x"], {})],
               lambda x, w: x.mean((2, 3), keepdim=True))
    yield Case("reduce_mean", (2, 5, 3, 4), [("ReduceMean", ["x"], {"axes": [2, 3], "keepdims": 0})],
               lambda x, w: x.mean((2, 3)))
    yield Case("concat", (2, 3, 4, 4), [("Relu", ["x"], {}), ("Concat", ["x", "t0", "x"], {"axis": 1})],
               lambda x, w: torch.cat([x, F.relu(x), x], 1))
    yield Case("flatten", (3, 4, 3, 2), [("Flatten", ["x"], {}), ("Gemm", ["t0", "w", "b"], {"transB": 1})],
               lambda x, w: F.linear(x.flatten(1), w["w"], w["b"]), w=r(3, 24), b=r(3))
    yield Case("reshape", (3, 4, 3, 2), [("Reshape", ["x", "shape"], {}), ("Relu", ["t0"], {}),
                                         ("Reshape", ["t1", "back"], {})],
               lambda x, w: F.relu(x.reshape(3, 2, 2, 6)).flatten(1),
               ints={"shape": [1, 2, 2, -1], "back": [-1, 24]})
    yield Case("shortcut", (3, 6, 5, 5),
               [("Conv", ["x", "w", "b"], {"pads": [1] * 4}), ("Add", ["t0", "x"], {}), ("Relu", ["t1"], {}),
                ("Conv", ["t2", "w", "b"], {"pads": [1] * 4}), ("Relu", ["t3"], {}), ("Add", ["t4", "t2"], {})],
               lambda x, w: (lambda h: F.relu(F.conv2d(h, w["w"], w["b"], 1, 1)) + h)(
                   F.relu(F.conv2d(x, w["w"], w["b"], 1, 1) + x)), w=r(6, 6, 3, 3) / 4, b=r(6))


def golden():
    """Writes the golden cases."""
    torch.manual_seed(1)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    data = bytearray()

    def out(part):
        data.extend(part)
        return [len(data) - len(part), len(part)]

    records = [case.record(out) for case in cases()]
    (GOLDEN / "tune.bin").write_bytes(data)
    (GOLDEN / "tune.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
    print(f"{len(records)} cases, {len(data)} bytes")


# ---------------------------------------------------------------- bench

class Net(torch.nn.Module):
    """The backbone's ONNX graph with a head, as PyTorch runs it."""

    def __init__(self, model):
        super().__init__()
        self.nodes = list(model.graph.node)
        self.trained = torch.nn.ParameterDict()
        self.fixed = {}
        for tensor in model.graph.initializer:
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            key = tensor.name.replace(".", "/")
            if tensor.name.endswith((".weight", ".bias")):
                self.trained[key] = torch.nn.Parameter(value)
            else:
                self.fixed[key] = value

    def forward(self, x):
        values = {"image": x}

        def get(name):
            key = name.replace(".", "/")
            return values[name] if name in values else (
                self.trained[key] if key in self.trained else self.fixed[key])

        for node in self.nodes:
            a = {v.name: helper.get_attribute_value(v) for v in node.attribute}
            i = [get(name) for name in node.input]
            kind = node.op_type
            if kind == "Conv":
                y = F.conv2d(i[0], i[1], i[2], a["strides"], a["pads"][:2])
            elif kind == "Relu":
                y = F.relu(i[0])
            elif kind == "GlobalAveragePool":
                y = i[0].mean((2, 3), keepdim=True)
            elif kind in ("Add", "Sub", "Mul"):
                y = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul}[kind](i[0], i[1])
            elif kind == "Sqrt":
                y = torch.sqrt(i[0])
            elif kind == "Concat":
                y = torch.cat(i, a["axis"])
            elif kind == "Flatten":
                y = i[0].flatten(1)
            elif kind == "Gemm":
                y = F.linear(i[0], i[1], i[2])
            else:
                raise SystemExit(f"no {kind}")
            values[node.output[0]] = y
        return values["logits"]


def bench(folder, epochs, threads, rate):
    """Trains on what tune_bench left in the folder: head.onnx, pictures.f32 [N, 3, H, W], labels.u32."""
    torch.set_num_threads(threads)
    model = onnx.load(folder / "head.onnx")
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    labels = torch.from_numpy(np.fromfile(folder / "labels.u32", "<u4").astype(np.int64))
    pictures = torch.from_numpy(np.fromfile(folder / "pictures.f32", "<f4").reshape(-1, *shape))
    net = Net(model)
    weights = [p for k, p in net.trained.items() if k.endswith("weight")]
    biases = [p for k, p in net.trained.items() if not k.endswith("weight")]
    optimiser = torch.optim.SGD([{"params": weights, "weight_decay": 1e-4},
                                 {"params": biases, "weight_decay": 0.0}],
                                lr=rate, momentum=0.9, nesterov=True)
    batch, losses, times = 64, [], []
    steps = -(-len(labels) // batch)
    for epoch in range(epochs):
        start = time.perf_counter()
        for step in range(steps):
            number = epoch * steps + step
            share = 0.5 * (1 + np.cos(np.pi * number / (epochs * steps)))
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            part = slice(step * batch, (step + 1) * batch)
            loss = F.cross_entropy(net(pictures[part]), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        times.append(time.perf_counter() - start)
        print(f"epoch {epoch}: {times[-1]:.2f} s, loss {losses[-1]:.4f}", flush=True)
    (folder / "torch.json").write_text(json.dumps({"losses": losses, "seconds": times}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, help="folder that tune_bench wrote")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.01)
    args = parser.parse_args()
    if args.bench:
        bench(args.bench, args.epochs, args.threads, args.rate)
    else:
        golden()
