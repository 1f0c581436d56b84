-- The same thing seen by one or more cameras of a site.
CREATE TABLE sightings (
    id        TEXT    NOT NULL PRIMARY KEY, -- 16 hexadecimal digits, from the identity of its first reading
    site      TEXT    NOT NULL,
    label     TEXT    NOT NULL,
    from_ms   INTEGER NOT NULL,             -- the devices' clocks
    to_ms     INTEGER NOT NULL,
    opened_ms INTEGER NOT NULL,             -- the coordinator's clock
    said      INTEGER NOT NULL              -- 1 when subscribers have been told
);
CREATE INDEX sightings_by_time ON sightings (site, label, to_ms);
CREATE INDEX sightings_to_say ON sightings (opened_ms) WHERE said = 0;

-- Who saw it.
CREATE TABLE witnesses (
    sighting TEXT    NOT NULL REFERENCES sightings (id),
    device   TEXT    NOT NULL,
    source   TEXT    NOT NULL,
    ts       INTEGER NOT NULL, -- the first time
    score    REAL    NOT NULL, -- the best
    readings INTEGER NOT NULL,
    epoch    INTEGER NOT NULL, -- of its first reading
    seq      INTEGER NOT NULL,
    PRIMARY KEY (sighting, device, source)
) WITHOUT ROWID;

-- The last reading that was looked at: one row.
CREATE TABLE sighted (
    one     INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    reading INTEGER NOT NULL
);
