-- Which models are published, how they come to the devices, and what each device is to be.

CREATE TABLE releases (
    name       TEXT    NOT NULL,
    version    TEXT    NOT NULL,
    digest     TEXT    NOT NULL, -- SHA-256 of the release document
    document   TEXT    NOT NULL, -- JSON: every file with its digest and chunks
    author     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (name, version)
);

CREATE TABLE rollouts (
    id         INTEGER NOT NULL PRIMARY KEY,
    settings   TEXT    NOT NULL, -- JSON: the group, the plan, the limits, who asked
    state      TEXT    NOT NULL, -- JSON: the state machine
    ended      INTEGER NOT NULL, -- 1: a newer one has taken its place
    created_ms INTEGER NOT NULL
);

-- What happened to a rollout, in order; never changed.
CREATE TABLE rollout_events (
    id      INTEGER NOT NULL PRIMARY KEY,
    rollout INTEGER NOT NULL,
    at_ms   INTEGER NOT NULL,
    what    TEXT    NOT NULL
);
CREATE INDEX rollout_events_by_rollout ON rollout_events (rollout, id);

CREATE TABLE wishes (
    device  INTEGER NOT NULL PRIMARY KEY, -- of the database of readings
    message TEXT    NOT NULL, -- JSON: the last wish, as it was sent
    pinned  INTEGER NOT NULL  -- 1: a person chose it for this device, rollouts pass by
);
