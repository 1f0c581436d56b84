-- What devices reported. Written so that PostgreSQL takes it too, with BIGINT for INTEGER.

CREATE TABLE devices (
    id            INTEGER NOT NULL PRIMARY KEY,
    site          TEXT    NOT NULL,
    device        TEXT    NOT NULL,
    first_seen_ms INTEGER NOT NULL,
    last_seen_ms  INTEGER NOT NULL,
    status        TEXT,             -- online | offline, as last said
    info          TEXT,             -- JSON, as last said
    model         TEXT,             -- JSON, as last said
    state         TEXT,             -- JSON, as last said
    stored        INTEGER NOT NULL, -- readings ever stored; retention does not lower it
    missing       INTEGER NOT NULL, -- readings ever reported as dropped
    right_count   INTEGER NOT NULL, -- readings whose label was the truth
    wrong_count   INTEGER NOT NULL, -- readings whose label was not
    UNIQUE (site, device)
);

CREATE TABLE readings (
    id          INTEGER NOT NULL PRIMARY KEY, -- in order of arrival: the cursor of the API
    device      INTEGER NOT NULL REFERENCES devices (id),
    epoch       INTEGER NOT NULL,
    seq         INTEGER NOT NULL,
    ts          INTEGER NOT NULL,             -- the device's clock
    received_ms INTEGER NOT NULL,             -- the coordinator's clock
    source      TEXT    NOT NULL,
    frame       INTEGER NOT NULL,
    label       TEXT    NOT NULL,
    score       REAL    NOT NULL,
    margin      REAL    NOT NULL,
    model       TEXT    NOT NULL,
    latency_ms  REAL    NOT NULL,
    file        TEXT,
    truth       TEXT,
    replayed    INTEGER NOT NULL,             -- 1 if it came from the backlog
    UNIQUE (device, epoch, seq)
);
-- One device's readings in order of arrival (the key is part of every index).
CREATE INDEX readings_by_device ON readings (device, id);

-- Exactly the readings that are known to be missing: never one that is stored.
CREATE TABLE gaps (
    id          INTEGER NOT NULL PRIMARY KEY,
    device      INTEGER NOT NULL REFERENCES devices (id),
    epoch       INTEGER NOT NULL,
    from_seq    INTEGER NOT NULL,
    to_seq      INTEGER NOT NULL,
    reason      TEXT    NOT NULL,
    received_ms INTEGER NOT NULL,
    UNIQUE (device, epoch, from_seq, to_seq)
);

-- What is stored or known to be missing of each outbox, as JSON [[from, to], …]. It outlives the readings
-- themselves: what retention took away does not come back when a device sends it again.
CREATE TABLE progress (
    device     INTEGER NOT NULL REFERENCES devices (id),
    epoch      INTEGER NOT NULL,
    stored     TEXT    NOT NULL,
    updated_ms INTEGER NOT NULL,
    PRIMARY KEY (device, epoch)
);
