-- What people asked to be gone for good, and how far that is. What was erased stands here by number and digest only.
CREATE TABLE erasures (
    id       INTEGER NOT NULL PRIMARY KEY,
    request  TEXT    NOT NULL, -- JSON: which samples
    why      TEXT    NOT NULL,
    author   TEXT    NOT NULL,
    asked_ms INTEGER NOT NULL,
    here_ms  INTEGER,          -- gone from the coordinator
    receipt  TEXT    NOT NULL  -- JSON: what was gone so far, and where
);

-- Images that are not taken again, whoever brings them.
CREATE TABLE erased_images (
    sha256  TEXT    NOT NULL PRIMARY KEY,
    erasure INTEGER NOT NULL REFERENCES erasures (id)
);

-- What a device may still have, until it says that it has not.
CREATE TABLE erasure_devices (
    id      INTEGER NOT NULL PRIMARY KEY, -- as the device is told
    erasure INTEGER NOT NULL REFERENCES erasures (id),
    site    TEXT    NOT NULL,             -- '' where no site was proved
    device  TEXT    NOT NULL,
    what    TEXT    NOT NULL,             -- JSON, as the device is told
    from_ms INTEGER,                      -- of a time range, which is refused from now on
    to_ms   INTEGER,
    done_ms INTEGER
);
CREATE INDEX erasure_devices_by_device ON erasure_devices (device, site);

-- Who brought an imported sample in.
ALTER TABLE samples ADD COLUMN brought_by TEXT;
-- 1: erased, not only deleted.
ALTER TABLE samples ADD COLUMN erased INTEGER NOT NULL DEFAULT 0;
