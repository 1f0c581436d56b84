"""A linear head with scikit-learn: standardise, fit, score. Prints one line of JSON.

The file: four little-endian u32 (rows to train, rows to test, values per row, classes), then the classes of all
rows as u32, then the values as float32.
"""

import json
import sys
import time

import numpy
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def main(path, strength, most_iterations):
    with open(path, "rb") as file:
        data = file.read()
    train, test, dim, _classes = (int(n) for n in numpy.frombuffer(data, "<u4", 4))
    rows = train + test
    truth = numpy.frombuffer(data, "<u4", rows, 16).astype(numpy.int64)
    values = numpy.frombuffer(data, "<f4", rows * dim, 16 + 4 * rows).reshape(rows, dim)
    # C is 1 / (λ · rows).
    model = LogisticRegression(C=1.0 / (strength * train), max_iter=most_iterations)
    wall, cpu = time.perf_counter(), time.process_time()
    scaler = StandardScaler()
    model.fit(scaler.fit_transform(values[:train]), truth[:train])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    accuracy = model.score(scaler.transform(values[train:]), truth[train:])
    print(json.dumps({"seconds": wall, "cpu_s": cpu, "accuracy": float(accuracy),
                      "iterations": int(numpy.max(model.n_iter_))}))


main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
