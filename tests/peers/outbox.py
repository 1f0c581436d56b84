"""A buffer as one would write it with the standard library: SQLite in WAL mode, synced at each commit.

Takes the same records in the same groups as Lacewing's outbox. Prints one line of JSON.
"""

import json
import sqlite3
import sys
import time


def main(records, database, group):
    with open(records, "rb") as file:
        rows = file.read().splitlines()
    db = sqlite3.connect(database, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE outbox (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    start, cpu = time.perf_counter(), time.process_time()
    for at in range(0, len(rows), group):
        db.execute("BEGIN")
        db.executemany("INSERT INTO outbox (body) VALUES (?)", ((row,) for row in rows[at : at + group]))
        db.execute("COMMIT")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"per_s": len(rows) / seconds, "cpu_s": cpu}))


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
