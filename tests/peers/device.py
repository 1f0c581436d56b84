"""A device as one would write it today: OpenCV, ONNX Runtime, SQLite in WAL mode as the buffer, paho-mqtt.

Reads the images of a folder again and again, classifies each with the bundle's model, keeps the reading in
SQLite before it publishes it at QoS 1, and removes it when the broker has acknowledged it.

Prints `{"at": n}` when so many readings are delivered, and ends with its standard input.
"""

import json
import os
import pathlib
import queue
import sqlite3
import sys
import threading
import time
import tomllib

import cv2
import numpy
import onnxruntime
import paho.mqtt.client as mqtt


class Model:
    def __init__(self, bundle):
        manifest = tomllib.loads((bundle / "manifest.toml").read_text())
        spec = manifest["input"]
        self.name = f"{manifest['name']}@{manifest['version']}"
        self.labels = manifest["output"].get("labels", [])
        self.scores = manifest["output"].get("scores")
        self.output = self.scores or manifest["output"]["embedding"]
        self.input = spec["name"]
        self.size = (spec["shape"][3], spec["shape"][2])
        self.mean = numpy.array(spec["mean"], dtype=numpy.float32)
        self.std = numpy.array(spec["std"], dtype=numpy.float32)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(bundle / manifest["model"]["file"]), options, providers=["CPUExecutionProvider"]
        )

    def look(self, path):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        start = time.perf_counter()
        image = cv2.resize(image, self.size, interpolation=cv2.INTER_LINEAR)
        pixels = (image.astype(numpy.float32) / 255.0 - self.mean) / self.std
        tensor = numpy.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        (values,) = self.session.run([self.output], {self.input: tensor})
        label, score = "embedding", 1.0
        if self.scores:
            values = numpy.exp(values[0] - values[0].max())
            values /= values.sum()
            best = int(values.argmax())
            label, score = self.labels[best], float(values[best])
        return label, score, (time.perf_counter() - start) * 1000.0


class Buffer:
    def __init__(self, path):
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.lock = threading.Lock()
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("CREATE TABLE outbox (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)")

    def put(self, body):
        with self.lock:
            return self.db.execute("INSERT INTO outbox (body) VALUES (?)", (body,)).lastrowid

    def done(self, seqs):
        with self.lock:
            self.db.execute("BEGIN")
            self.db.executemany("DELETE FROM outbox WHERE seq = ?", ((seq,) for seq in seqs))
            self.db.execute("COMMIT")


def main(bundle, images, count, warm, host, port, database, cpu):
    os.sched_setaffinity(0, {cpu})
    cv2.setNumThreads(1)
    model = Model(pathlib.Path(bundle))
    files = sorted(p for p in pathlib.Path(images).rglob("*.jpg"))
    buffer = Buffer(database)
    answered, sent, lock = queue.Queue(), {}, threading.Lock()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="peer")
    client.max_inflight_messages_set(100)
    client.on_publish = lambda _client, _data, mid, _reason, _properties: answered.put(mid)
    client.connect(host, port)
    client.loop_start()

    def collect():
        delivered, told = 0, 0
        while delivered < count:
            mids = [answered.get()]
            while len(mids) < 100 and not answered.empty():
                mids.append(answered.get())
            with lock:
                seqs = [sent.pop(mid) for mid in mids]
            buffer.done(seqs)
            delivered += len(seqs)
            for mark in (warm, count):
                if told < mark <= delivered:
                    told = mark
                    print(json.dumps({"at": mark}), flush=True)

    collector = threading.Thread(target=collect)
    collector.start()
    for frame in range(count):
        path = files[frame % len(files)]
        ts = int(time.time() * 1000)
        label, score, latency = model.look(path)
        reading = {
            "v": 1, "device": "peer", "source": "cam0", "epoch": 1, "seq": frame + 1, "ts": ts, "frame": frame,
            "label": label, "score": round(score, 4), "margin": 0.0, "model": model.name,
            "latency_ms": round(latency, 2), "file": path.name,
        }
        body = json.dumps(reading, separators=(",", ":")).encode()
        seq = buffer.put(body)
        # Under the lock until it is known which message it is: its answer may come at once.
        with lock:
            sent[client.publish("peer/cam0/result", body, qos=1).mid] = seq
    collector.join()
    sys.stdin.read()
    client.loop_stop()


if __name__ == "__main__":
    bundle, images, count, warm, host, port, database, cpu = sys.argv[1:]
    main(bundle, images, int(count), int(warm), host, int(port), database, int(cpu))
