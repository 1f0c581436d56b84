"""The ingest that a user would write today: mosquitto -> paho-mqtt -> SQLite.

It takes the same messages as the coordinator (results and replays at QoS 1) into the same columns with the
same uniqueness, in a database with the same durability (WAL, synchronous=FULL). It does less than the
coordinator: it checks nothing, keeps no registry and acknowledges nothing to the devices.

Batches are as Telegraf makes them by default: 1,000 rows a transaction, or what came within a flush
interval. Telegraf's interval is 10 s; here it is 100 ms, since a device waits for its reading to be durable.

    ingest.py --broker 127.0.0.1:1883 --db FILE [--until N]

Prints `ready` when it is subscribed, and when N readings are stored, or on SIGTERM, one line of JSON: the
readings stored, the CPU seconds used and the peak of the resident memory.
"""

import argparse
import json
import queue
import resource
import signal
import sqlite3
import sys
import time

import paho.mqtt.client as mqtt

BATCH = 1000
FLUSH_S = 0.1

SCHEMA = """
CREATE TABLE IF NOT EXISTS readings (
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    ts INTEGER NOT NULL, received_ms INTEGER NOT NULL, source TEXT NOT NULL, frame INTEGER NOT NULL,
    label TEXT NOT NULL, score REAL NOT NULL, margin REAL NOT NULL, model TEXT NOT NULL,
    latency_ms REAL NOT NULL, file TEXT, truth TEXT, replayed INTEGER NOT NULL,
    UNIQUE (device, epoch, seq)
);
CREATE INDEX IF NOT EXISTS readings_by_device ON readings (device, id);
"""
INSERT = """
INSERT OR IGNORE INTO readings (device, epoch, seq, ts, received_ms, source, frame, label, score, margin,
    model, latency_ms, file, truth, replayed) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)
"""


def row(reading, now_ms, replayed):
    return (
        reading["device"], reading["epoch"], reading["seq"], reading["ts"], now_ms, reading["source"],
        reading["frame"], reading["label"], reading["score"], reading["margin"], reading["model"],
        reading["latency_ms"], reading.get("file"), reading.get("truth"), replayed,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", required=True, metavar="HOST:PORT")
    parser.add_argument("--db", required=True)
    parser.add_argument("--until", type=int, default=0, help="end when so many readings are stored")
    arguments = parser.parse_args()
    host, port = arguments.broker.rsplit(":", 1)

    db = sqlite3.connect(arguments.db, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.executescript(SCHEMA)

    # paho reads on its own thread; the queue is bounded, so a slow database slows the broker down.
    messages = queue.Queue(maxsize=16384)
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="peer-ingest")
    client.on_message = lambda _client, _data, message: messages.put(message)
    client.on_subscribe = lambda *_: print("ready", flush=True)
    client.on_connect = lambda c, *_: c.subscribe(
        [("lacewing/v1/+/+/+/result", 1), ("lacewing/v1/+/+/+/replay", 1)])
    client.connect(host, int(port))
    client.loop_start()

    running = [True]
    signal.signal(signal.SIGTERM, lambda *_: running.clear())
    rows, stored, flush_at = [], 0, time.monotonic() + FLUSH_S
    while running or not messages.empty():
        try:
            message = messages.get(timeout=max(0.0, flush_at - time.monotonic()))
            now_ms = int(time.time() * 1000)
            body = json.loads(message.payload)
            if "readings" in body:
                rows.extend(row(reading, now_ms, 1) for reading in body["readings"])
            else:
                rows.append(row(body, now_ms, 0))
        except queue.Empty:
            pass
        if rows and (len(rows) >= BATCH or time.monotonic() >= flush_at):
            db.execute("BEGIN IMMEDIATE")
            before = db.total_changes
            db.executemany(INSERT, rows)
            db.execute("COMMIT")
            stored += db.total_changes - before
            rows.clear()
        if time.monotonic() >= flush_at:
            flush_at = time.monotonic() + FLUSH_S
        if arguments.until and stored >= arguments.until:
            break
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({
        "stored": stored,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_bytes": usage.ru_maxrss * 1024,
    }), flush=True)
    client.disconnect()
    client.loop_stop()
    db.close()


if __name__ == "__main__":
    sys.exit(main())
