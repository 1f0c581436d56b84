-- The models that this coordinator knows, and the work of making them.

CREATE TABLE models (
    name       TEXT    NOT NULL,
    version    TEXT    NOT NULL,
    sha256     TEXT    NOT NULL, -- of the model file
    kind       TEXT    NOT NULL, -- what it does: classify, embed, …
    state      TEXT    NOT NULL, -- given | accepted | refused
    parent     TEXT,             -- name@version of the model that it grew out of
    dataset    TEXT,             -- digest of the snapshot that it was trained on
    job        INTEGER,          -- that made it
    trainer    TEXT,             -- JSON: everything that the trainer was told
    report     TEXT,             -- JSON: what was measured on the holdout
    verdict    TEXT,             -- JSON: what the gate said, and why
    author     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (name, version)
);
CREATE INDEX models_by_age ON models (name, created_ms);

-- Every candidate that was judged on a holdout: looking often at the same one makes chance look like progress.
CREATE TABLE judged (
    holdout TEXT    NOT NULL, -- digest of the holdout's items
    model   TEXT    NOT NULL, -- name@version
    at_ms   INTEGER NOT NULL,
    PRIMARY KEY (holdout, model)
);

CREATE TABLE jobs (
    id         INTEGER NOT NULL PRIMARY KEY,
    task       TEXT    NOT NULL,
    request    TEXT    NOT NULL, -- JSON
    state      TEXT    NOT NULL, -- queued | running | done | failed | cancelled
    attempts   INTEGER NOT NULL,
    progress   TEXT,             -- JSON: the last that was told
    model      TEXT,             -- name@version, when done
    error      TEXT,             -- why it failed
    author     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    ended_ms   INTEGER
);
CREATE INDEX jobs_by_state ON jobs (state, id);
