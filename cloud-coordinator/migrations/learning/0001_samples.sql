-- What devices kept to learn from, what people said about it, and the snapshots that training uses.
-- A database of its own, `learning.db`: what people do here never holds the lock that readings wait for.
-- Written so that PostgreSQL takes it too, with BIGINT for INTEGER and BYTEA for BLOB.

CREATE TABLE tasks (
    name       TEXT    NOT NULL PRIMARY KEY,
    created_ms INTEGER NOT NULL
);

-- The classes of a task. They are only ever added: a position means the same class for ever.
CREATE TABLE classes (
    task     TEXT    NOT NULL REFERENCES tasks (name),
    position INTEGER NOT NULL,
    name     TEXT    NOT NULL,
    PRIMARY KEY (task, position),
    UNIQUE (task, name)
);

CREATE TABLE samples (
    id          INTEGER NOT NULL PRIMARY KEY, -- in order of arrival: the cursor of the API
    task        TEXT    NOT NULL REFERENCES tasks (name),
    origin      TEXT    NOT NULL,             -- device | import
    device      TEXT,                         -- with origin device, as the next four
    source      TEXT,
    epoch       INTEGER,
    seq         INTEGER,
    reason      TEXT,
    ts          INTEGER NOT NULL,             -- the device's clock; the coordinator's with origin import
    received_ms INTEGER NOT NULL,             -- the coordinator's clock
    label       TEXT,                         -- what the model said, as the next five
    score       REAL,
    margin      REAL,
    entropy     REAL,
    novelty     REAL,
    model       TEXT,
    file        TEXT,                         -- where the image came from
    sha256      TEXT,                         -- of the image, as the next two
    bytes       INTEGER NOT NULL,             -- 0 without an image
    image       TEXT    NOT NULL,             -- none | waiting | stored | refused
    refused     TEXT,                         -- why
    holdout     INTEGER NOT NULL,             -- 1: only ever measured with; a person's decision
    holdout_by  TEXT,                         -- who decided it last
    holdout_ms  INTEGER,
    deleted_ms  INTEGER,                      -- the row stays, so that the device does not bring it back
    UNIQUE (device, epoch, seq)
);
CREATE INDEX samples_by_task ON samples (task, id);
CREATE INDEX samples_by_image ON samples (sha256);

CREATE TABLE embeddings (
    sample INTEGER NOT NULL PRIMARY KEY REFERENCES samples (id),
    model  TEXT    NOT NULL, -- only embeddings of one model can be compared
    data   BLOB    NOT NULL  -- 32-bit floats, the low byte first
);

-- A history: rows are only added and undone. The current label is the last one that is not undone.
CREATE TABLE labels (
    id         INTEGER NOT NULL PRIMARY KEY,
    sample     INTEGER NOT NULL REFERENCES samples (id),
    kind       TEXT    NOT NULL, -- class | none | skip
    class      INTEGER,          -- a position, with kind class
    author     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    undone_by  TEXT,
    undone_ms  INTEGER
);
CREATE INDEX labels_by_sample ON labels (sample, id);

-- Snapshots of a task; never changed.
CREATE TABLE datasets (
    digest       TEXT    NOT NULL PRIMARY KEY,
    task         TEXT    NOT NULL REFERENCES tasks (name),
    classes      TEXT    NOT NULL, -- JSON ["…", …]
    author       TEXT    NOT NULL,
    created_ms   INTEGER NOT NULL,
    device_share REAL    NOT NULL, -- the largest share of the train items that one device may give
    train        INTEGER NOT NULL,
    holdout      INTEGER NOT NULL,
    report       TEXT    NOT NULL  -- JSON: what was left out, and why
);
CREATE INDEX datasets_by_task ON datasets (task, created_ms);

CREATE TABLE dataset_items (
    dataset TEXT    NOT NULL REFERENCES datasets (digest),
    sha256  TEXT    NOT NULL,
    sample  INTEGER NOT NULL,
    class   INTEGER NOT NULL,
    holdout INTEGER NOT NULL,
    device  TEXT,
    PRIMARY KEY (dataset, sha256)
);

-- Embeddings that were computed here: a cache, by the exact engine and the exact image.
CREATE TABLE features (
    engine TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    data   BLOB NOT NULL, -- 32-bit floats, the low byte first
    PRIMARY KEY (engine, sha256)
);
