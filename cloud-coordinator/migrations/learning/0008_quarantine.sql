-- Devices whose samples are not learnt from until a person says so. A history: rows are only added and lifted.
CREATE TABLE quarantines (
    id        INTEGER NOT NULL PRIMARY KEY,
    site      TEXT    NOT NULL, -- '' where no site was proved
    device    TEXT    NOT NULL,
    why       TEXT    NOT NULL, -- for people
    evidence  TEXT,             -- JSON: what was found; NULL where a person decided
    task      TEXT,             -- in whose samples it was found
    author    TEXT    NOT NULL,
    at_ms     INTEGER NOT NULL,
    lifted_by TEXT,
    lifted_ms INTEGER,
    upto      INTEGER           -- the newest sample then: the person who lifted it vouches for those up to it
);
CREATE INDEX quarantines_by_device ON quarantines (device, site);
